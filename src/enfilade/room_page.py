"""A completed room as a page that one can turn around in a browser, and as a coloured mesh.

The page is one HTML file that asks the network for nothing: the voxels, the photo and the code that draws them are
inside. `static/room.html` is its template, `static/room.js` its code, `static/three.bundle.min.js` the part of three.js
(MIT licence) it draws with.
"""

import base64
import html
import json
import os
import re
import zlib
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

from enfilade import labels as label_spaces
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.images import write_atomic
from enfilade.labels import LabelSpace
from enfilade.types import IGNORE, LabelVolume
from enfilade.viz import as_uint8

STATIC = Path(__file__).parent / "static"
HIDDEN = ("ceiling",)  # classes not drawn at first, so that one can look in
PHOTO = 720  # pixels: the longer side of the photo in a page
UNKNOWN, SEEN = 127, 128  # in the page's bytes: label 255, and the bit of an observed voxel


def _checked(volume: LabelVolume, space: str) -> LabelSpace:
    """The space, if it can name the volume's labels."""
    classes = label_spaces.get(space)
    if classes.names[0] != "empty":
        raise UserError(
            f"label space {space!r} has no label for an empty voxel: map the labels to 'ssc12', where 0 is empty"
        )
    values = np.flatnonzero(np.bincount(volume.labels.reshape(-1), minlength=256))
    if len(wrong := values[(values >= len(classes)) & (values != IGNORE)]):
        raise UserError(f"the volume holds label {wrong[0]}, {space} has 0..{len(classes) - 1} and 255 for unknown")
    return classes


# --------------------------------------------------------------------------------------------------------------- mesh


def _rectangles(faces: UInt8[np.ndarray, "s u v"]) -> Int32[np.ndarray, "n 6"]:
    """The faces other than 0 of each slice, merged to rectangles of one label: runs along v, then equal runs of
    neighbouring rows. Columns: slice, u from, u to, v from, v to (exclusive), label."""
    shown = faces != 0
    change = np.diff(faces, axis=2, prepend=0, append=0) != 0
    s, u, first = np.nonzero(change[..., :-1] & shown)
    last = np.nonzero(change[..., 1:] & shown)[2] + 1  # in the order of the starts: runs do not overlap
    runs = np.stack([s, first, last, faces[s, u, first], u]).astype(np.int32)
    runs = runs[:, np.lexsort(runs[::-1])]  # equal runs next to each other, by rising u
    new = np.ones(runs.shape[1], bool)
    new[1:] = np.diff(runs[:4]).any(0) | (np.diff(runs[4]) != 1)
    begin = np.flatnonzero(new)
    end = np.append(begin[1:], runs.shape[1])[: len(begin)] - 1
    s, first, last, label, top = runs[:, begin]
    return np.stack([s, top, runs[4, end] + 1, first, last, label], -1)


def room_mesh(
    volume: LabelVolume, space: str = "ssc12"
) -> tuple[Float32[np.ndarray, "n 3"], Int32[np.ndarray, "m 3"], UInt8[np.ndarray, "n 3"]]:
    """The surface of the labelled voxels: vertices in the volume's world frame (X right, Y forward, Z up, metres),
    triangles that face outwards, and the vertices' colours.

    Only faces towards empty or unknown voxels, or the end of the volume, are there. Faces of one class in one plane
    are merged to rectangles of four vertices of their own, so that a viewer shades them flat; where rectangles of
    different length meet, a corner may lie on another's edge. Raises UserError for a label that `space` lacks."""
    classes = _checked(volume, space)
    world = np.where(volume.labels == IGNORE, 0, volume.labels).transpose(0, 2, 1)  # X, Y, Z
    corners, colours = [np.zeros((0, 4, 3), np.int32)], [np.zeros((0, 3), np.uint8)]
    for axis in range(3):
        u_axis, v_axis = (axis + 1) % 3, (axis + 2) % 3  # axis, u, v are right-handed
        labels = np.ascontiguousarray(world.transpose(axis, u_axis, v_axis))
        for outwards in (0, 1):
            beyond = np.zeros_like(labels)
            if outwards:
                beyond[:-1] = labels[1:]
            else:
                beyond[1:] = labels[:-1]
            s, u0, u1, v0, v1, label = _rectangles(np.where(beyond == 0, labels, 0).astype(np.uint8)).T
            quads = np.empty((len(s), 4, 3), np.int32)
            quads[..., axis] = s[:, None] + outwards
            quads[..., u_axis] = np.stack([u0, u1, u1, u0], -1)
            quads[..., v_axis] = np.stack([v0, v0, v1, v1], -1)
            corners.append(quads if outwards else quads[:, ::-1])  # counter-clockwise, seen from outside
            colours.append(classes.colours[label])
    quads = np.concatenate(corners)
    vertices = (volume.origin + volume.size * quads.reshape(-1, 3)).astype(np.float32)
    first = 4 * np.arange(len(quads), dtype=np.int32)[:, None, None]
    faces = (first + np.array([[0, 1, 2], [0, 2, 3]], np.int32)).reshape(-1, 3)
    return vertices, faces, np.repeat(np.concatenate(colours), 4, axis=0)


def write_mesh_ply(
    path: str | os.PathLike,
    vertices: Float[np.ndarray, "n 3"],
    faces: Int32[np.ndarray, "m 3"],
    colours: UInt8[np.ndarray, "n 3"],
) -> None:
    """Write a mesh such as `room_mesh` makes as binary little-endian PLY, atomically: float x y z and uchar red green
    blue of each vertex, three vertex numbers of each face. Raises UserError for an unwritable folder."""
    if Path(path).suffix.lower() != ".ply":
        raise UserError(f"a mesh is written as .ply, not as {Path(path).name}")
    points = np.empty(len(vertices), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    points["xyz"], points["rgb"] = vertices, colours
    triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"], triangles["corners"] = 3, faces
    header = ["ply", "format binary_little_endian 1.0", "comment metres; world frame: X right, Y forward, Z up"]
    header += [f"element vertex {len(points)}", *(f"property float {name}" for name in "xyz")]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header\n"]

    def write(file):
        file.write("\n".join(header).encode())
        file.write(points.tobytes())
        file.write(triangles.tobytes())

    write_atomic(path, write)


# --------------------------------------------------------------------------------------------------------------- page


def _encoded(volume: LabelVolume, observed: Bool[np.ndarray, "x y z"] | None) -> str:
    """The volume's bytes in C order, compressed, as base64: the label in seven bits, 127 for unknown, and `SEEN`."""
    cells = np.where(volume.labels == IGNORE, UNKNOWN, volume.labels).astype(np.uint8)
    if observed is not None:
        cells |= np.where(observed, SEEN, 0).astype(np.uint8)
    return base64.b64encode(zlib.compress(cells.tobytes(), 9)).decode()


def _data_url(picture: UInt8[np.ndarray, "h w 3"], suffix: str, smooth: bool) -> str:
    height, width = picture.shape[:2]
    scale = min(1.0, PHOTO / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if smooth else cv2.INTER_NEAREST)
    options = [cv2.IMWRITE_JPEG_QUALITY, 88] if suffix == "jpeg" else []
    data = cv2.imencode(f".{suffix}", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/{suffix};base64,{base64.b64encode(data.tobytes()).decode()}"


def _camera(camera: Camera) -> dict:
    if camera.pose is None or not np.isfinite(camera.pose).all():
        raise UserError(
            "the camera has no pose, or one with NaN: give it camera-to-world to draw it, or give no camera"
        )
    numbers = {name: float(getattr(camera, name)) for name in ("fx", "fy", "cx", "cy", "width", "height")}
    return {**numbers, "pose": np.asarray(camera.pose, np.float64).tolist()}


def room_page(
    volume: LabelVolume,
    *,
    image: Float[np.ndarray, "h w 3"] | None = None,
    labels: UInt8[np.ndarray, "_ _"] | None = None,
    camera: Camera | None = None,
    observed: Bool[np.ndarray, "x y z"] | None = None,
    space: str = "ssc12",
    title: str = "",
    facts: dict[str, str] | None = None,
) -> str:
    """A page, complete in itself, that shows the volume: HTML to be written as UTF-8 (`write_room_page` does).

    Args:
        volume: the room; its labels are those of `space`, which must have an "empty" class 0.
        image: the photo it was made from, RGB in [0, 1], shown beside it.
        labels: the photo's labels, in `space` (see `labels.mapping`), laid over the photo at a click.
        camera: of the photo, with a pose in the volume's world: it is drawn, and distances are measured from it.
        observed: the voxels that the camera saw, of the volume's shape; the others are shown as completed.
        title: a heading; any text.
        facts: further lines for the page, such as {"Network": "..."}.

    Raises UserError for sizes that do not fit, for a camera without a pose, and for a label that `space` lacks."""
    classes = _checked(volume, space)
    shape = volume.labels.shape
    if observed is not None and observed.shape != shape:
        raise UserError(f"observed has {observed.shape} voxels, the volume {shape}: they are of one grid")
    if labels is not None and (image is None or labels.shape != image.shape[:2]):
        raise UserError("labels are laid over the photo: give an image of the same height and width")
    room = {
        "title": title,
        "shape": shape,
        "origin": volume.origin.tolist(),
        "size": volume.size,
        "classes": [{"name": n, "colour": c.tolist()} for n, c in zip(classes.names, classes.colours)],
        "hidden": [classes.names.index(name) for name in HIDDEN if name in classes.names],
        "observed": observed is not None,
        "camera": None if camera is None else _camera(camera),
        "facts": {str(key): str(value) for key, value in (facts or {}).items()},
        "photo": None if image is None else _data_url(as_uint8(image), "jpeg", smooth=True),
        "labels": None if labels is None else _data_url(classes.colourise(labels), "png", smooth=False),
        "voxels": _encoded(volume, observed),
    }
    parts = {
        "code": (STATIC / "room.js").read_text("utf-8"),
        "title": html.escape(title or "Room"),
        # No "<" can end the script early, whatever a title or a file name holds.
        "room": json.dumps(room, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"),
        "three": (STATIC / "three.bundle.min.js").read_text("utf-8"),
    }
    template = (STATIC / "room.html").read_text("utf-8")
    return re.sub(r"\{\{(title|room|three|code)\}\}", lambda found: parts[found[1]], template)  # one pass


def write_room_page(path: str | os.PathLike, volume: LabelVolume, **options) -> None:
    """Write `room_page(volume, **options)` to an .html file, atomically. Raises UserError for an unwritable folder."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"a room's page is written as .html, not as {Path(path).name}")
    # A lone surrogate, as in a file name that is no UTF-8, becomes a question mark.
    write_atomic(path, room_page(volume, **options).encode("utf-8", "replace"))
