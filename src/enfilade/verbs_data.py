"""The verbs under `enfilade data`: prepare, look at and count data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from enfilade.errors import UserError, unknown
from enfilade.options import (
    Count,
    Flag,
    Folder,
    MaybeCount,
    MaybeFile,
    MaybeFolder,
    MaybeNumber,
    Name,
    Options,
    camera_of,
    complain,
    open_reader,
    parse_options,
    positive,
    read_camera,
)


@dataclass(frozen=True)
class DataPrepare:
    """Turn a data set as it is distributed into the folder that its reader wants."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2."""
    mat: Annotated[str, arg(metavar="FILE")]
    """The official nyu_depth_v2_labeled.mat."""
    out: Folder
    """The folder to fill."""
    splits: MaybeFile = None
    """The official splits.mat; default: beside the first file."""
    mapping: MaybeFile = None
    """The official classMapping40.mat; default: beside the first file."""
    raw_depth: Flag = False
    """The sensor's depth with its holes, instead of the in-painted one."""
    image: Literal["jpg", "png"] = "jpg"
    """Format of the colour images; png is lossless and five times as large."""

    def run(self) -> int:
        if self.name != "nyuv2":
            raise unknown("data set that needs preparing", self.name, ["nyuv2"])
        from enfilade.data.prepare import prepare_nyuv2

        folder = prepare_nyuv2(
            self.mat,
            self.out,
            splits=self.splits,
            mapping=self.mapping,
            raw_depth=self.raw_depth,
            image=self.image,
        )
        print(f"prepared {folder}")
        return 0


@dataclass(frozen=True)
class DataHHA:
    """Make the HHA image of every frame of an NYUv2 folder from its depth, for recipes that take HHA."""

    root: Folder
    """Folder of the data; its hha/ is filled where a frame has none."""

    def run(self) -> int:
        from enfilade.data.prepare import prepare_hha

        print(f"wrote {prepare_hha(self.root)} HHA images to {self.root}/hha")
        return 0


@dataclass(frozen=True)
class DataCheck:
    """Read every sample of a data set once; say what is in it and name what is broken."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2, camvid, sunrgbd, voc2012, ssc, frames, rooms or room-files."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to read."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""
    json: Flag = False
    """Print the findings as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        from enfilade.data.inspect import check

        found = check(open_reader(self.name, self.root, self.split, parse_options(self.option)), quiet=False)
        print(found.json() if self.json else found.text())
        return 1 if found.broken else 0


@dataclass(frozen=True)
class DataShow:
    """Draw some samples of a data set on one sheet: RGB, labels, depth."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2, camvid, sunrgbd, voc2012, ssc, frames, rooms or room-files."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to draw from."""
    out: Annotated[str, arg(metavar="FILE")] = "sheet.png"
    """PNG file to write."""
    count: Count = 12
    """Samples on the sheet."""
    seed: Count = 0
    """Other samples for another seed."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""

    def run(self) -> int:
        from enfilade.data.inspect import show

        show(
            open_reader(self.name, self.root, self.split, parse_options(self.option)),
            self.out,
            count=self.count,
            seed=self.seed,
        )
        print(self.out)
        return 0


@dataclass(frozen=True)
class DataWeights:
    """Count the classes of a data set and write weights that balance them in a loss (median frequency)."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set, one with labels."""
    out: Annotated[str, arg(metavar="FILE")]
    """JSON file to write."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to count."""
    power: Annotated[float, arg(metavar="X")] = 1.0
    """Of the weights: 1 is full balance, 0.5 half way in the logarithm, 0 none."""
    count_void: Flag = False
    """Take void into the pixels of the images that contain a class; training counts labelled pixels only."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""
    json: Flag = False
    """Print the file's contents, and nothing else, on stdout."""

    def run(self) -> int:
        import json

        from enfilade.data import weights
        from enfilade.images import make_folder

        reader = open_reader(self.name, self.root, self.split, parse_options(self.option))
        make_folder(Path(self.out).parent)  # rather now than after the counting
        counts = weights.count(reader, len(reader.space), tolerant=True, quiet=False)
        for name, why in counts.broken:
            complain(f"{name}: {why}")
        document = weights.describe(counts, self.name, self.split, reader.space, self.power, count_void=self.count_void)
        weights.write(document, self.out)
        print(json.dumps(document, indent=1) if self.json else f"{weights.text(document)}\n\n{self.out}")
        return 1 if counts.broken else 0


@dataclass(frozen=True)
class DataRegions:
    """Write region support (RSN's Algorithm 1) for a data set with labels and depth, and show some of it."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2, sunrgbd, frames with labels, or rooms."""
    out: Folder
    """Folder for NAME.png of each sample (16 bit, millimetres) and sheet.png; what is there is kept."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to read."""
    show: Count = 6
    """Samples on the sheet: RGB, labels, depth, region support; 0 for no sheet."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""

    def run(self) -> int:
        from enfilade.data.region_files import show_region_support, write_region_support

        reader = open_reader(self.name, self.root, self.split, parse_options(self.option))
        found = write_region_support(reader, self.out, quiet=False)
        for name, why in found.broken:
            complain(f"{name}: {why}")
        print(f"{found.written} written, {found.present} there before, {len(found.broken)} broken: {self.out}")
        if self.show > 0:
            sheet = Path(self.out, "sheet.png")
            show_region_support(reader, sheet, count=self.show)
            print(sheet)
        return 1 if found.broken else 0


@dataclass(frozen=True)
class DataRender:
    """Render procedural rooms to files: RGB, depth, labels, camera and label volume, for the reader room-files."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """What to render: rooms."""
    out: Folder
    """Folder to fill; complete frames in it are kept, so that an interrupted run goes on."""
    count: MaybeCount = None
    """Rooms; default: 1000 of train, 100 of val and of test."""
    split: Name = "train"
    """Split to render: train, val or test. No room is in two of them."""
    seed: Count = 0
    """Other rooms for another seed."""
    width: Count = 640
    """Of the pictures, pixels."""
    height: Count = 480
    """Of the pictures, pixels."""
    noise: Annotated[bool, arg(help_behavior_hint="")] = True
    """Exact depth only; default: depth with a Kinect's holes and steps."""
    exact: Flag = False
    """Write exact depth too, beside that with noise."""
    image: Literal["jpg", "png"] = "jpg"
    """Format of the colour images; png is lossless and five times as large."""
    workers: MaybeCount = None
    """Processes; default: one for each core. A room takes about a second of one core."""

    def run(self) -> int:
        if self.name != "rooms":
            raise unknown("data set that can be rendered", self.name, ["rooms"])
        positive("--workers", self.workers)
        from enfilade.data.room_files import render_rooms
        from enfilade.info import cores

        found = render_rooms(
            self.out,
            split=self.split,
            count=self.count,
            seed=self.seed,
            width=self.width,
            height=self.height,
            noise=self.noise,
            exact=self.exact,
            image=self.image,
            workers=self.workers or cores(),
            quiet=False,
        )
        for name, why in found.broken:
            complain(f"{name}: {why}")
        print(f"{found.written} written, {found.present} there before, {len(found.broken)} broken: {self.out}")
        return 1 if found.broken else 0


@dataclass(frozen=True)
class DataVoxels:
    """Place a voxel grid around your own depth map, and write what a completion network takes (NPZ)."""

    depth: Annotated[Positional[str], arg(metavar="FILE", help_behavior_hint="")]
    """Depth map: 16-bit PNG or TIFF in millimetres, or .npy in metres; 0 is missing."""
    out: Annotated[str, arg(metavar="FILE")] = "voxels.npz"
    """File to write."""
    rgb: MaybeFile = None
    """Colour image, aligned with the depth map."""
    camera: MaybeFile = None
    """JSON file: {"fx", "fy", "cx", "cy"} and optionally "width", "height" of the image they belong to."""
    fov: Annotated[float | None, arg(metavar="DEGREES", help_behavior_hint="")] = None
    """Horizontal field of view instead."""
    unit: MaybeNumber = None
    """Metres per stored unit; default: 0.001 for whole numbers, 1 for floats."""
    gravity: Annotated[tuple[float, float, float] | None, arg(metavar="X Y Z", help_behavior_hint="")] = None
    """Direction in which things fall, in the camera frame (x right, y down, z forward); default: found in the depth."""
    pose: MaybeFile = None
    """Instead: 4x4 camera-to-world matrix (text) whose world has Z up; only gravity is taken from it."""
    height: MaybeNumber = None
    """Of the camera above the floor, metres; default: found in the depth."""
    walls: Annotated[bool, arg(help_behavior_hint="")] = True
    """Let the grid point where the camera looks; default: turned to the walls."""
    json: Flag = False
    """Print height, gravity, origin, pose and file as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        import json

        import numpy as np

        from enfilade.data.volumes import encode
        from enfilade.data.voxel_files import describe_grid, frame, read_depth, read_pose, write_voxels
        from enfilade.images import make_folder
        from enfilade.ops.voxels import place_grid

        if self.gravity is not None and self.pose is not None:
            raise UserError("give gravity once: by --gravity or by --pose")
        depth = read_depth(self.depth, unit=self.unit)
        camera = self._camera(depth.shape[1], depth.shape[0])
        sample = frame(depth, camera, rgb=self.rgb, name=Path(self.depth).stem)
        assert sample.camera is not None
        gravity = None if self.gravity is None else np.array(self.gravity)
        if self.pose is not None:
            gravity = -read_pose(self.pose)[2, :3]
        grid = place_grid(depth, sample.camera, gravity, height=self.height, walls=self.walls)
        make_folder(Path(self.out).parent)
        write_voxels(self.out, encode(sample, grid=grid), grid)
        if self.json:
            found = {"height": grid.pose[2, 3], "gravity": (-grid.pose[2, :3]).tolist()}
            found |= {"origin": grid.origin.tolist(), "pose": grid.pose.tolist(), "size": grid.size}
            print(json.dumps({**found, "out": self.out}, indent=1))
        else:
            seen = "found in the depth map; 1.3 m or more where no floor is in view"
            given = "as given" if self.pose is None else f"from {self.pose}"
            told = describe_grid(
                grid,
                height=seen if self.height is None else "as given",
                gravity="found in the depth map" if gravity is None else given,
            )
            print(f"{told}\n{self.out}")
        return 0

    def _camera(self, width: int, height: int):
        """The camera that the options tell of; `width` and `height` are the depth map's."""
        from enfilade.camera import Camera

        if (self.camera is None) == (self.fov is None):
            raise UserError("a grid in metres needs the camera, once: give --camera or --fov")
        if self.fov is not None:
            if not 1 <= self.fov <= 170:
                raise UserError(f"a horizontal field of view lies between 1 and 170 degrees, not {self.fov:g}")
            return Camera.from_fov(width, height, self.fov)
        assert self.camera is not None
        return camera_of(read_camera(Path(self.camera)), width, height)
