"""The verb `enfilade complete`: from a frame to the room behind it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from enfilade.errors import UserError
from enfilade.options import Device, Flag, Folder, MaybeFile, MaybeNumber, Model, camera_of, read_camera, use_threads
from enfilade.shipped import COMPLETION

Output = Literal["arrays", "mesh", "page"]


@dataclass(frozen=True)
class Complete:
    """Complete the room behind a frame: labelled voxels, a mesh, and a page to turn the room around in.

    Depth comes from a file, or from the default model. The camera is given, or comes from EXIF, or is assumed (and said
    so); where its world lies is found from the floor, or given by --gravity, --height or --pose.
    """

    image: Annotated[Positional[str], arg(metavar="IMAGE", help_behavior_hint="")]
    """The frame's image."""
    depth: MaybeFile = None
    """Its depth map, aligned with it: PNG or TIFF in millimetres, or .npy in metres; default: the default model's."""
    unit: MaybeNumber = None
    """Metres per stored unit of the depth map."""
    out: Folder = "out"
    """Folder for IMAGE.room.npz, .room.ply and .room.html."""
    model: Model = COMPLETION
    """A shipped completion model, a model file, or the folder of a training run."""
    camera: MaybeFile = None
    """JSON file with {"fx", "fy", "cx", "cy"}."""
    fov: Annotated[float | None, arg(metavar="DEGREES", help_behavior_hint="")] = None
    """Horizontal field of view instead."""
    pose: MaybeFile = None
    """Text file with the 4x4 camera-to-world pose of a world whose Z is up."""
    gravity: Annotated[tuple[float, float, float] | None, arg(metavar="X Y Z", help_behavior_hint="")] = None
    """The direction in which things fall, in the camera frame (x right, y down, z forward)."""
    height: MaybeNumber = None
    """The camera's height above the floor, metres."""
    files: tuple[Output, ...] = get_args(Output)
    """What to write: arrays (NPZ), mesh (PLY), page (HTML)."""
    rerun: Annotated[str | None, arg(metavar="FILE.rrd", help_behavior_hint="")] = None
    """Also write the frame and its room as a Rerun recording."""
    device: Device = None
    """cpu, cuda, cuda:1 ...; default: cpu."""
    json: Flag = False
    """Print the result as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        from enfilade import complete, images
        from enfilade.data.voxel_files import describe_grid, read_depth, read_pose
        from enfilade.room_output import peak_megabytes, save

        if sum(x is not None for x in (self.pose, self.gravity)) > 1:
            raise UserError("give gravity once: by --pose or by --gravity")
        images.make_folder(self.out)
        recording = None
        if self.rerun is not None:  # complains before anything is computed
            from enfilade.rerun_file import RerunFile

            recording = RerunFile(self.rerun)
        image = images.read(self.image)
        height, width = image.rgb.shape[:2]
        camera = None
        if self.camera is not None:
            camera = camera_of(read_camera(Path(self.camera)), width, height)
        depth = None if self.depth is None else read_depth(self.depth, unit=self.unit)
        gravity = self.gravity
        if self.pose is not None:
            gravity = tuple(-read_pose(self.pose)[2, :3])
        use_threads()
        completer = complete.load(self.model, self.device)
        room = completer.complete(image, depth, camera, fov=self.fov, gravity=gravity, height=self.height)
        written = save(room, self.out, stem=Path(self.image).stem, files=self.files, model=self.model)
        if recording is not None:
            with recording:
                recording.room(room)
            written.append(str(recording.path))
        facts = complete.describe(room) | {"files": written, "peak_megabytes": peak_megabytes()}
        if self.json:
            print(json.dumps(facts, indent=1))
            return 0
        print(f"Depth: {room.depth_source}; camera: {room.camera_source}.")
        print(describe_grid(room.grid, gravity="given" if gravity is not None else "found"))
        shares = ", ".join(f"{name} {litres / 1000:.2f} m3" for name, litres in facts["litres"].items())
        print(f"Room: {facts['observed']} voxels seen, {facts['completed']} completed; {shares}.")
        print(f"{room.seconds:.1f} s, at most {facts['peak_megabytes']:.0f} MB of memory.")
        for path in written:
            print(path)
        return 0
