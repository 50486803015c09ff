"""From a photo to labels, metric depth and a coloured point cloud: what the command line and the server call.

    predictor = enfilade.load()
    prediction = predictor.predict("photo.jpg")

The network sees every image at the scale it was trained on: resized, keeping the aspect ratio, to the *area* of its
training input (other scales, windows and mirror images: `tta`). Its depth is that of a canonical camera, whose focal
length at the network's input is `meta["focal"]` pixels; a real camera of f_input pixels there sees everything
f_input / focal times farther. So metres need a camera: given, or from EXIF, or else assumed to be the canonical one,
and the prediction says which.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from enfilade import checkpoint, images, labels, tta
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.hub import OnHub
from enfilade.ops.decide import decide
from enfilade.ops.regions import region_support
from enfilade.shipped import DEFAULT, GUIDE
from enfilade.types import Output, Prediction

if TYPE_CHECKING:
    from enfilade.refine import CRF

# What a model file that lacks a key is taken to mean: NYUv2's label space, and its camera at 320 x 240.
DEFAULTS = {"space": "nyu40", "size": (240, 320)}
NYU_FOCAL, NYU_WIDTH = 518.8579, 640

# What a network may take beside RGB: channels, and what to do where it is missing.
PLANES = {
    "hha": (3, "HHA beside RGB: give hha, made from depth by enfilade.ops.hha"),
    "support": (1, "region support beside RGB: give support, made by enfilade.ops.regions, or a guide to predict it"),
    "labels": (1, "labels beside RGB: give labels, or a guide to predict them"),
}
MIN_SIDE = 32  # of the network's input, for images of extreme shape


class Predictor(OnHub):
    """A network ready to predict. `meta` is its file's header (see `checkpoint`): "space", "size" (height, width of
    the input in training) and "focal" (pixels at that width), each with a default; and "scale" (source pixels to
    network pixels in training), which resolution="source" needs; and "crf", whether its labels are refined.

    `flip` averages probabilities and depth over the image and its mirror image, at twice the time. `scales` are the
    factors of the training scale at which the network sees the image, to be averaged. `window` covers the image by
    windows of a size, (height, width) in network pixels, "WIDTHxHEIGHT", or a factor of the training input, which
    share `overlap` of their sides; their answers are blended. With `resolution` "source" the training scale is a
    factor of the image's own pixels, not the area of the training input. See `tta.Augmentation`.

    `also` are further predictors of the same labels, of RGB alone. They see the same image, each at its own size, and
    answer together, each counting alike (`tta.together`): better than any of them, in the time of all.

    `crf` refines the labels by the photo's colours before they are chosen: True, a `refine.CRF` with other settings, or
    False; None does what `meta` says, which is no CRF where it says nothing. It stands behind all networks that answer,
    and takes the place of one that a network ends in.

    A network that is guided by region support or by labels (RSN's refinement alone) is given them with each image, or
    takes them from `guide`, a predictor of both labels and depth.

    `precision` is "fp32", "bf16" or "auto": bf16 on a GPU, fp32 on a CPU. `device` defaults to a GPU where there is
    one.
    """

    def __init__(
        self,
        network: nn.Module,
        meta: dict[str, Any] | None = None,
        *,
        device: str | torch.device | None = None,
        flip: bool = True,
        scales: Sequence[float] = (1.0,),
        window: float | str | Sequence[int] | None = None,
        overlap: float = 0.5,
        resolution: tta.Resolution = "area",
        precision: Literal["fp32", "bf16", "auto"] = "auto",
        crf: "bool | CRF | None" = None,
        guide: "Predictor | None" = None,
        also: Sequence["Predictor"] = (),
    ):
        if precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"precision is fp32, bf16 or auto, not {precision!r}")
        self.device = _device(device)
        self.meta = DEFAULTS | (meta or {})
        self.augmentation = tta.Augmentation(flip, scales, window, overlap, resolution)
        self.precision = precision
        self.crf, self.guide = None, guide
        if crf if crf is not None else self.meta.get("crf"):
            from enfilade.refine import CRF

            self.crf = crf if isinstance(crf, CRF) else CRF()
        self.space = labels.get(self.meta["space"])
        if guide is not None and guide.space.name != self.space.name:
            raise UserError(
                f"the guide answers in {guide.space.name}, this model wants {self.space.name}: take another"
            )
        for other in also:
            if other.space.name != self.space.name:
                raise UserError(
                    f"of two models to be averaged, one answers in {self.space.name}, one in {other.space.name}: "
                    "take models of the same labels"
                )
            if uses := getattr(other.network, "uses", ()):
                raise UserError(f"a model that is averaged with another sees RGB alone, and one takes {uses[0]} too")
        self.also = tuple(also)
        height, width = self.meta["size"]
        self.area = int(height * width)
        self.window = self.augmentation.window_size((height, width))
        if resolution == "source" and not self.meta.get("scale"):
            raise UserError("this model's file does not tell its training scale: leave resolution=source out")
        self.focal = float(self.meta.get("focal") or NYU_FOCAL * width / NYU_WIDTH)
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
    ) -> "Predictor":
        """A predictor from a shipped model's name, a file or folder, or a repository "user/name" of the Hugging Face
        hub; `options` are those of `load`. Raises UserError, see `hub.locate`."""
        from enfilade import hub

        return load(hub.locate(name_or_path, revision=revision, token=token), **options)

    def __call__(self, source: images.Source, *, camera: Camera | None = None, fov: float | None = None) -> Prediction:
        return self.predict(source, camera=camera, fov=fov)

    def predict(
        self,
        source: images.Source,
        *,
        camera: Camera | None = None,
        fov: float | None = None,
        hha: Float32[np.ndarray, "h w 3"] | None = None,
        support: Float32[np.ndarray, "h w"] | None = None,
        labels: UInt8[np.ndarray, "h w"] | None = None,
    ) -> Prediction:
        """Predict on one image: anything `images.read` takes. The camera is `camera` (of this image, upright; one of
        another size but the same shape is resized), or has the horizontal field of view `fov` in degrees, or comes
        from EXIF, or is assumed. A network trained with HHA input also takes `hha`, of the image's shape, in [0, 1]
        (`ops.hha.hha(depth, camera) / 255`), a region support network `support` (metres, `ops.regions`) or `labels`,
        as it was trained. Raises UserError for an image that cannot be read or a camera that does not fit."""
        given = {"hha": hha, "support": support, "labels": labels}
        return self.batch([source], camera=camera, fov=fov, given=[{k: v for k, v in given.items() if v is not None}])[
            0
        ]

    def batch(
        self,
        sources: Sequence[images.Source],
        *,
        camera: Camera | None = None,
        fov: float | None = None,
        given: Sequence[dict[str, np.ndarray]] | None = None,
        batch_size: int = 8,
    ) -> list[Prediction]:
        """Predict on several images of any sizes, in order; neighbours of one shape go through the network together,
        at most `batch_size` at once. All are held in memory: for many files, use `stream` or `predict_many`. `given`
        holds each image's further maps, as `predict` names them; all images have the same ones."""
        read = [images.read(source) for source in sources]
        placed = [self._camera(image, camera, fov) for image in read]
        # Each network and scale; the largest scale first, since the others join its grid
        views = [(p, s) for p in (self, *self.also) for s in sorted(p.augmentation.scales, reverse=True)]
        inputs = [[member.prepare(image.rgb, scale) for member, scale in views] for image in read]
        maps = [self.guidance(i, p[0], own) for i, p, own in zip(read, placed, given or [{}] * len(read))]
        more = tuple(maps[0]) if maps else ()
        for seen, (own_camera, _), own in zip(inputs, placed, maps):
            planes = [[p.plane(name, own[name], own_camera, s) for name in more if p is self] for p, s in views]
            seen[:] = [np.concatenate([rgb, *extra]) for rgb, extra in zip(seen, planes)]
        shapes = [image.rgb.shape for image in read]
        sizes = [[p.input_size(height, width, s) for p, s in ((self, 1.0), *views)] for height, width, _ in shapes]
        at_once = batch_size if self.window is None else 1  # windows come in batches of their own
        predictions = []
        while len(predictions) < len(inputs):
            first = len(predictions)
            last = first + 1
            while last < min(len(inputs), first + at_once) and sizes[last] == sizes[first]:
                last += 1
            stacked = (torch.from_numpy(np.stack(seen)) for seen in zip(*inputs[first:last]))
            (h, w), *each = sizes[first]
            # From a view's canonical camera to that of this predictor at scale 1
            factors = [math.sqrt(h2 * w2 / (h * w)) * self.focal / p.focal for (h2, w2), (p, _) in zip(each, views)]
            answers = (p.infer(seen, more if p is self else ()) for seen, (p, _) in zip(stacked, views))
            output = (tta.together if self.also else tta.average)(zip(answers, factors))
            predictions += [self._finish(read[i], *placed[i], output, i - first) for i in range(first, last)]
        return predictions

    def stream(
        self, sources: Iterable[images.Source], *, camera: Camera | None = None, fov: float | None = None
    ) -> Iterator[Prediction | UserError]:
        """Predict one image after the other, reading the next while the network runs. In the place of an image that
        cannot be read or does not fit its camera comes the error, and the rest follow."""

        def load(source):
            try:
                return images.read(source)
            except UserError as error:
                return error

        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for source in sources:
                ahead = pool.submit(load, source)
                if waiting is not None:
                    yield self._try(waiting.result(), camera, fov)
                waiting = ahead
            if waiting is not None:
                yield self._try(waiting.result(), camera, fov)

    def _try(self, image: images.Image | UserError, camera: Camera | None, fov: float | None) -> Prediction | UserError:
        try:
            return image if isinstance(image, UserError) else self.predict(image, camera=camera, fov=fov)
        except UserError as error:
            return error

    def input_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width at which the network sees an image: the aspect ratio kept, the sides `scale` times those of
        the area of training (with resolution "source", of the image in the training's network pixels). No side is
        below 32, which distorts images more than 75 times as long as wide (at 320 x 240)."""
        if self.augmentation.resolution == "source":
            area = height * width * float(self.meta["scale"]) ** 2
        else:
            area = self.area
        factor = math.sqrt(area / (height * width)) * scale
        low, high = MIN_SIDE, max(MIN_SIDE, int(area * scale**2) // MIN_SIDE)
        return min(max(round(height * factor), low), high), min(max(round(width * factor), low), high)

    def prepare(self, rgb: Float32[np.ndarray, "h w 3"], scale: float = 1.0) -> Float32[np.ndarray, "3 h2 w2"]:
        """The network's input: averaged over areas when it shrinks, interpolated when it grows."""
        height, width = self.input_size(rgb.shape[0], rgb.shape[1], scale)
        how = cv2.INTER_AREA if height * width < rgb.shape[0] * rgb.shape[1] else cv2.INTER_LINEAR
        return np.ascontiguousarray(cv2.resize(rgb, (width, height), interpolation=how).transpose(2, 0, 1))

    def guidance(self, image: images.Image, camera: Camera, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the network takes beside this image: what is given, and what it needs beyond that from the guide.

        Raises:
            UserError: it needs something that nobody gives; a map of another size than the image.
        """
        maps = dict(given)
        for name in getattr(self.network, "uses", ()):
            if name in maps:
                continue
            if self.guide is None or name == "hha":
                raise UserError(f"this model takes {PLANES[name][1]}")
            told = self.guide.predict(image.rgb, camera=camera)
            if told.labels is None or told.depth is None:
                raise UserError(f"a guide answers with labels and depth, and this one lacks one of them: take {GUIDE}")
            maps[name] = told.labels if name == "labels" else region_support(told.labels, told.depth)
        for name, value in maps.items():
            if value.shape[:2] != image.rgb.shape[:2]:
                raise UserError(
                    f"{image.name}: {name} is {value.shape[1]} x {value.shape[0]} pixels, the image "
                    f"{image.rgb.shape[1]} x {image.rgb.shape[0]}: give them at one size"
                )
        return maps

    def plane(self, name: str, value: np.ndarray, camera: Camera, scale: float) -> Float32[np.ndarray, "k h2 w2"]:
        """A map as the network takes it beside RGB: HHA like colours; labels and region support by nearest neighbour,
        the latter in metres of the canonical camera."""
        if name == "hha":
            return self.prepare(value, scale)
        height, width = self.input_size(value.shape[0], value.shape[1], scale)
        rows = ((np.arange(height) + 0.5) * (value.shape[0] / height)).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * (value.shape[1] / width)).astype(np.int64)
        value = value[rows[:, None], columns].astype(np.float32)
        return (value / np.float32(self.zoom(camera, height, width)) if name == "support" else value)[None]

    def zoom(self, camera: Camera, height: int, width: int) -> float:
        """Metres to a metre of the canonical camera, for an image that the network sees at this size."""
        seen = camera.resized(width, height)
        return math.sqrt(seen.fx * seen.fy) / self.focal

    @torch.inference_mode()
    def infer(self, image: Float[Tensor, "b c h w"], more: tuple[str, ...] = ()) -> Output:
        """Class probabilities (in `logits`) and canonical depth of one scale, on the network's own grid or that of
        `tta.slide`: blended over windows, averaged over the image and its mirror image, where the predictor has them.
        `image` is RGB, followed by the maps named in `more`, keys of `PLANES`."""
        image = image.to(self.device)
        if self.augmentation.flip:
            image = torch.cat([image, image.flip(-1)])
        if self.window is None:
            output = self._forward(image, more)
        else:
            output = tta.slide(partial(self._forward, more=more), image, self.window, self.augmentation.overlap)
        if not self.augmentation.flip:
            return output
        answers = output.logits, output.depth, output.depth_spread
        probabilities, depth, spread = (x if x is None else tta.unflip(x) for x in answers)
        return Output(logits=probabilities, depth=depth, depth_spread=spread)

    def _forward(self, image: Float[Tensor, "b c h w"], more: tuple[str, ...] = ()) -> Output:
        """The network's answer, in fp32 and checked, with probabilities for logits."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and self.device.type == "cuda")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            rgb, *planes = image.split([3, *(PLANES[name][0] for name in more)], 1)
            named = {name: plane if name == "hha" else plane[:, 0] for name, plane in zip(more, planes)}
            if "labels" in named:
                named["labels"] = named["labels"].long()
            output = self.network(rgb.contiguous(memory_format=torch.channels_last), **named)
        probabilities, depth, spread = output.logits, output.depth, None
        if probabilities is not None:
            if probabilities.shape[1] != len(self.space.names):
                raise UserError(
                    f"the network has {probabilities.shape[1]} classes, its label space {self.space.name} has "
                    f"{len(self.space.names)}: the model file's 'space' is wrong"
                )
            probabilities = probabilities.float().softmax(1)
        if depth is not None:
            depth = depth.float()
            if output.side_depths and (count := getattr(self.network, "iterations", 0)) > 1:
                steps = [*output.side_depths, output.depth][-count:]
                spread = torch.stack([step.float() for step in steps]).std(0, correction=0)
        for answer in (probabilities, depth):
            if answer is not None and not answer.isfinite().all():
                raise UserError("the network answers NaN or infinity: its weights are broken, or try precision='fp32'")
        return Output(logits=probabilities, depth=depth, depth_spread=spread)

    def _finish(self, image: images.Image, camera: Camera, source: str, output: Output, index: int) -> Prediction:
        height, width = image.rgb.shape[:2]
        chosen = confidence = depth = spread = metres = None
        if output.depth is not None:
            zoom = self.zoom(camera, *self.input_size(height, width))

            def enlarged(x: Tensor) -> np.ndarray:
                return F.interpolate(x[None], (height, width), mode="bilinear")[0, 0].cpu().numpy()

            metres = output.depth[index, None] * zoom
            depth = enlarged(metres)
            if output.depth_spread is not None:
                spread = enlarged(output.depth_spread[index, None] * zoom)
        if output.logits is not None:
            probabilities = output.logits[index]
            if self.crf is not None:
                guide = torch.from_numpy(self.prepare(image.rgb))[None].to(probabilities.device)
                probabilities = self.crf(probabilities[None], guide, metres)[0]
            chosen, confidence = decide(probabilities.cpu().numpy(), height, width)
        return Prediction(
            image=image.rgb,
            labels=chosen,
            depth=depth,
            confidence=confidence,
            depth_spread=spread,
            camera=camera,
            camera_source=source,
            space=self.space.name,
            name=image.name,
        )

    def _camera(self, image: images.Image, camera: Camera | None, fov: float | None) -> tuple[Camera, str]:
        height, width = image.rgb.shape[:2]
        if camera is not None and fov is not None:
            raise UserError("give a camera or a field of view, not both")
        if camera is not None:
            if abs(camera.width * height - camera.height * width) > 0.01 * camera.width * height:
                raise UserError(
                    f"{image.name} is {width} x {height} pixels and its camera {camera.width} x {camera.height}: "
                    f"give the intrinsics of this image, upright"
                )
            return (
                camera if (camera.width, camera.height) == (width, height) else camera.resized(width, height)
            ), "given"
        if fov is not None:
            if not 1 <= fov <= 170:
                raise UserError(f"a horizontal field of view lies between 1 and 170 degrees, not {fov:g}")
            return Camera.from_fov(width, height, float(fov)), "given"
        if image.focal is not None:
            focal, source = image.focal, "exif"
        else:  # the canonical camera: f_input = focal, so that the network's depth is taken at its word
            input_height, input_width = self.input_size(height, width)
            focal, source = self.focal * math.sqrt(height * width / (input_height * input_width)), "assumed"
        return Camera(focal, focal, (width - 1) / 2, (height - 1) / 2, width, height), source


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own message spans screens
        raise UserError(f"device {str(device)!r} is not available here: leave it out, or give cpu") from error
    return device


def load(
    model: str | Path = DEFAULT,
    device: str | torch.device | None = None,
    *,
    flip: bool = True,
    scales: Sequence[float] = (1.0,),
    window: float | str | Sequence[int] | None = None,
    overlap: float = 0.5,
    resolution: tta.Resolution = "area",
    precision: Literal["fp32", "bf16", "auto"] = "auto",
    crf: "bool | CRF | None" = None,
    guidance: Literal["predicted", "truth"] = "predicted",
    also: Sequence[str | Path] = (),
) -> Predictor:
    """A predictor from a shipped model's name, a model file or a run's folder; for the options see `Predictor`. `also`
    names further models, whose answers are averaged with this one's. A network that is guided by labels or region
    support has gad-nyuv2 for its guide, or with `guidance` "truth" is given the truth with each image. Raises
    UserError, see `checkpoint.load`."""
    augmentation = tta.Augmentation(flip, scales, window, overlap, resolution)  # complains before anything is read
    loaded = checkpoint.load(model)
    options: dict[str, Any] = augmentation.options() | {"precision": precision}
    members = [load(other, device, **options, crf=False, guidance="truth") for other in also]
    options |= {"crf": crf, "also": members}
    if guidance == "predicted" and {"labels", "support"} & set(getattr(loaded.network, "uses", ())):
        options["guide"] = load(GUIDE, device, flip=flip, precision=precision)
    predictor = Predictor(loaded.network, loaded.meta, device=device, **options)
    if predictor.crf is not None:  # labels that were smoothed twice lose small things
        for one in (predictor, *members):
            checkpoint.leave_out_crf(one.network)
    return predictor


_loaded = lru_cache(maxsize=1)(load)


def predict(
    source: images.Source,
    model: str | Path = DEFAULT,
    *,
    camera: Camera | None = None,
    fov: float | None = None,
    device: str | torch.device | None = None,
    flip: bool = True,
    scales: Sequence[float] = (1.0,),
    window: float | str | Sequence[int] | None = None,
    overlap: float = 0.5,
    resolution: tta.Resolution = "area",
    precision: Literal["fp32", "bf16", "auto"] = "auto",
    crf: "bool | CRF | None" = None,
) -> Prediction:
    """Predict on one image; see `Predictor`. The last model used is kept for the next call."""
    options = tta.Augmentation(flip, scales, window, overlap, resolution).options()
    return _loaded(model, device, precision=precision, crf=crf, **options).predict(source, camera=camera, fov=fov)
