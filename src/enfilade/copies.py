"""Copies of one's own images at the size at which a network learns from them, with depth, on disk.

Large photos are slow to decode and are seen dozens of times; and where an image has no depth map, a network that
estimates depth is given its own answer of before (`finetune`). Where the rest of the library has a camera's metres, the
copies hold those of the model's canonical camera: see `predict`.
"""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from enfilade import checkpoint, report
from enfilade.checkpoint import Loaded
from enfilade.data.files import read_map, read_rgb
from enfilade.data.folder import Folder
from enfilade.errors import UserError
from enfilade.images import make_folder, write_atomic, write_png
from enfilade.predict import Predictor
from enfilade.stages import Recipe
from enfilade.types import Sample

MARGIN = 1.25  # sides of the copies, in those of the network's input: zoom in training still finds detail


class Prepared:
    """The copies of a reader's samples in `folder`; a reader itself. Depth is that of the canonical camera."""

    ignored: tuple[int, ...] = ()
    score_crop: tuple[slice, slice] | None = None

    def __init__(self, folder: Path, reader: Folder):
        self.folder, self.names, self.space, self.name = folder, reader.names, reader.space, reader.name

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int, ending: str) -> Path:
        return self.folder / f"{index:05d}.{ending}"

    def __getitem__(self, index: int) -> Sample:
        depth = None
        if (path := self.path(index, "depth.png")).is_file():
            depth = read_map(path).astype(np.float32) * np.float32(0.001)
        image, found = read_rgb(self.path(index, "jpg")), self.labels(index)
        return Sample(image=image, name=self.names[index], labels=found, depth=depth)

    def labels(self, index: int) -> UInt8[np.ndarray, "h w"]:
        return read_map(self.path(index, "png"))


def prepare(
    data: dict[str, Folder],
    out: Path,
    start: Loaded,
    model: str | Path,
    recipe: Recipe,
    *,
    resume: bool = True,
    quiet: bool = False,
) -> dict[str, Prepared]:
    """Copies of all samples at the size that training sees at zoom 1, times `MARGIN`, with depth where the network has
    some. Copies that are there stay; a folder of copies is of exactly these files, this model and this size.

    Raises:
        UserError: `out` holds a training on other files, or another size; a file that cannot be read.
    """
    size = recipe.stages[0].size
    # At its own size: a network judges distance by how many pixels a thing fills, so at another it is off by a factor
    predictor = Predictor(start.network, start.meta, flip=False)
    has_depth = "depth_berhu" in recipe.stages[0].losses
    digest = fingerprint(data, model, size)
    earlier = [path for path in (out / "prepared").glob("*") if re.fullmatch("[0-9a-f]{12}", path.name)]
    if others := [path for path in earlier if path.name != digest]:
        if resume and (out / "last.safetensors").is_file():
            raise UserError(
                f"{out} holds a training on other images, labels, classes or sizes: choose another folder, or "
                "--no-resume"
            )
        for path in others:
            shutil.rmtree(path)
    found = {}
    for split, reader in data.items():
        copies = found[split] = Prepared(make_folder(out / "prepared" / digest / split), reader)
        for index in report.progress(range(len(reader)), f"preparing {split}", quiet):
            if not copies.path(index, "jpg").is_file():
                write_copy(reader[index], copies, index, size, predictor if has_depth else None)
    return found


def write_copy(
    sample: Sample, copies: Prepared, index: int, network_size: tuple[int, int], predictor: Predictor | None
) -> None:
    """Write one copy, for a network's input of that height and width, with depth if there is a predictor; its image
    last, so that an image without labels or depth is never left."""
    height, width = sample.image.shape[:2]
    factor = MARGIN * math.sqrt(math.prod(network_size) / (height * width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    assert sample.labels is not None
    write_png(copies.path(index, "png"), cv2.resize(sample.labels, size, interpolation=cv2.INTER_NEAREST_EXACT))
    if predictor is not None:
        metres = cv2.resize(canonical_depth(sample, predictor), size, interpolation=cv2.INTER_NEAREST_EXACT)
        write_png(copies.path(index, "depth.png"), np.clip(np.rint(1000 * metres), 0, 65535).astype(np.uint16))
    encoded = cv2.imencode(".jpg", np.rint(255 * image[..., ::-1]).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    write_atomic(copies.path(index, "jpg"), encoded.tobytes())


def canonical_depth(sample: Sample, predictor: Predictor) -> Float32[np.ndarray, "h w"]:
    """Metres of the canonical camera: the sample's own depth map, or else the predictor's answer."""
    if sample.depth is None:
        metres = predictor.predict(sample.image).depth  # of pixels alone, whose camera is taken to be the canonical one
        assert metres is not None
        return metres
    if sample.camera is None:
        return sample.depth
    return sample.depth / np.float32(predictor.zoom(sample.camera, *predictor.input_size(*sample.image.shape[:2])))


def fingerprint(data: dict[str, Folder], model: str | Path, size: tuple[int, int]) -> str:
    """A name for these files, this model and this size: of images the size counts, of labels every byte."""
    digest = hashlib.sha256(checkpoint.resolve(model).read_bytes())
    for split, reader in data.items():
        camera = reader.root / "camera.json"
        told = [
            split,
            reader.space.name,
            [str(e) for e in reader.entries],
            size,
            camera.is_file() and camera.read_text(),
        ]
        digest.update(json.dumps(told).encode())
        for index, name in enumerate(reader.names):
            files = reader.files(index)
            sizes = {kind: path.stat().st_size for kind, path in files.items()}
            digest.update(json.dumps([name, sizes]).encode() + files["labels"].read_bytes())
    return digest.hexdigest()[:12]
