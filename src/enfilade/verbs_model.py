"""The verbs that tell of a model or carry it elsewhere: info and export."""

import json
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from enfilade.errors import UserError
from enfilade.options import Count, Device, Flag, MaybeCount, Model, Name, Refining, use_threads
from enfilade.shipped import DEFAULT


@dataclass(frozen=True)
class Info(Refining):
    """Say what is installed and on which machine; list models, recipes, tables and data sets."""

    model: Annotated[str | None, arg(metavar="NAME|FILE|RUN", help_behavior_hint="")] = None
    """Tell of this model only: how it was built and trained, and its scores."""
    profile: Annotated[tuple[str, ...] | None, arg(metavar="[MODEL]", help_behavior_hint="")] = None
    """Predict on a rendered room with this model, or the default one, and say where the time goes."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="")] = None
    """With --profile: the room's size; default: 640x480."""
    device: Device = None
    """With --profile: cpu, cuda, cuda:1 ...; default: a GPU where there is one."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        from enfilade.info import info, text

        if self.profile is not None:
            return self._profile()
        if self.size is not None or self.crf or self.no_crf or self.device is not None:
            raise UserError("--size, --crf, --no-crf and --device belong to --profile: name it too")
        if self.model is None:
            use_threads()
        found = info(self.model)
        print(json.dumps(found, indent=1) if self.json else text(found))
        return 0

    def _profile(self) -> int:
        models = [*(self.profile or ()), *([] if self.model is None else [self.model])]
        if len(models) > 1:
            raise UserError(f"--profile takes one model, not {' and '.join(models)}")
        size = 640, 480
        if self.size is not None:
            sides = self.size.lower().split("x")
            if len(sides) != 2 or not all(side.isdecimal() for side in sides):
                raise UserError(f"--size is WIDTHxHEIGHT in pixels, such as 640x480, not {self.size!r}")
            size = int(sides[0]), int(sides[1])
        from enfilade.profiling import profile, text

        use_threads()
        found = profile(*models, size=size, device=self.device, crf=self.refines())
        print(json.dumps(found, indent=1) if self.json else text(found))
        return 0


@dataclass(frozen=True)
class Combine:
    """Make one model file of several trained models, which answers as they do together.

    It is loaded, served and exported as any other. All of its networks see an image at the size that the first was
    trained at; a dense CRF at the end of one of them is left out, for one can stand behind them all.
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME|FILE|RUN [...]", help_behavior_hint="")]
    """Two models or more, of the same labels."""
    out: Annotated[str, arg(metavar="FILE")]
    """The file to write."""
    half: Flag = False
    """Write 16-bit numbers, as the shipped models have them."""
    crf: Flag = False
    """Refine what they answer by a dense CRF wherever the file is loaded, unless that says --no-crf."""

    def run(self) -> int:
        from enfilade.combine import combine

        path = combine(self.models, self.out, half=self.half, crf=self.crf)
        print(f"{' and '.join(self.models)}: {path}, {path.stat().st_size / 1e6:.1f} MB")
        return 0


@dataclass(frozen=True)
class Export:
    """Write a model as one file that runs without Enfilade, compare it with torch, and time both."""

    out: Annotated[str, arg(metavar="FILE")]
    """The file to write."""
    model: Model = DEFAULT
    """A shipped model, a model file, or the folder of a training run."""
    format: Name = "onnx"
    """Of the file: onnx, or torch for an archive that torch alone loads (.pt2)."""
    opset: Count = 20
    """Version of ONNX's operators, 19 to 23."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="")] = None
    """Image to time by; default: the training's. The file takes any size."""
    check: Flag = True
    """Neither compare nor time; without it both are done, and a file that differs from torch is not written."""
    crf: Flag = True
    """Leave out the dense CRF of a network that ends in one (joint-nyuv2), for which no format has operators."""
    int8: Annotated[tuple[str, ...] | None, arg(metavar="[static|dynamic]", help_behavior_hint="")] = None
    """Convolutions of 8-bit numbers: static, the faster ones, calibrated on frames; or dynamic. ONNX only."""
    calibrate: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")] = ()
    """With --int8: photos or folders of them to calibrate on and to judge by; default: rendered rooms."""
    threads: MaybeCount = None
    """Threads to time with; default: OMP_NUM_THREADS, or all cores."""
    json: Flag = False
    """Print the report as JSON."""

    def run(self) -> int:
        size = None
        if self.size is not None:
            sides = self.size.lower().split("x")
            if len(sides) != 2 or not all(side.isdecimal() for side in sides):
                raise UserError(f"--size is WIDTHxHEIGHT in pixels, such as 320x240, not {self.size!r}")
            size = int(sides[1]), int(sides[0])
        from enfilade import export

        use_threads(self.threads)
        if self.int8 is not None and len(self.int8) > 1:
            raise UserError(f"--int8 is static or dynamic, not {' and '.join(self.int8)}")
        kind = None if self.int8 is None else (*self.int8, "static")[0]
        options = {"format": self.format, "opset": self.opset, "check": self.check, "crf": self.crf}
        options |= {"int8": kind, "photos": self.calibrate}
        report = export.export(self.model, self.out, size=size, **options)
        print(json.dumps(report.as_dict(), indent=1) if self.json else export.table(report))
        return 0
