"""From a frame to the room behind it: what `enfilade complete`, training and scoring call.

    completer = load("sscnet-rooms")
    room = completer.complete(image, depth, camera)  # or without depth: the default model's
    room.volume, room.labels, room.observed

A network answers for a grid of voxels in the world (`ops.voxels`). Where the grid lies is known for data sets, and
found from depth and gravity for anyone's camera (`ops.voxels.place_grid`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from numba import njit
from torch import nn

from enfilade import images, labels
from enfilade.camera import Camera
from enfilade.data.volumes import encode
from enfilade.errors import UserError
from enfilade.hub import OnHub
from enfilade.metrics import SegmentationScore
from enfilade.metrics_volume import CompletionScore
from enfilade.ops import tsdf as encoding
from enfilade.ops.decide import decide
from enfilade.ops.voxels import VoxelGrid, pixel_voxels, place_grid
from enfilade.shipped import COMPLETION
from enfilade.types import IGNORE, LabelVolume, Output, Prediction, Sample, collate

SPACE = "ssc12"
BEHIND = 0.4  # metres behind a wall, beyond which nothing is judged


@dataclass(frozen=True, slots=True)
class Room:
    """What a completion says of a frame.

    `volume` holds ssc12 labels at 8 cm in the world frame (Z up): 0 is empty, 255 was not judged, being out of view or
    behind the room's walls, of which networks learn nothing.
    `observed` are the voxels that the depth map touches; all other full ones are completed. `confidence` is the
    probability of the label. `labels` are the image's, if the network has a 2-D branch.
    """

    volume: LabelVolume
    observed: Bool[np.ndarray, "i j k"]
    confidence: Float32[np.ndarray, "i j k"]
    image: Float32[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    depth_source: str  # "given" or the model that estimated it
    camera: Camera  # with its pose in the world
    grid: VoxelGrid  # that of the TSDF, 2 cm
    camera_source: str
    labels: UInt8[np.ndarray, "h w"] | None = None
    name: str = ""
    seconds: float = 0.0


@torch.inference_mode()
def infer(network: nn.Module, sample: Sample, device: torch.device) -> Output:
    """A network's answer to one encoded sample (`data.volumes.encode`), in fp32.

    Raises:
        UserError: the sample lacks something that the network takes.
    """
    batch = collate([sample]).to(device)
    more = {name: getattr(batch, name) for name in getattr(network, "uses", ())}
    if missing := [name for name, value in more.items() if value is None]:
        raise UserError(f"{sample.name} has no {missing[0]}, which this network takes: score it on other data")
    return network(batch.image, **more)


class Completer(OnHub):
    """A completion network ready to use; `meta` is its file's header (see `checkpoint`)."""

    def __init__(self, network: nn.Module, meta: dict[str, Any], *, device: str | torch.device | None = None):
        from enfilade.predict import _device

        self.device = _device(device)
        self.meta = meta
        height, width = meta.get("size", (240, 320))
        self.size = int(height), int(width)
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore
        if needs := {"labels", "volume"} & set(getattr(network, "uses", ())):
            raise_truth(needs)

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
    ) -> "Completer":
        """A completer from a shipped model's name, a file or folder, or a repository "user/name" of the Hugging Face
        hub. Raises UserError, see `hub.locate` and `load`."""
        from enfilade import hub

        return load(hub.locate(name_or_path, revision=revision, token=token), device)

    def complete(
        self,
        source: images.Source,
        depth: Float[np.ndarray, "h w"] | None = None,
        camera: Camera | None = None,
        *,
        grid: VoxelGrid | None = None,
        gravity: Sequence[float] | Float[np.ndarray, "3"] | None = None,
        height: float | None = None,
        fov: float | None = None,
        estimator: Any = None,
    ) -> Room:
        """Complete one frame.

        Args:
            source: an image, anything `images.read` takes.
            depth: metres of each pixel, 0 or not finite where unknown; None: estimated by `estimator`, a predictor of
                labels and depth (default: the default model). It also labels the pixels for networks of depth alone.
            camera: the image's; None: from the field of view `fov` in degrees, EXIF, or assumed, see `predict`.
            grid: where the voxels lie; None: placed by `gravity`, the direction of down in the camera frame, or by the
                floor that is seen, and by the camera's `height` above it, see `place_grid`.

        Raises:
            UserError: an image that cannot be read, sizes that do not fit, a depth map that is empty.
        """
        start = time.perf_counter()
        image = images.read(source)
        told: Prediction | None = None
        if depth is None or camera is None:
            estimator = estimator or default()
            told = estimator.predict(image, camera=camera, fov=fov)
            assert told is not None
            assert told.camera is not None
            camera = told.camera if camera is None else camera
        chosen = told.depth if depth is None and told is not None else depth
        if chosen is None:
            raise UserError("completion needs depth, and the estimator gives none: take a model that does")
        metres = np.where(np.isfinite(chosen) & (chosen > 0), chosen, 0).astype(np.float32)
        if not metres.any():
            raise UserError(f"{image.name}: its depth map holds no depth at all: give one in metres")
        if metres.shape != image.rgb.shape[:2]:
            image_size = f"{image.rgb.shape[1]} x {image.rgb.shape[0]}"
            raise UserError(f"the depth map is {metres.shape[1]} x {metres.shape[0]} pixels, the image {image_size}")
        if (camera.width, camera.height) != metres.shape[::-1]:
            camera = camera.resized(*metres.shape[::-1])
        if grid is None:
            down = None if gravity is None else np.asarray(gravity, np.float64)
            grid = place_grid(metres, camera, down, height=height)
        placed = Camera(camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height, grid.pose)
        sample = Sample(image=image.rgb, name=image.name, depth=metres, camera=placed)
        encoded = encode(sample, image_size=self.image_size(*metres.shape), space=SPACE, grid=grid, threads=threads())
        output = infer(self.network, encoded, self.device)
        assert output.volume_logits is not None
        probabilities = output.volume_logits[0].float().softmax(0)
        confidence, best = (x.cpu().numpy() for x in probabilities.max(0))
        visible = encoding.visibility(metres, placed, grid, threads=threads())
        answer = best.astype(np.uint8)
        coarse = grid.coarse()
        factor = visible.shape[0] // coarse.shape[0]
        blocks = visible.reshape(*(n for c in coarse.shape for n in (c, factor)))
        outside, free, surface = ((blocks == state).sum((1, 3, 5)) for state in (0, 1, 2))
        answer[(2 * free > factor**3) & (surface == 0)] = 0  # seen to be empty, which training leaves out
        answer[2 * outside > factor**3] = IGNORE
        seen = pixel_voxels(metres, placed, coarse, threads=threads())
        touched = np.zeros(answer.size, bool)
        touched[seen[seen >= 0]] = True
        observed = touched.reshape(answer.shape)
        answer[behind_walls(answer, coarse) & ~observed] = IGNORE
        found = None
        if output.logits is not None:
            found = pixels(output, *metres.shape)
        else:  # a network of depth alone says nothing of the pixels
            seen_as: Prediction = told or (estimator or default()).predict(image, camera=camera)
            found = seen_as.in_space(SPACE).labels if (seen_as.space, SPACE) in labels.MAPPINGS else None
        return Room(
            volume=LabelVolume(answer, coarse.origin, coarse.size),
            observed=observed,
            confidence=confidence.astype(np.float32),
            image=image.rgb,
            depth=metres,
            depth_source="given" if depth is not None else str(estimator.meta.get("recipe", "estimated")),
            camera=placed,
            grid=grid,
            camera_source="given" if told is None else told.camera_source,
            labels=found,
            name=image.name,
            seconds=time.perf_counter() - start,
        )

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the network sees an image: the aspect ratio kept, the area that of training."""
        factor = (self.size[0] * self.size[1] / (height * width)) ** 0.5
        return max(32, round(height * factor)), max(32, round(width * factor))


@lru_cache(maxsize=1)
def default() -> Any:
    """The default predictor: of depth where none is given, of labels where the network gives none."""
    from enfilade.predict import load as load_predictor

    return load_predictor()


def pixels(output: Output, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
    """The likeliest class of each pixel of an image of that size, never "empty"."""
    assert output.logits is not None
    probabilities = output.logits[0].float().softmax(0).cpu().numpy()
    probabilities[0] = 0
    return decide(probabilities, height, width)[0]


def describe(room: Room) -> dict[str, Any]:
    """Plain numbers and strings about a room: voxels seen and completed, litres of each class, largest first."""
    full = (room.volume.labels > 0) & (room.volume.labels != IGNORE)
    names = labels.get(SPACE).names
    counts = np.bincount(room.volume.labels[full], minlength=len(names))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return {
        "name": room.name,
        "observed": int((full & room.observed).sum()),
        "completed": int((full & ~room.observed).sum()),
        "litres": {names[k]: round(float(counts[k] * (10 * room.volume.size) ** 3), 1) for k in order},
        "depth_source": room.depth_source,
        "camera_source": room.camera_source,
        "camera_height": float(room.grid.pose[2, 3]),
        "seconds": room.seconds,
    }


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _behind(labels, structure, camera, limit, out):
    nx, ny, nz = labels.shape
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                if labels[i, j, k] == 0 or labels[i, j, k] == 255:
                    continue
                x, y, z = i + 0.5 - camera[0], j + 0.5 - camera[1], k + 0.5 - camera[2]
                length = np.sqrt(x * x + y * y + z * z)
                steps = int(2 * length)
                for s in range(steps):
                    t = s / (2 * length)
                    a, b, c = (
                        int(np.floor(camera[0] + t * x)),
                        int(np.floor(camera[1] + t * y)),
                        int(np.floor(camera[2] + t * z)),
                    )
                    if 0 <= a < nx and 0 <= b < ny and 0 <= c < nz and structure[labels[a, b, c]]:
                        out[i, j, k] = (1 - t) * length > limit
                        break


def behind_walls(labels_: UInt8[np.ndarray, "i j k"], grid: VoxelGrid) -> Bool[np.ndarray, "i j k"]:
    """The full voxels that lie more than 0.4 m behind the first ceiling, floor, wall or window on the straight line
    from the camera to them. Data sets call such voxels unknown, so that networks say anything there."""
    structure = np.zeros(256, bool)
    structure[[labels.get(SPACE).names.index(name) for name in ("ceiling", "floor", "wall", "window")]] = True
    camera = ((grid.pose[:3, 3] - grid.origin) / grid.size)[[0, 2, 1]]
    out = np.zeros(labels_.shape, bool)
    _behind(labels_, structure, camera, BEHIND / grid.size, out)
    return out


def raise_truth(needs) -> None:
    raise UserError(
        f"this network is told the true {' and '.join(sorted(needs))}: it is an upper bound, to be scored, not used"
    )


def threads() -> int:
    return torch.get_num_threads()


def load(model: str | Path = COMPLETION, device: str | torch.device | None = None) -> Completer:
    """A completer from a shipped model's name, a model file or a run's folder. Raises UserError, see `checkpoint.load`,
    and for a model that completes nothing."""
    from enfilade.checkpoint import load as load_checkpoint

    loaded = load_checkpoint(model)
    if "tsdf" not in getattr(loaded.network, "uses", ()):
        raise UserError(
            f"{model} completes no rooms: take {COMPLETION}, imenet-rooms, or a model trained by an imenet recipe"
        )
    return Completer(loaded.network, loaded.meta, device=device)


# --- scoring ----------------------------------------------------------------------------------------------------------


def score(
    network: nn.Module,
    meta: dict[str, Any],
    reader,
    *,
    convention: str = "torchssc",
    iterations: int | None = None,
    limit: int | None = None,
    quiet: bool = False,
    device: str | torch.device | None = None,
    on_frame: Callable[[int, Sample, Output], None] | None = None,
) -> dict[str, Any]:
    """Complete every sample of a reader with label volumes, and score it; see `metrics_volume` for the conventions.

    Args:
        network, meta: as `checkpoint.load` returns them.
        iterations: of an IMENet, instead of its own (Figure 9).
        limit: score only the first so many samples (said in the result).
        on_frame: called after each frame with the encoded sample and the network's answer.

    Returns: {"completion": ..., "segmentation": ..., "protocol": ...}; "segmentation" are the image's labels at the
    truth's own size, where the network has a 2-D branch and the data labels.
    """
    from enfilade.report import progress

    place = torch.device(device or "cpu")
    network = network.eval().to(place)
    height, width = meta.get("size", (240, 320))
    space = labels.get(SPACE)
    kept = getattr(network, "iterations", None)
    if iterations is not None:
        if kept is None:
            raise UserError("this network has no iterations to set")
        network.iterations = iterations  # type: ignore[assignment]
    completion, segmentation = CompletionScore(convention), SegmentationScore(space.names, (0,))
    count = len(reader) if limit is None else min(limit, len(reader))
    if count == 0:
        raise UserError(f"nothing to score: {reader.name} has no samples in this split")
    table = labels.mapping(reader.space.name, SPACE)
    seen_labels = False
    begun = time.perf_counter()
    masks = "sscnet" if convention == "sscnet" else "torchssc"
    try:
        for i in progress(range(count), "scoring", quiet):
            sample = reader[i]
            encoded = encode(
                sample, image_size=(int(height), int(width)), space=reader.space.name, masks=masks, threads=threads()
            )
            output = infer(network, encoded, place)
            truth = encoded.completion
            if truth is None or truth.volume is None or truth.scored is None or truth.occluded is None:
                raise UserError(f"nothing to score: {sample.name} has no label volume")
            assert output.volume_logits is not None
            answer = output.volume_logits[0].argmax(0).cpu().numpy()
            completion.update(answer, truth.volume, truth.scored, truth.occluded)
            if sample.labels is not None and output.logits is not None:
                seen_labels = True
                segmentation.update(pixels(output, *sample.labels.shape), table[sample.labels])
            if on_frame is not None:
                on_frame(i, encoded, output)
    finally:
        if iterations is not None:
            network.iterations = kept  # type: ignore[assignment]
    result: dict[str, Any] = {
        "completion": completion.compute(),
        "protocol": {
            "data": reader.name,
            "frames": count,
            "of": len(reader),
            "convention": convention,
            "iterations": iterations or kept,
            "seconds_per_frame": (time.perf_counter() - begun) / count,
        },
    }
    if seen_labels:
        result["segmentation"] = segmentation.compute()
    return result
