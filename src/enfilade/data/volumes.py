"""From a frame with depth to what completion networks take and are scored on; and its mirror image.

* Song et al.: Semantic scene completion from a single depth image, CVPR 2017 (SSCNet: the grid, the encoding)
* Chen et al.: 3D sketch-aware semantic scene completion via semi-supervised structure prior, CVPR 2020 (TorchSSC: what
  is scored)

    sample = encode(open_dataset("ssc", "data")[0], space="ssc12", image_size=(240, 320))
    sample.completion.tsdf, sample.completion.volume, ...

The TSDF and the maps come from the depth map, the camera and the place of the grid; labels and masks from the volume.
Less than 0.1 s of one thread, so that it can be done anew in each epoch, after `mirror`. For one's own camera
`ops.voxels.place_grid` finds camera height, gravity and origin; `data.voxel_files` does that for files.
"""

from dataclasses import replace
from typing import Literal, no_type_check

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numba import njit

from enfilade import labels
from enfilade.errors import UserError, unknown
from enfilade.ops import tsdf as encoding
from enfilade.ops import voxels
from enfilade.ops.voxels import FACTOR, VoxelGrid
from enfilade.types import IGNORE, Completion, LabelVolume, Sample

Masks = Literal["torchssc", "sscnet"]
MASKS = ("torchssc", "sscnet")
_CLASSES = len(labels.SPACES["ssc12"])


def grid_of(sample: Sample) -> VoxelGrid:
    """The grid of a sample's label volume. Raises UserError without a volume or a camera with a pose."""
    if sample.voxels is None:
        raise UserError(
            f"{sample.name}: without a label volume the grid is not known: place one, ops.voxels.place_grid"
        )
    if sample.camera is None or sample.camera.pose is None:
        raise UserError(f"{sample.name}: a label volume needs the pose of the camera in its world")
    volume = sample.voxels
    x, y, z = volume.labels.shape
    return VoxelGrid(np.asarray(volume.origin, np.float64), sample.camera.pose, volume.size, (x, y, z))


def encode(
    sample: Sample,
    *,
    image_size: tuple[int, int] | None = None,
    space: str = "nyu40",
    grid: VoxelGrid | None = None,
    masks: Masks = "torchssc",
    threads: int = 1,
) -> Sample:
    """The sample with its `completion`, ssc12 labels, and all pictures at one size.

    The flipped TSDF is made from the depth map at its own size. Images are then resized to `image_size` (height, width;
    None: as they are), labels, depth and other maps by the nearest pixel, and the maps between pixels and voxels of the
    output grid are of the resized camera: a pixel's voxel is the one its point lies in, a voxel's pixel the one its
    centre falls on, hidden or not.

    Args:
        sample: with depth and camera; with `voxels` (ssc12) and a pose, or else with `grid`.
        image_size: height, width.
        space: label space of the pixels' labels, mapped to ssc12.
        grid: where to encode a sample that has no label volume; `volume`, `scored` and `occluded` are then None.
        masks: what is scored. "torchssc": known voxels in view that are full or occluded; of those, completion where no
            pixel's point lies (`ops.voxels.score_masks`). "sscnet": what is not free, that is in view and nearer to a
            surface than the truncation, or occluded; of those, completion where it is occluded. In the official script
            these volumes come without the code that made them: ours has a voxel where more than half of its parts are.
        threads: one, since loaders have processes.

    Raises UserError where depth, camera, pose or grid is missing, sizes do not fit, or a volume holds other labels."""
    if masks not in MASKS:
        raise unknown("rule for masks", masks, MASKS)
    if sample.depth is None or sample.camera is None:
        raise UserError(f"{sample.name}: completion needs depth and a camera")
    if grid is None:
        grid = grid_of(sample)
    elif sample.voxels is not None:
        raise UserError(f"{sample.name}: give a grid for samples without a label volume only: this one has its own")
    table = labels.mapping(space, "ssc12")
    tsdf = encoding.tsdf(sample.depth, sample.camera, grid, threads=threads)
    coarse, volume, scored, occluded = grid.coarse(), None, None, None
    if sample.voxels is not None:
        volume = voxels.downsample_labels(sample.voxels.labels, threads=threads)
        if wrong := set(np.unique(volume).tolist()) - {*range(_CLASSES), IGNORE}:
            raise UserError(f"{sample.name}: its volume holds label {min(wrong)}, expected ssc12: 0..11 and {IGNORE}")
        if masks == "torchssc":
            seen = encoding.visibility(sample.depth, sample.camera, grid, threads=threads)
            scored, occluded = torchssc_masks(volume, seen)
        else:
            scored, occluded = sscnet_masks(tsdf)
    sample = resized(sample, image_size)
    assert sample.depth is not None
    assert sample.camera is not None
    return sample.replace(
        labels=None if sample.labels is None else table[sample.labels],
        completion=Completion(
            tsdf=tsdf,
            volume=volume,
            scored=scored,
            occluded=occluded,
            voxels=voxels.pixel_voxels(sample.depth, sample.camera, coarse, threads=threads),
            pixels=voxels.voxel_pixels(sample.camera, coarse, at=0.5, threads=threads),
        ),
    )


def resized(sample: Sample, size: tuple[int, int] | None) -> Sample:
    """The sample's pictures at (height, width), the camera with them: colours and HHA by area or bilinearly, all other
    maps by the nearest pixel (that whose centre is nearest)."""
    if size is None or size == sample.image.shape[:2]:
        return sample
    height, width = size
    if min(size) < 1:
        raise UserError(f"an image size is a height and a width of at least 1, not {size}")
    shrinks = height <= sample.image.shape[0] and width <= sample.image.shape[1]
    smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    changes: dict = {}
    for field in ("image", "hha"):
        array = getattr(sample, field)
        changes[field] = None if array is None else cv2.resize(array, (width, height), interpolation=smooth)
    for field in ("labels", "depth", "instances", "normals", "support", "regions"):
        array = getattr(sample, field)
        changes[field] = (
            None if array is None else array[_nearest(array.shape[0], height)][:, _nearest(array.shape[1], width)]
        )
    camera = None if sample.camera is None else sample.camera.resized(width, height)
    return sample.replace(**changes, camera=camera)


def _nearest(source: int, target: int) -> np.ndarray:
    return np.minimum(((np.arange(target) + 0.5) * source / target).astype(np.intp), source - 1)


# ------------------------------------------------------------------------------------------------------ what is scored


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _torchssc(labels, states, factor, scored, occluded):
    full = factor * factor * factor
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            for k in range(labels.shape[2]):
                if labels[i, j, k] == 255:
                    continue
                outside = hidden = surface = 0
                for a in range(i * factor, (i + 1) * factor):
                    for b in range(j * factor, (j + 1) * factor):
                        for c in range(k * factor, (k + 1) * factor):
                            state = states[a, b, c]
                            outside += state == 0
                            surface += state == 2
                            hidden += state == 3
                if 2 * outside <= full and (labels[i, j, k] > 0 or 2 * hidden > full):
                    scored[i, j, k] = True
                    occluded[i, j, k] = surface == 0


def torchssc_masks(
    labels: UInt8[np.ndarray, "i j k"], visibility: UInt8[np.ndarray, "_ _ _"]
) -> tuple[Bool[np.ndarray, "i j k"], Bool[np.ndarray, "i j k"]]:
    """`scored` and `completion` of `ops.voxels.score_masks`, in one sweep: a tenth of its time. Raises UserError for
    sizes that do not fit."""
    factor = visibility.shape[0] // labels.shape[0]
    if factor < 1 or tuple(factor * n for n in labels.shape) != visibility.shape:
        raise UserError(f"visibility of {visibility.shape} voxels does not divide into labels of {labels.shape}")
    scored, occluded = np.zeros(labels.shape, bool), np.zeros(labels.shape, bool)
    _torchssc(labels, visibility, factor, scored, occluded)
    return scored, occluded


@njit(cache=True, nogil=True)
@no_type_check
def _sscnet(tsdf, factor, weakest, scored, occluded):
    full = factor * factor * factor
    for i in range(scored.shape[0]):
        for j in range(scored.shape[1]):
            for k in range(scored.shape[2]):
                near = hidden = 0
                for a in range(i * factor, (i + 1) * factor):
                    for b in range(j * factor, (j + 1) * factor):
                        for c in range(k * factor, (k + 1) * factor):
                            near += tsdf[a, b, c] > weakest
                            hidden += tsdf[a, b, c] < 0
                scored[i, j, k] = 2 * (near + hidden) > full
                occluded[i, j, k] = 2 * hidden > full


def sscnet_masks(
    tsdf: Float32[np.ndarray, "x y z"], factor: int = FACTOR
) -> tuple[Bool[np.ndarray, "_ _ _"], Bool[np.ndarray, "_ _ _"]]:
    """What SSCNet's official script scores, from a flipped TSDF: semantics where it is not free, completion where it is
    occluded (see `encode`). What is outside the room counts, as empty: `metrics_volume` with convention "sscnet"."""
    shape = tuple(n // factor for n in tsdf.shape)
    scored, occluded = np.empty(shape, bool), np.empty(shape, bool)
    _sscnet(tsdf, factor, np.float32(encoding.WEAKEST), scored, occluded)
    return scored, occluded


# --------------------------------------------------------------------------------------------------------- the mirror


def mirror(sample: Sample) -> Sample:
    """The sample as a mirror shows it: images and maps with their columns reversed, and the world likewise, along its X
    about the middle of the label volume (without one, about the camera). The camera stays a camera: its pose is that of
    the mirrored frame, right-handed. Twice gives the sample again, to rounding.

    Points, labels and maps stay true to each other. A `completion` that is there is mirrored too. Its TSDF then differs
    a little from that of the mirrored frame, because signs are taken at a voxel's lowest corner: mirror first, then
    encode, where both are the same work."""
    width = sample.image.shape[1]
    changes: dict = {}
    for field in ("image", "labels", "depth", "instances", "hha", "support", "regions"):
        array = getattr(sample, field)
        changes[field] = None if array is None else np.ascontiguousarray(array[:, ::-1])
    if sample.normals is not None:
        changes["normals"] = sample.normals[:, ::-1] * np.array([-1, 1, 1], np.float32)
    if sample.camera is not None:
        camera, pose = sample.camera, sample.camera.pose
        if pose is not None:
            middle = pose[0, 3]
            if (volume := sample.voxels) is not None:
                middle = volume.origin[0] + 0.5 * volume.size * volume.labels.shape[0]
            world = np.diag([-1.0, 1, 1, 1])
            world[0, 3] = 2 * middle
            pose = world @ pose @ np.diag([-1.0, 1, 1, 1])
        changes["camera"] = replace(camera, cx=camera.width - 1 - camera.cx, pose=pose)
    if (volume := sample.voxels) is not None:
        flipped = np.ascontiguousarray(volume.labels[::-1])
        changes["voxels"] = LabelVolume(flipped, volume.origin, volume.size)
    if (c := sample.completion) is not None:
        nx, ny, nz = c.pixels.shape
        row, column = np.divmod(c.pixels[::-1], width)
        plane, rest = np.divmod(c.voxels[:, ::-1], ny * nz)
        changes["completion"] = Completion(
            tsdf=np.ascontiguousarray(c.tsdf[::-1]),
            volume=None if c.volume is None else np.ascontiguousarray(c.volume[::-1]),
            scored=None if c.scored is None else np.ascontiguousarray(c.scored[::-1]),
            occluded=None if c.occluded is None else np.ascontiguousarray(c.occluded[::-1]),
            voxels=np.where(c.voxels[:, ::-1] < 0, -1, (nx - 1 - plane) * (ny * nz) + rest).astype(np.int32),
            pixels=np.where(c.pixels[::-1] < 0, -1, row * width + width - 1 - column).astype(np.int32),
        )
    return sample.replace(**changes)
