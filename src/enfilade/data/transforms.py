"""Joint augmentation that keeps geometry true: one affine warp and one colour matrix a sample.

Scale, crop and flip are one warp of every map, and the camera follows it. Depth is then expressed for one canonical
focal length: an object that fills twice the pixels is, to a network that sees only pixels, at half the distance. So
depth is divided by the zoom, and cameras of different lenses can be trained together. `predict` undoes it with the
real focal length.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from enfilade.errors import UserError
from enfilade.types import IGNORE, Sample

MAPS = ("image", "labels", "depth", "instances", "normals", "hha")  # of a sample, pixel by pixel, as readers give them

cv2.setNumThreads(0)  # parallelism belongs to the loader's workers


@dataclass(frozen=True)
class Augment:
    """Args:
    size: (height, width) of the result.
    scale: source pixels to result pixels at zoom 1.
    focal: the canonical focal length in result pixels at zoom 1; None leaves depth and focal length alone.
    zoom: range of a random further scaling (log-uniform); (1, 1) for none.
    flip: probability of a mirror.
    colour: strength of colour changes; 0 for none, 1 for the usual.
    crop: "random" or "centre".
    """

    size: tuple[int, int]
    scale: float = 0.5
    focal: float | None = None
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.5
    colour: float = 1.0
    crop: str = "random"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The augmented sample; the same `rng` state gives the same result."""
        height, width = self.size
        zoom = float(np.exp(rng.uniform(*np.log(self.zoom))))
        flip = bool(rng.random() < self.flip)
        place = rng.random(2) if self.crop == "random" else np.array([0.5, 0.5])
        h, w = sample.image.shape[:2]
        s = self.scale * zoom
        # The window's top-left corner in the scaled image; where that is smaller than the window, it is placed inside.
        left, top = place * (np.array([w, h]) * s - [width, height])
        sx = -s if flip else s
        shift_x = (w - 0.5) * s - 0.5 if flip else 0.5 * s - 0.5  # pixel centres, as in camera.py
        affine = np.array([[sx, 0, shift_x - left], [0, s, 0.5 * s - 0.5 - top]])
        sample = warp(sample, affine, height, width)
        if self.focal is not None:
            # Without a camera, the source's is taken to be canonical, and only the zoom counts.
            camera = sample.camera
            ratio = zoom if camera is None else camera.fx / self.focal
            depth = None if sample.depth is None else sample.depth / np.float32(ratio)
            if camera is not None:
                camera = replace(camera, fx=self.focal, fy=camera.fy / ratio)
            sample = sample.replace(depth=depth, camera=camera)
        if self.colour > 0:
            sample = sample.replace(image=jitter(sample.image, rng, self.colour))
        return sample


def warp(sample: Sample, affine: np.ndarray, height: int, width: int) -> Sample:
    """Every map through one axis-aligned affine map (source to result pixels). Labels, depth and normals take the
    nearest pixel; outside the source, colours are grey, labels ignored and depth unknown."""

    def apply(image, interpolation, border):
        return cv2.warpAffine(
            image, affine, (width, height), flags=interpolation, borderMode=cv2.BORDER_CONSTANT, borderValue=border
        )

    image = sample.image
    factor = abs(affine[0, 0])
    if factor < 0.75:
        # bilinear sampling skips pixels when it shrinks: blur first, by the width that the smaller grid can show
        sigma = 0.35 / factor
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    smooth = cv2.INTER_LINEAR
    changes: dict = {"image": apply(image, smooth, (0.5, 0.5, 0.5))}
    if sample.labels is not None:
        changes["labels"] = apply(sample.labels, cv2.INTER_NEAREST, IGNORE)
    if sample.depth is not None:
        changes["depth"] = apply(sample.depth, cv2.INTER_NEAREST, 0)
    if sample.instances is not None:
        changes["instances"] = apply(sample.instances.astype(np.float32), cv2.INTER_NEAREST, 0).astype(np.int32)
    if sample.normals is not None:
        turned = apply(sample.normals, cv2.INTER_NEAREST, 0)
        changes["normals"] = turned * np.sign([affine[0, 0], affine[1, 1], 1]).astype(np.float32)
    if sample.hha is not None:
        changes["hha"] = apply(sample.hha, smooth, 0)
    if sample.camera is not None:
        changes["camera"] = sample.camera.warped(affine, width, height)
    return sample.replace(**changes)


def paste(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    """Half of the classes of `other`, put into `sample` where they would stand in front of it: classes are chosen as in
    ClassMix (Olsson et al., WACV 2021), and what is nearer wins as in DepthMix (Hoyer et al., CVPR 2021). Both are of
    one size and one canonical focal length (`Augment`); the camera stays that of `sample`.

    Where one of the two depths is unknown, `other` is in front. A map that one of them lacks stays as `sample` has it;
    pixels from a picture without depth have none. Instance ids of the two may coincide.

    Raises:
        UserError: one of them has no labels.
    """
    if sample.labels is None or other.labels is None:
        name = sample.name if sample.labels is None else other.name
        raise UserError(f"{name}: what is pasted is chosen by labels, and there are none; set paste=0 in the stage")
    classes = np.setdiff1d(other.labels, [IGNORE])
    chosen = rng.permutation(classes)[: (len(classes) + 1) // 2]
    front = np.isin(other.labels, chosen)
    if sample.depth is not None:
        if other.depth is None:
            other = other.replace(depth=np.zeros_like(sample.depth))
        front &= (other.depth == 0) | (sample.depth == 0) | (other.depth < sample.depth)
    changes = {}
    for name in MAPS:
        below, above = getattr(sample, name), getattr(other, name)
        if below is not None and above is not None:
            changes[name] = np.where(front[..., None] if below.ndim == 3 else front, above, below)
    return sample.replace(**changes)


def jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Gamma, then brightness, contrast, saturation and white balance as one colour matrix."""
    gamma, brightness, contrast, saturation = np.exp(strength * rng.uniform(-1, 1, 4) * [0.3, 0.25, 0.25, 0.4])
    balance = np.exp(strength * rng.uniform(-0.1, 0.1, 3))
    grey = np.full((3, 3), 1 / 3)
    matrix = (saturation * np.eye(3) + (1 - saturation) * grey) * brightness * contrast * balance[:, None]
    offset = 0.45 * (1 - contrast)  # contrast pivots around the mean of indoor images
    affine = np.concatenate([matrix, np.full((3, 1), offset)], 1).astype(np.float32)
    out = cv2.transform(cv2.pow(np.clip(image, 0, 1), float(gamma)), affine)
    return np.clip(out, 0, 1, out=out)
