"""What several verbs of the command line need: the types of their options, and how options become objects."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

import enfilade
from enfilade.errors import UserError
from enfilade.shipped import DEFAULT

File = Literal["labels", "depth", "colour", "spread", "overlay", "panel", "arrays", "points"]
Kind = Literal[File, "ros"]  # with those that are written only where asked for
Precision = Literal["auto", "fp32", "bf16"]
Name = Annotated[str, arg(metavar="NAME")]
Folder = Annotated[str, arg(metavar="DIR")]
Model = Annotated[str, arg(metavar="NAME|FILE|RUN")]
Count = Annotated[int, arg(metavar="N")]
Options = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")]
# Those that may be left out; their help says what happens then
Flag = Annotated[bool, arg(help_behavior_hint="")]
MaybeFolder = Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")]
MaybeFile = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]
MaybeNumber = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]
MaybeCount = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Weights = Annotated[str | None, arg(metavar="FILE|timm", help_behavior_hint="")]
Device = Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")]


def use_threads(threads: int | None = None) -> None:
    """All cores that this process may use, unless the user or OMP_NUM_THREADS says otherwise."""
    positive("--threads", threads)
    import torch

    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    from enfilade.info import cores

    torch.set_num_threads(threads or cores())


def positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{option} must be at least 1, not {value}")


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs with JSON or bare text as values."""
    from enfilade.overrides import parse

    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise UserError(f"{assignment!r} is no option: write KEY=VALUE, for example length=20")
        options[key] = parse(value)
    return options


def open_reader(name: str, root: str | None, split: str, options: dict[str, Any]):
    try:
        return enfilade.open_dataset(name, root, split, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        wrong = str(error).rpartition("argument ")[2].strip("'")
        raise UserError(f"data set {name} takes no option {wrong!r}") from error


def read_camera(path: Path) -> dict[str, float]:
    """Intrinsics of a JSON file: fx, and as far as it has them fy, cx, cy, width, height."""
    if not path.is_file():
        raise UserError(f"no camera file at {path}")
    try:
        content = json.loads(path.read_text())
        found = {k: float(content[k]) for k in ("fx", "fy", "cx", "cy", "width", "height") if k in content}
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: expected JSON with numbers fx, fy, cx and cy ({error})") from error
    if "fx" not in found:
        raise UserError(f"{path}: expected JSON with numbers fx, fy, cx and cy; fx is missing")
    return found


def camera_of(found: dict[str, float], width: int, height: int):
    """The camera of numbers such as `read_camera` gives; without its own size it is of an image of this one, and
    without a principal point it looks through the middle."""
    from enfilade.camera import Camera

    width, height = int(found.get("width", width)), int(found.get("height", height))
    middle = {"fy": found["fx"], "cx": (width - 1) / 2, "cy": (height - 1) / 2}
    fx, fy, cx, cy = (float((middle | found)[k]) for k in ("fx", "fy", "cx", "cy"))
    return Camera(fx, fy, cx, cy, width, height)


def image_size(paths: Sequence[str]) -> tuple[int, int]:
    """Width and height of the first image among `paths` that can be read."""
    from enfilade import images

    for path in images.find(paths):
        with contextlib.suppress(UserError):
            rgb = next(images.frames(path))[1] if images.is_video(path) else images.read(path).rgb
            return rgb.shape[1], rgb.shape[0]
    raise UserError("none of the images can be read")


def describe_line(path: str, result: dict[str, Any]) -> str:
    """What is in an image and how far, in a line."""
    parts = [f"{result['width']}x{result['height']}"]
    if result["classes"] is not None:
        parts.append(", ".join(f"{name} {share:.0%}" for name, share in list(result["classes"].items())[:4]))
    if result["depth"] is not None:
        parts.append(f"{result['depth']['min']:.1f} to {result['depth']['max']:.1f} m")
    if result["camera"] is not None:
        parts.append(f"camera {result['camera']['source']}, {result['camera']['fov']:.0f} degrees across")
    return f"{path}: {'; '.join(parts)}"


def complain(message: str) -> None:
    """One line on stderr. Of many processes on one machine, the first speaks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("enfilade: " + " ".join(message.split()), file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Refining:
    """Whether a dense CRF stands behind the model."""

    crf: Flag = False
    """Refine the labels by the photo's colours (a dense CRF); the default model does."""
    no_crf: Flag = False
    """Leave out the dense CRF that the default model has: faster."""

    def refines(self) -> bool | None:
        """None for what the model's file says."""
        if self.crf and self.no_crf:
            raise UserError("--crf and --no-crf exclude each other: give one of them, or none")
        return True if self.crf else False if self.no_crf else None


@dataclass(frozen=True, kw_only=True)
class Answering(Refining):
    """Which model answers and how it sees the images: the options of `enfilade.load`."""

    model: Model = DEFAULT
    """A shipped model, a model file, or the folder of a training run."""
    also: Annotated[tuple[str, ...], arg(metavar="MODEL [MODEL ...]", help_behavior_hint="")] = ()
    """Average the answers of these models too: better, in the time of all."""
    flip: Flag = True
    """Without it the answers for the image and its mirror image are averaged: better, at twice the time."""
    scales: Annotated[tuple[float, ...], arg(metavar="S [S ...]")] = (1.0,)
    """Average over these factors of the training scale; S costs S times S the time."""
    window: Annotated[str | None, arg(metavar="WIDTHxHEIGHT|FACTOR", help_behavior_hint="")] = None
    """Cover the image by windows of so many network pixels, or of so many training inputs, and blend their answers."""
    overlap: Annotated[float, arg(metavar="SHARE")] = 0.5
    """Share of a window's side that it has in common with the next."""
    resolution: Literal["area", "source"] = "area"
    """What scale 1 is: the area of the training input, or the image's own pixels times the training's factor."""
    device: Device = None
    """cpu, cuda, cuda:1 ...; default: a GPU where there is one."""
    precision: Precision = "auto"
    """Of the network's arithmetic; auto is bf16 on a GPU."""

    def predictor(self, **more: Any):
        """`enfilade.load` with these options and `more`."""
        named = {"model", *(f.name for f in fields(Refining))}
        chosen: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Answering) if f.name not in named}
        return enfilade.load(self.model, crf=self.refines(), **chosen, **more)
