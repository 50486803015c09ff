"""What a prediction becomes on disk, and its summary in plain numbers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enfilade import images, labels, ros, viz
from enfilade.errors import UserError
from enfilade.types import Prediction

FILES = ("labels", "depth", "colour", "spread", "overlay", "panel", "arrays", "points")
KINDS = (*FILES, "ros")  # what there is beyond the usual
PICTURES = (".labels.png", ".depth.png", ".depth.tiff", ".colour.png", ".spread.png", ".overlay.png", ".panel.png")
PLY_POINTS = 1_000_000  # `save` thins larger clouds by a stride


def save(
    prediction: Prediction, folder: str | Path, *, stem: str | None = None, files: Sequence[str] = FILES
) -> list[str]:
    """Write files to `folder`, each whole or not at all, and return their paths. `stem` defaults to the image's name.

    * "labels": `<stem>.labels.png`, uint8 class numbers of the label space.
    * "depth": `<stem>.depth.png`, uint16 millimetres, 0 unknown, at most 65.535 m.
    * "overlay", "panel": `<stem>.overlay.png`, `<stem>.panel.png`, pictures to look at.
    * "colour": `<stem>.colour.png`, depth in colours above a bar of metres.
    * "spread": `<stem>.spread.png`, uint16 millimetres by which a network's iterations differ (RSN).
    * "arrays": `<stem>.npz` with labels, depth (metres), confidence, depth_spread, intrinsics [3, 3], camera_source,
      space, names.
    * "points": `<stem>.ply`, a coloured point cloud in metres, of at most a million points or so.
    * "ros", only where asked for: `<stem>.depth.tiff` and the camera and the classes as messages of ROS 2, see
      `ros.save_ros`.

    What a prediction lacks is left out. Raises UserError for an unknown kind of file or an unwritable folder.
    """
    if unknown := [f for f in files if f not in KINDS]:
        raise UserError(f"no such output {', '.join(map(repr, unknown))}: choose among {', '.join(KINDS)}")
    stem = Path(stem or prediction.name or "image").name
    folder = images.make_folder(folder)
    p, space = prediction, labels.get(prediction.space)
    written: list[str] = []

    def place(ending: str) -> Path:
        written.append(str(folder / f"{stem}.{ending}"))
        return Path(written[-1])

    if "labels" in files and p.labels is not None:
        images.write_png(place("labels.png"), p.labels)
    for kind, metres in (("depth", p.depth), ("spread", p.depth_spread)):
        if kind in files and metres is not None:
            known = np.where(np.isfinite(metres), metres, 0)
            images.write_png(place(f"{kind}.png"), (known * 1000).round().clip(0, 65535).astype(np.uint16))
    if "colour" in files and p.depth is not None:
        images.write_png(place("colour.png"), viz.depth_picture(p.depth))
    if "overlay" in files and p.labels is not None:
        images.write_png(place("overlay.png"), viz.overlay(p.image, p.labels, space))
    if "panel" in files:
        images.write_png(place("panel.png"), np.asarray(viz.panel(p)))
    if "arrays" in files:
        arrays: dict[str, Any] = {"labels": p.labels, "depth": p.depth, "confidence": p.confidence}
        arrays |= {"depth_spread": p.depth_spread}
        arrays |= {"intrinsics": p.camera.matrix if p.camera else None, "names": np.array(space.names)}
        arrays |= {"camera_source": np.array(p.camera_source), "space": np.array(p.space)}
        present = {k: v for k, v in arrays.items() if v is not None}
        # Not compressed: zlib is slow, and the low bits of floats hardly shrink.
        images.write_atomic(place("npz"), lambda file: np.savez(file, **present))
    if "points" in files and p.depth is not None and p.camera is not None:
        stride = math.ceil(math.sqrt(p.depth.size / PLY_POINTS))
        viz.write_ply(place("ply"), *viz.points(p, stride))
    if "ros" in files:
        written += ros.save_ros(p, folder, stem)
    return written


def describe(
    prediction: Prediction, *, source: str | None = None, files: Sequence[str] = (), seconds: float | None = None
) -> dict[str, Any]:
    """What `--json` prints of one image: plain numbers and strings. Depths are metres, shares are of the labelled
    pixels, largest first; a field that the prediction lacks is None."""
    p = prediction
    height, width = p.image.shape[:2]
    space = labels.get(p.space)
    summary: dict[str, Any] = {"source": source, "name": p.name, "width": width, "height": height, "space": p.space}
    summary["classes"] = None if p.labels is None else {space.names[k]: s for k, s in viz.shares(p.labels, space)}
    summary["confidence"] = None if p.confidence is None else float(p.confidence.mean())
    summary["depth"] = None
    if p.depth is not None and (known := p.depth[np.isfinite(p.depth) & (p.depth > 0)]).size:
        summary["depth"] = {"min": float(known.min()), "median": float(np.median(known)), "max": float(known.max())}
    summary["camera"] = None
    if (c := p.camera) is not None:
        numbers = {"fx": c.fx, "fy": c.fy, "cx": c.cx, "cy": c.cy, "fov": c.fov_degrees}
        summary["camera"] = {"source": p.camera_source, **numbers}
    return summary | {"files": list(files), "seconds": seconds}
