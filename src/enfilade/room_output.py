"""A completed room on disk: arrays, a mesh, a page."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from enfilade import images
from enfilade.complete import SPACE, Room
from enfilade.errors import UserError
from enfilade.labels import SPACES
from enfilade.room_page import room_mesh, write_mesh_ply, write_room_page

FILES = ("arrays", "mesh", "page")


def save(
    room: Room, folder: str | Path, *, stem: str | None = None, files: Sequence[str] = FILES, model: str = ""
) -> list[str]:
    """Write files to `folder`, each whole or not at all, and return their paths.

    * "arrays": `<stem>.room.npz` with labels uint8 [i, j, k] (ssc12: 0 empty, 255 not judged; axes as in
      `ops.voxels`), confidence, observed, origin, size, pose (camera-to-world), intrinsics, names.
    * "mesh": `<stem>.room.ply`, the faces of the full voxels in their class's colour, metres, Z up.
    * "page": `<stem>.room.html`, to be turned around in a browser, without a network.

    Raises UserError for an unknown kind of file or an unwritable folder.
    """
    if unknown := [f for f in files if f not in FILES]:
        raise UserError(f"no such output {', '.join(map(repr, unknown))}: choose among {', '.join(FILES)}")
    folder = images.make_folder(folder)
    stem = Path(stem or room.name or "image").name
    written: list[str] = []

    def place(ending: str) -> Path:
        written.append(str(folder / f"{stem}.room.{ending}"))
        return Path(written[-1])

    if "arrays" in files:
        arrays = {
            "labels": room.volume.labels,
            "confidence": room.confidence,
            "observed": room.observed,
            "origin": np.asarray(room.volume.origin),
            "size": np.float64(room.volume.size),
            "pose": np.asarray(room.camera.pose),
            "intrinsics": room.camera.matrix,
            "names": np.array(SPACES[SPACE].names),
        }
        images.write_atomic(place("npz"), lambda file: np.savez_compressed(file, **arrays))
    if "mesh" in files:
        write_mesh_ply(place("ply"), *room_mesh(room.volume, SPACE))
    if "page" in files:
        facts = {"Network": model, "Depth": room.depth_source, "Camera": room.camera_source}
        write_room_page(
            place("html"),
            room.volume,
            image=room.image,
            labels=room.labels,
            camera=room.camera,
            observed=room.observed,
            title=room.name or stem,
            facts={k: v for k, v in facts.items() if v},
        )
    return written


def peak_megabytes() -> float:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
