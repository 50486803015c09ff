"""The only things that pass between rooms: `Sample`, `Batch`, `Output`, `Prediction`.

Units and conventions, everywhere in the library:

* RGB is float in [0, 1]. Depth is metres along the optical axis, 0 where it is unknown.
* Labels are 0..C-1 of a `labels.LabelSpace`; 255 is ignored.
* A `Sample` and a `Prediction` hold numpy arrays, channels last, as files and viewers have them; a `Batch` and an
  `Output` hold tensors, channels first, as networks have them.
* A field that a data set or a task lacks is None.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from torch import Tensor

from enfilade.camera import Camera

IGNORE = 255


@dataclass(frozen=True, slots=True)
class LabelVolume:
    """A labelled volume in the world frame (Z up).

    `labels[i, j, k]` is the voxel whose corner lies at `origin + size * (i, k, j)`: the array's axes run along the
    world's X, Z (up) and Y, the order of the SSCNet files. 0 is empty, 255 is unknown.
    """

    labels: UInt8[np.ndarray, "x y z"]
    origin: Float[np.ndarray, "3"]  # metres, world
    size: float = 0.02  # metres


@dataclass(frozen=True, slots=True)
class Completion:
    """What a frame gives and asks of a completion network: `data.volumes.encode` makes it. Grid axes as of
    `ops.voxels`; the output grid is a quarter of the input grid along each axis."""

    tsdf: Float32[np.ndarray, "x y z"]  # flipped (ops.tsdf), of the input grid, 240 x 144 x 240
    volume: UInt8[np.ndarray, "i j k"] | None  # labels of the output grid, 60 x 36 x 60: 0 empty, 255 ignored
    scored: Bool[np.ndarray, "i j k"] | None  # where semantic scene completion is scored
    occluded: Bool[np.ndarray, "i j k"] | None  # where scene completion is scored
    voxels: Int32[np.ndarray, "h w"]  # each pixel's flat voxel of the output grid, -1 for none
    pixels: Int32[np.ndarray, "i j k"]  # each voxel's flat pixel, -1 out of view


@dataclass(frozen=True, slots=True)
class Sample:
    """One example as a reader gives it, at its native size."""

    image: Float32[np.ndarray, "h w 3"]
    name: str = ""
    labels: UInt8[np.ndarray, "h w"] | None = None
    depth: Float32[np.ndarray, "h w"] | None = None
    camera: Camera | None = None
    instances: Int32[np.ndarray, "h w"] | None = None
    normals: Float32[np.ndarray, "h w 3"] | None = None  # unit, camera frame, facing the camera; 0 where unknown
    hha: Float32[np.ndarray, "h w 3"] | None = None  # ops.hha.hha() / 255
    voxels: LabelVolume | None = None
    support: Float32[np.ndarray, "h w"] | None = None  # metres, 0 at void: ops.regions.region_support
    regions: Int32[np.ndarray, "h w"] | None = None  # ops.regions.regions: 1, 2, ...
    completion: "Completion | None" = None

    def replace(self, **changes) -> "Sample":
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one size, stacked."""

    image: Float[Tensor, "b 3 h w"]
    names: tuple[str, ...] = ()
    labels: Int64[Tensor, "b h w"] | None = None
    depth: Float[Tensor, "b h w"] | None = None
    hha: Float[Tensor, "b 3 h w"] | None = None
    cameras: tuple[Camera | None, ...] = ()
    support: Float[Tensor, "b h w"] | None = None
    regions: Int64[Tensor, "b h w"] | None = None
    tsdf: Float[Tensor, "b 1 x y z"] | None = None  # these six: `Completion`
    volume: Int64[Tensor, "b i j k"] | None = None
    scored: Bool[Tensor, "b i j k"] | None = None
    occluded: Bool[Tensor, "b i j k"] | None = None
    voxels: Int64[Tensor, "b h w"] | None = None
    pixels: Int64[Tensor, "b i j k"] | None = None
    taught: Float[Tensor, "b c _ _"] | None = None  # log-probabilities, told by `teachers`

    def __len__(self) -> int:
        return len(self.image)

    @property
    def has_depth(self) -> Bool[Tensor, "b"]:
        """Which samples carry depth supervision at all (semi-supervised depth: GAD Section 4.5)."""
        if self.depth is None:
            return torch.zeros(len(self.image), dtype=torch.bool, device=self.image.device)
        return (self.depth > 0).flatten(1).any(1)

    def to(self, device) -> "Batch":
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size. A field must be present in all samples or is None for all; depth alone may be
    missing from some, which then hold 0 everywhere (no supervision)."""

    def stack(field, dtype, missing=None) -> Any:
        values: list[Any] = [getattr(s, field) for s in samples]
        if all(v is None for v in values) or (missing is None and any(v is None for v in values)):
            return None
        values = [missing(s) if v is None and missing else v for v, s in zip(values, samples)]
        tensor = torch.from_numpy(np.stack(values)).to(dtype)
        return tensor.movedim(-1, 1).contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def encoded(field, dtype) -> Any:
        """A field of `Completion`."""
        values = [None if s.completion is None else getattr(s.completion, field) for s in samples]
        return None if any(v is None for v in values) else torch.from_numpy(np.stack(values)).to(dtype)  # type: ignore

    tsdf = encoded("tsdf", torch.float32)
    return Batch(
        image=stack("image", torch.float32),
        names=tuple(s.name for s in samples),
        labels=stack("labels", torch.int64),
        depth=stack("depth", torch.float32, missing=lambda s: np.zeros(s.image.shape[:2], np.float32)),
        hha=stack("hha", torch.float32),
        cameras=tuple(s.camera for s in samples),
        support=stack("support", torch.float32),
        regions=stack("regions", torch.int64),
        tsdf=None if tsdf is None else tsdf[:, None],
        volume=encoded("volume", torch.int64),
        scored=encoded("scored", torch.bool),
        occluded=encoded("occluded", torch.bool),
        voxels=encoded("voxels", torch.int64),
        pixels=encoded("pixels", torch.int64),
    )


def full(x: Tensor) -> Tensor:
    """At least fp32 (autocast hands over bf16); float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, slots=True)
class Output:
    """What a network returns. Each map may be smaller than the image, and has its own size."""

    logits: Float[Tensor, "b k h w"] | None = None
    depth: Float[Tensor, "b _ _"] | None = None  # metres
    side_logits: tuple[Float[Tensor, "b k _ _"], ...] = ()
    side_depths: tuple[Float[Tensor, "b _ _"], ...] = ()  # metres: what came before `depth`, in order
    depth_spread: Float[Tensor, "b _ _"] | None = None  # metres
    volume_logits: Float[Tensor, "b k _ _ _"] | None = None  # of the output grid
    side_volume_logits: tuple[Float[Tensor, "b k _ _ _"], ...] = ()
    sketch: Any = None  # `models.completion3d.Sketch`


@dataclass(frozen=True, slots=True)
class Prediction:
    """What `predict` returns for one image, at the image's own size."""

    image: Float32[np.ndarray, "h w 3"]
    labels: UInt8[np.ndarray, "h w"] | None = None
    depth: Float32[np.ndarray, "h w"] | None = None  # metres
    confidence: Float32[np.ndarray, "h w"] | None = None  # probability of the chosen label
    depth_spread: Float32[np.ndarray, "h w"] | None = None  # metres: standard deviation over the network's iterations
    camera: Camera | None = None
    camera_source: str = "assumed"  # "given", "exif" or "assumed"
    space: str = "nyu40"  # name of the label space
    name: str = ""

    @property
    def depth_confidence(self) -> Float32[np.ndarray, "h w"] | None:
        """How well the network's iterations agree on the depth: exp(-10 spread / depth), 1 where they are one and 0.37
        where they differ by a tenth. It orders pixels; it is no probability. None for a network without iterations."""
        if self.depth is None or self.depth_spread is None:
            return None
        return np.exp(-10 * self.depth_spread / np.maximum(self.depth, 1e-3)).astype(np.float32)

    def in_space(self, space: str) -> "Prediction":
        """The same with its labels in another label space; 255 where that has no counterpart."""
        if self.labels is None or space == self.space:
            return self
        from enfilade.labels import mapping

        return replace(self, labels=mapping(self.space, space)[self.labels], space=space)

    def show(self):
        """RGB | labels | depth with a legend, as a `PIL.Image` (shown by notebooks; `.show()` opens a viewer)."""
        from enfilade.viz import panel

        return panel(self)

    def points(self) -> tuple[Float32[np.ndarray, "n 3"], Float32[np.ndarray, "n 3"]]:
        """Points in metres in the camera frame (x right, y down, z forward) and their RGB colours."""
        from enfilade.viz import points

        return points(self)

    def save(self, folder, **options) -> list[str]:
        """Write label, depth, overlay, array and point files to `folder`; see `enfilade.outputs.save`."""
        from enfilade.outputs import save

        return save(self, folder, **options)
