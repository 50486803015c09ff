"""Where the time of one prediction goes: `enfilade info --profile`.

The photo is a rendered room, written as a JPEG and read again. The steps of the real call (`Predictor.predict`,
`Completer.complete`) are timed where they stand, by a clock around the functions that it calls and hooks on the
network's parts; so times nest, and what no clock stands around is the `rest` of its parent. The first call is reported
beside the warm one; arithmetic is counted in a call of its own, since counting takes time.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from enfilade import images
from enfilade.errors import UserError
from enfilade.shipped import DEFAULT

SEED = 12  # of the room
QUALITY = 92  # of the JPEG

# What is timed, by function: (names in the code) -> (name in the table). A name that no longer exists is an error.
PREDICTOR = {
    "prepare": "prepare: resize",
    "infer": "infer: network, softmax, mirror average",
    "_finish": "finish: up-sample, decide",
}
COMPLETE = {
    "place_grid": "place the grid by the floor",
    "encode": "encode: resize, TSDF, pixels to voxels",
    "infer": "infer: network",
    "pixel_voxels": "voxels that pixels see",
    "behind_walls": "voxels behind walls",
    "pixels": "labels of the pixels",
}


@dataclass
class Part:
    """All calls of a step: seconds by the wall clock, seconds of all processors, arithmetic (a multiplication with
    addition is 2), and the steps within."""

    name: str
    seconds: float = 0.0
    busy: float = 0.0
    flops: int = 0
    calls: int = 0
    parts: "dict[str, Part]" = field(default_factory=dict)

    def add(self, seconds: float, busy: float, flops: float) -> None:
        self.seconds, self.busy, self.flops = self.seconds + seconds, self.busy + busy, self.flops + int(flops)
        self.calls += 1

    def rest(self) -> "Part":
        """What its steps leave of it."""
        inner = self.parts.values()
        seconds, busy = self.seconds - sum(p.seconds for p in inner), self.busy - sum(p.busy for p in inner)
        return Part("rest", seconds, busy, self.flops - sum(p.flops for p in inner), self.calls)


Moment = tuple[float, float, float]  # by the wall clock, of the processors, and what was calculated


class Clock:
    """Times nested steps. On a GPU each waits for the work that it started, and before it for what was under way."""

    def __init__(self, device: torch.device, counter: FlopCounterMode | None = None):
        self.device, self.counter = device, counter
        self.root = Part("all")
        self.stack = [self.root]

    def now(self) -> Moment:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        flops = 0.0 if self.counter is None else float(self.counter.get_total_flops())
        return time.perf_counter(), time.process_time(), flops

    def begin(self, name: str) -> Moment:
        self.stack.append(self.stack[-1].parts.setdefault(name, Part(name)))
        return self.now()

    def end(self, begun: Moment) -> None:
        seconds, busy, flops = (after - before for after, before in zip(self.now(), begun))
        self.stack.pop().add(seconds, busy, flops)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = self.begin(name)
        try:
            yield
        finally:
            self.end(begun)

    @contextmanager
    def around(self, owner: Any, names: dict[str, str]) -> Iterator[None]:
        """Within it, these functions of a module, or methods of an object, run on the clock."""
        own = {name: vars(owner)[name] for name in names if name in vars(owner)}
        for attribute, name in names.items():
            setattr(owner, attribute, self.timed(getattr(owner, attribute), name))
        try:
            yield
        finally:
            for attribute in names:
                if attribute in own:
                    setattr(owner, attribute, own[attribute])
                else:
                    delattr(owner, attribute)

    def timed(self, function: Callable, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return wraps(function)(call) if hasattr(function, "__name__") else call

    @contextmanager
    def inside(self, network: nn.Module) -> Iterator[None]:
        """Within it, calls of a network run on the clock, and in them those of its top-level parts."""
        with ExitStack() as stack:
            stack.enter_context(self.around(network, {"forward": "network"}))
            open_: list[tuple[nn.Module, Moment]] = []
            modules = {module: name for name, group in parts_of(network).items() for module in group}

            def enter(module: nn.Module, _: Any) -> None:
                if not open_:  # a part that another part calls counts there
                    open_.append((module, self.begin(modules[module])))

            def leave(module: nn.Module, _: Any, __: Any) -> None:
                if open_ and open_[-1][0] is module:
                    self.end(open_.pop()[1])

            for module in modules:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield


def parts_of(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules directly under a network by what the table calls them; a list of modules is one part."""
    found: dict[str, list[nn.Module]] = {}
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            group = list(child.values() if isinstance(child, nn.ModuleDict) else child)
            kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in group))
            found[f"{name} ({len(group)} x {kinds})"] = group
        else:
            found[f"{name} ({type(child).__name__})"] = [child]
    return found


# --- one call ---------------------------------------------------------------------------------------------------------


def prediction_call(predictor: Any, photo: Path, camera: Any, given: dict[str, Any], out: Path) -> Callable:
    """One call of `enfilade predict`, as a function of the clock."""
    from enfilade import outputs
    from enfilade import predict as module

    names = dict(PREDICTOR)
    if getattr(predictor.network, "uses", ()) and predictor.guide is not None:
        names["guidance"] = "guide: another model's labels and depth"
    if predictor.crf is not None:
        names["crf"] = "CRF"

    def call(clock: Clock) -> None:
        with ExitStack() as stack:
            stack.enter_context(clock.around(predictor, names))
            stack.enter_context(clock.around(module, {"decide": "decide: enlarge, choose labels"}))
            stack.enter_context(clock.inside(predictor.network))
            with clock.part("read the photo"):
                image = images.read(photo)
            with clock.part("predict"):
                prediction = predictor.predict(image, camera=camera, **given)
        with clock.part("save"):
            for kind in outputs.FILES:
                with clock.part(kind):
                    written = outputs.save(prediction, out, files=[kind])
                if not written:  # a network without depth has no depth map
                    del clock.stack[-1].parts[kind]

    return call


def completion_call(completer: Any, photo: Path, camera: Any, out: Path) -> Callable:
    """One call of `enfilade complete` without a depth map, as a function of the clock."""
    from enfilade import complete as module
    from enfilade import room_output
    from enfilade.ops import tsdf
    from enfilade.predict import load

    estimator = load(device=completer.device)

    def call(clock: Clock) -> None:
        with ExitStack() as stack:
            stack.enter_context(clock.around(module, COMPLETE))
            stack.enter_context(clock.around(tsdf, {"visibility": "free space"}))
            stack.enter_context(clock.around(estimator, {"predict": "estimate depth: the default model"}))
            stack.enter_context(clock.inside(completer.network))
            with clock.part("read the photo"):
                image = images.read(photo)
            with clock.part("complete"):
                room = completer.complete(image, camera=camera, estimator=estimator)
        with clock.part("save"):
            for kind in room_output.FILES:
                with clock.part(kind):
                    room_output.save(room, out, files=[kind])

    return call


# --- the profile ------------------------------------------------------------------------------------------------------


def profile(
    model: str | Path = DEFAULT,
    *,
    size: tuple[int, int] = (640, 480),
    device: str | torch.device | None = None,
    crf: bool | None = None,
    runs: int = 5,
) -> dict[str, Any]:
    """Time one prediction (of a completion model: one `complete`, depth estimated) on a rendered room.

    Args:
        model: a shipped model, a model file, a run folder, or hf://user/name.
        size: width and height of the photo.
        crf: refine the labels, or do not; default: what the model's file says.
        runs: warm calls, of which the one of median time is told.

    Returns: plain types. "total" is a tree of {"name", "first_ms", "ms", "share" of the whole, "busy_ms" of all
    processors together, "calls", "parts"}; where there is arithmetic also "gflop" and "gflop_per_s" (convolutions,
    matrix products and attention as torch counts them, 2 for a multiplication with addition; our own compiled
    operations count nothing). The parts of a part add up to it: what was not timed is called "rest".

    Raises:
        UserError: no such model, see `checkpoint.load`; a size that no photo has; a CRF on a completion model.
    """
    from enfilade.data.rooms import room

    width, height = size
    if not (32 <= width <= 8192 and 32 <= height <= 8192):
        raise UserError(f"a photo to profile by has 32 to 8192 pixels a side, not {width}x{height}")
    if runs < 1:
        raise UserError(f"a profile takes at least 1 warm run, not {runs}")
    begun = time.perf_counter()
    target = load_any(model, device, crf)
    loaded = time.perf_counter() - begun
    sample = room(SEED, width=width, height=height, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "room.jpg")
        encoded = cv2.imencode(".jpg", (sample.image[..., ::-1] * 255).round().astype(np.uint8), [1, QUALITY])[1]
        images.write_atomic(photo, encoded.tobytes())
        out = Path(folder, "out")
        if hasattr(target, "complete"):
            call = completion_call(target, photo, sample.camera, out)
        else:
            call = prediction_call(target, photo, sample.camera, extras(target, sample), out)
        fresh = reset_peak(target.device)
        before = resident()
        first = run(call, target.device)
        peaks = peak(target.device)
        if before is not None:  # the kernel counts its highest mark a little late
            peaks["peak_megabytes"] = max(before, peaks["peak_megabytes"] or before)
        warm = sorted((run(call, target.device) for _ in range(runs)), key=lambda r: r.seconds)
        median = warm[(len(warm) - 1) // 2]
        with FlopCounterMode(display=False) as counter:
            counted = run(call, target.device, counter)
    augmentation = getattr(target, "augmentation", None)
    seen = target.image_size(height, width) if augmentation is None else target.input_size(height, width)
    return {
        "model": str(model),
        "photo": [width, height],
        "input": [seen[1], seen[0]],
        "flip": augmentation is not None and augmentation.flip,
        "crf": getattr(target, "crf", None) is not None,
        "precision": precision(target),
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "load_ms": 1e3 * loaded,
        "first_ms": 1e3 * first.seconds,
        "ms": 1e3 * median.seconds,
        "spread_ms": [1e3 * warm[0].seconds, 1e3 * warm[-1].seconds],
        "memory": {"before_megabytes": before, "since_start": not fresh, **peaks},
        "total": tell(median, first, counted, median.seconds),
    }


def load_any(model: str | Path, device: str | torch.device | None, crf: bool | None) -> Any:
    """A predictor, or of a network that completes rooms, a completer."""
    from enfilade import complete
    from enfilade.info import completes
    from enfilade.predict import load

    if completes(model):
        if crf:
            raise UserError("a CRF refines the labels of pixels, and this model completes rooms: leave it out")
        return complete.load(model, device)
    return load(model, device, crf=crf)


def extras(predictor: Any, sample: Any) -> dict[str, Any]:
    """What a network takes beside the photo and no guide can give."""
    if "hha" not in getattr(predictor.network, "uses", ()):
        return {}
    from enfilade.ops.hha import hha

    return {"hha": hha(sample.depth, sample.camera).astype(np.float32) / 255}


def run(call: Callable[[Clock], None], device: torch.device, counter: FlopCounterMode | None = None) -> Part:
    clock = Clock(device, counter)
    begun = clock.now()
    call(clock)
    clock.end(begun)
    return clock.root


def tell(warm: Part, first: Part | None, counted: Part | None, whole: float) -> dict[str, Any]:
    """A part and the parts in it as plain numbers; what they leave of it is a part of its own."""
    found: dict[str, Any] = {"name": warm.name, "first_ms": None if first is None else 1e3 * first.seconds}
    found |= {"ms": 1e3 * warm.seconds, "share": warm.seconds / whole, "busy_ms": 1e3 * warm.busy, "calls": warm.calls}
    if counted is not None and counted.flops:
        found |= {"gflop": counted.flops / 1e9, "gflop_per_s": counted.flops / 1e9 / warm.seconds}
    if warm.parts:
        rows = [(p, first and first.parts.get(n), counted and counted.parts.get(n)) for n, p in warm.parts.items()]
        rows.append((warm.rest(), first and first.rest(), counted and counted.rest()))
        found["parts"] = [tell(*row, whole) for row in rows]
    return found


def precision(target: Any) -> str:
    """Of the network's arithmetic; completion networks have but one."""
    chosen = getattr(target, "precision", "fp32")
    return ("bf16" if target.device.type == "cuda" else "fp32") if chosen == "auto" else chosen


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- memory -----------------------------------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> bool:
    """Forget the most memory held so far; False where the system cannot, and the process's peak since its start must
    do."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(key: str = "VmRSS") -> float | None:
    """Megabytes (2**20 bytes) that the process holds, or with "VmHWM" has held; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return None


def peak(device: torch.device) -> dict[str, float | None]:
    from enfilade.room_output import peak_megabytes

    found: dict[str, float | None] = {"peak_megabytes": resident("VmHWM") or peak_megabytes()}
    if device.type == "cuda":
        found["gpu_peak_megabytes"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


# --- for reading ------------------------------------------------------------------------------------------------------


def text(found: dict[str, Any], *, least: float = 0.001) -> str:
    """`profile()` as a table. A rest of less than the share `least` is not shown."""
    (width, height), (w, h) = found["photo"], found["input"]
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    seen = f"the network sees {w}x{h}{', and its mirror image' if found['flip'] else ''}"
    lines = [
        f"{found['model']} on {found['device']}, {threads}, {found['precision']}; a room of {width}x{height}, {seen}",
        "",
    ]
    rows: list[tuple[str, ...]] = [("", "first, ms", "ms", "share", "busy, ms", "GFLOP", "GFLOP/s")]

    def add(part: dict[str, Any], depth: int) -> None:
        if part["name"] == "rest" and part["share"] < least and part.get("gflop", 0) == 0:
            return
        first = "-" if part["first_ms"] is None else f"{part['first_ms']:.1f}"
        cells = [first, f"{part['ms']:.1f}", f"{part['share']:.1%}", f"{part['busy_ms']:.1f}"]
        cells += [f"{part[k]:.2f}" if k in part else "" for k in ("gflop", "gflop_per_s")]
        rows.append(("  " * depth + part["name"], *cells))
        for inner in part.get("parts", ()):
            add(inner, depth + 1)

    add(found["total"], 0)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *(c.rjust(n) for c, n in zip(cells, widths[1:]))]).rstrip())
    memory = found["memory"]
    low, high = found["spread_ms"]
    lines += ["", f"ms: the median of {found['runs']} calls after the first; they took {low:.0f} to {high:.0f} ms."]
    lines.append("busy: processor time, of all threads together; it hardly grows where other programs run.")
    lines.append(f"The model loads in {found['load_ms']:.0f} ms.")
    since = "since the process began" if memory["since_start"] else "in the first call"
    held = "" if memory["before_megabytes"] is None else f", {memory['before_megabytes']:.0f} before it"
    lines.append(f"Memory: at most {memory['peak_megabytes']:.0f} MiB {since}{held}.")
    if "gpu_peak_megabytes" in memory:
        lines.append(f"GPU memory: at most {memory['gpu_peak_megabytes']:.0f} MiB.")
    return "\n".join(lines)
