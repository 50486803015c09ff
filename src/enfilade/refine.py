"""The dense CRF after any network: sharper label maps from probabilities, the photo and, where it was measured, depth.

    enfilade.load("runs/mine", crf=True).predict("photo.jpg")    # after a model of ours; the default one has it on
    enfilade refine --labels-prob p.npy --image photo.jpg --depth kinect.png             # after anyone's

The kernels are those of Mousavian et al., Eq. (7): colour and place, estimated depth and place, place alone. Theirs are
the learned C x C weights (`models.joint_crf`); here every class counts alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from enfilade import images, viz
from enfilade.errors import UserError
from enfilade.labels import LabelSpace
from enfilade.ops.crf import Kernel, refine

REFERENCE = (480, 640)  # height, width of the image whose pixels the default kernels are in


@dataclass(frozen=True)
class CRF:
    """Kernels, in pixels of a 640x480 image (they grow with the square root of an image's area), colours of 0..255 and
    metres; a weight for each; iterations of mean field. Kernels that compare depth are left out where there is none.

    The defaults were chosen on 29 validation frames of NYUv2 for the default model (docs/experiments.md). They compare
    no depths: what a network tells of depth from the photo's colours adds nothing to them. `MEASURED` does."""

    kernels: tuple[Kernel, ...] = (Kernel(xy=80.0, rgb=8.0), Kernel(xy=3.0))
    weights: tuple[float, ...] = (4.0, 1.0)
    iterations: int = 5

    def __post_init__(self):
        if len(self.kernels) != len(self.weights):
            raise UserError(f"{len(self.kernels)} kernels take as many weights, not {len(self.weights)}")

    def __call__(
        self,
        probabilities: Float[Tensor, "b k _ _"],
        image: Float[Tensor, "b 3 h w"],
        depth: Float[Tensor, "b _ _"] | None = None,
    ) -> Float[Tensor, "b k h w"]:
        """Probabilities at the image's size. `image` is RGB in [0, 1], `depth` metres; probabilities and depth of other
        sizes are resized bilinearly."""
        h, w = size = image.shape[-2:]

        def resized(x: Tensor) -> Tensor:
            return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)

        ratio = math.sqrt(h * w / (REFERENCE[0] * REFERENCE[1]))
        chosen = [(k, w) for k, w in zip(self.kernels, self.weights) if depth is not None or k.depth is None]
        kernels = [Kernel(xy=k.xy * ratio, rgb=k.rgb, depth=k.depth) for k, _ in chosen]
        depth = None if depth is None else resized(depth[:, None].float())[:, 0]
        return refine(
            resized(probabilities.float()),
            image.float(),
            depth,
            kernels=kernels,
            weights=[w for _, w in chosen],
            iterations=self.iterations,
        )

    def describe(self) -> str:
        """Kernels, weights and iterations in one line, for a report."""
        kernels = []
        for kernel, weight in zip(self.kernels, self.weights):
            theta = {"xy": kernel.xy, "rgb": kernel.rgb, "depth": kernel.depth}
            kernels.append(f"{weight:g} x (" + ", ".join(f"{k} {v:g}" for k, v in theta.items() if v is not None) + ")")
        return f"{self.iterations} iterations of " + " + ".join(kernels)


# For depth that a camera has measured
MEASURED = CRF((Kernel(xy=80.0, rgb=8.0), Kernel(xy=100.0, depth=0.2), Kernel(xy=3.0)), (4.0, 1.0, 1.0))


def read_probabilities(path: str | Path, classes: int | None = None) -> Float32[np.ndarray, "k h w"]:
    """Class probabilities from a .npy file, or an .npz file that holds one array or one called "probabilities":
    k h w or h w k, whichever axis `classes` fits (without it, the one along which they sum to 1).

    Raises:
        UserError: no such file, no such array, or not probabilities.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no probabilities at {path}: give a .npy or .npz file")
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            names = list(found.keys())
            if "probabilities" not in names and len(names) != 1:
                raise UserError(f"{path} holds {', '.join(names) or 'nothing'}: call the array 'probabilities'")
            found = found["probabilities" if "probabilities" in names else names[0]]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no readable .npy or .npz file: {error}") from error
    if found.ndim != 3 or found.dtype.kind not in "fiu" or 0 in found.shape:
        raise UserError(f"{path} holds {found.dtype} of {found.shape}: probabilities are k h w, or h w k")
    if classes is None:
        first = np.allclose(found.sum(0, dtype=np.float32), 1, atol=0.02)
    else:
        first = found.shape[0] == classes
    found = np.ascontiguousarray(found if first else found.transpose(2, 0, 1), np.float32)
    if classes is not None and len(found) != classes:
        raise UserError(f"{path} holds {found.shape}, and neither its first nor its last axis has {classes} classes")
    if not np.isfinite(found).all() or found.min() < 0:
        raise UserError(f"{path} holds NaN, infinite or negative numbers: give probabilities, not logits")
    total = found.sum(0)
    if not np.allclose(total, 1, atol=0.02):
        raise UserError(f"the classes in {path} sum to {total.min():.3g} to {total.max():.3g} a pixel, not to 1")
    return found


def refine_files(
    probabilities: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    depth: str | Path | None = None,
    space: LabelSpace | None = None,
    crf: CRF | None = None,
    files: Sequence[str] = ("labels", "overlay", "arrays"),
) -> list[str]:
    """Refine one image's probabilities and write `<image>.labels.png`, `<image>.overlay.png` and `<image>.npz` (labels,
    confidence, probabilities) to the folder `out`; returns their paths. `depth` is a 16-bit PNG in millimetres, 0
    unknown, as `predict` writes it; the default CRF is then `MEASURED`.

    Raises:
        UserError: what cannot be read, or does not fit together.
    """
    photo = images.read(image)
    scores = read_probabilities(probabilities, None if space is None else len(space))
    metres = None if depth is None else torch.from_numpy(read_depth(depth, photo.rgb.shape[:2]))[None]
    rgb = torch.from_numpy(np.ascontiguousarray(photo.rgb.transpose(2, 0, 1)))[None]
    crf = crf or (CRF() if metres is None else MEASURED)
    refined = crf(torch.from_numpy(scores)[None], rgb, metres)[0].numpy()
    labels, confidence = refined.argmax(0).astype(np.uint8), refined.max(0)
    folder, stem = images.make_folder(out), Path(image).stem
    written = []
    if "labels" in files:
        written.append(folder / f"{stem}.labels.png")
        images.write_png(written[-1], labels)
    if "overlay" in files and space is not None:
        written.append(folder / f"{stem}.overlay.png")
        images.write_png(written[-1], viz.overlay(photo.rgb, labels, space))
    if "arrays" in files:
        written.append(folder / f"{stem}.npz")
        arrays = {"labels": labels, "confidence": confidence, "probabilities": refined}
        images.write_atomic(written[-1], lambda file: np.savez(file, **arrays))
    return [str(path) for path in written]


def read_depth(path: str | Path, size: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """Metres from a 16-bit PNG in millimetres, resized to `size` (nearest). Unknown pixels (0) take the nearest known
    depth, since the CRF compares all."""
    path = Path(path)
    found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
    if found is None or found.ndim != 2 or found.dtype != np.uint16:
        raise UserError(f"no 16-bit depth image at {path}: give a PNG in millimetres, as enfilade predict writes it")
    if not found.any():
        raise UserError(f"{path} holds no depth: every pixel is 0")
    metres = cv2.resize(found, size[::-1], interpolation=cv2.INTER_NEAREST).astype(np.float32) / 1000
    if (metres == 0).any():
        _, nearest = cv2.distanceTransformWithLabels(
            (metres == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        known = np.zeros(nearest.max() + 1, np.float32)
        known[nearest[metres > 0]] = metres[metres > 0]
        metres = known[nearest]
    return metres
