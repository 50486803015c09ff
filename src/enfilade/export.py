"""A network as one file that runs without Enfilade and without torch: ONNX, compared with torch before it is written.

    report = enfilade.export.export("gad-nyuv2", "gad.onnx")

The graph takes any number of images of any size, RGB in [0, 1], and a network that uses HHA takes that as a second
input, in [0, 1]. It answers what `Predictor.infer` answers, at the network's own resolution: "probabilities"
[b, k, _, _] and, as far as the network has them, "depth" [b, _, _] in metres of the canonical camera. What else it
takes to use these is in the file's metadata, see `describe`.
"""

import copy
import importlib.util
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

import enfilade
from enfilade import images
from enfilade.checkpoint import Loaded, load
from enfilade.errors import UserError, unknown
from enfilade.predict import Predictor

FORMATS = ("onnx",)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSETS = range(19, 24)  # what torch's exporter writes and onnxruntime reads
# Batch, height, width at which torch and the file are compared, beside the training size: whole multiples of the
# network's stride and not, smaller than it, several images
CHECKS = ((1, 64, 96), (2, 97, 65), (1, 31, 33), (3, 50, 131))
# The largest difference that passes; depth in metres. Rounding is a hundredth of it and less; a cut, a padding or an
# interpolation done otherwise is many times as much.
TOLERANCE = {"probabilities": 1e-3, "depth": 5e-3}

ABOUT = {
    "image": "RGB in [0, 1], of any size; best at about the area of 'size' in the metadata",
    "hha": "the HHA maps of the same frames, divided by 255",
    "probabilities": "of the classes 'names' in the metadata, at the network's own resolution, which may be lower than "
    "the image's: resize bilinearly (half-pixel centres), then take the arg max",
    "depth": "metres for a camera whose focal length at this input is 'focal' pixels; for another, of f pixels, "
    "multiply by f / focal",
}


@dataclass(frozen=True)
class Difference:
    """The largest difference of each output from torch's, for one shape of input."""

    batch: int
    height: int
    width: int
    outputs: dict[str, float]


@dataclass(frozen=True)
class Latency:
    """Median milliseconds for one image: of torch (`Predictor.infer`, fp32) and of onnxruntime, on the CPU."""

    height: int
    width: int
    torch: float
    onnxruntime: float
    runs: int
    threads: int


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote. Inputs and outputs are given by their shapes, in which a name stands for a free size. A
    file that was not checked has no `differences` and no `latency`."""

    file: str
    format: str
    bytes: int
    opset: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    differences: tuple[Difference, ...] = ()
    latency: Latency | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def export(
    model: str | Path | Loaded,
    out: str | Path,
    *,
    format: str = "onnx",
    size: Sequence[int] | None = None,
    opset: int = 20,
    check: bool = True,
    runs: int = 11,
    crf: bool = True,
) -> ExportReport:
    """Write a model as one ONNX file whose batch, height and width are free.

    Args:
        model: a shipped model's name, a model file, a run's folder, or what `checkpoint.load` returned.
        out: the file; it is written whole or not at all, and only after the check.
        format: "onnx".
        size: height and width of the image by which latency is measured; default: the training size.
        opset: the version of ONNX's operators, 19 to 23.
        check: run onnx's checker, compare onnxruntime with torch at several sizes and batches, time both.
        runs: whose median the latency is.
        crf: False leaves out the dense CRF at the end of a network that has one. ONNX has no operators for it.

    Raises:
        UserError: no such model or format, a package that is not installed, a place that cannot be written to, a
            network that cannot be exported, or a file that does not answer as torch does.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if opset not in OPSETS:
        raise UserError(f"the opset is one of {OPSETS[0]} to {OPSETS[-1]}, not {opset}")
    if runs < 1:
        raise UserError(f"the runs to time are at least 1, not {runs}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"a size is a height and a width of at least one pixel, not {' x '.join(map(str, size))}")
    need_packages(PACKAGES if check else PACKAGES[:2])
    loaded = copy.deepcopy(model) if isinstance(model, Loaded) else load(model)
    if getattr(loaded.network, "crf", None) is not None:
        if crf:
            raise UserError("this network ends in a dense CRF, which ONNX cannot express: export it without (--no-crf)")
        loaded.network.crf = None  # pyright: ignore
    out = writable(Path(out))

    predictor = Predictor(loaded.network, loaded.meta, device="cpu", flip=False, precision="fp32")
    proto = to_onnx(predictor, opset)
    data = proto.SerializeToString()
    differences, latency = (), None
    if check:
        height, width = map(int, size or predictor.meta["size"])
        differences, latency = verify(predictor, data, height, width, runs)
    images.write_atomic(out, data)
    return ExportReport(
        file=str(out),
        format=format,
        bytes=len(data),
        opset=proto.opset_import[0].version,
        inputs={value.name: shape(value) for value in proto.graph.input},
        outputs={value.name: shape(value) for value in proto.graph.output},
        differences=differences,
        latency=latency,
    )


def need_packages(packages: Iterable[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"exporting to ONNX needs {' and '.join(missing)}: pip install 'enfilade[onnx]'")


def writable(out: Path) -> Path:
    """`out`, if a file can be made beside it: rather known now than after a minute's export."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the file to write, such as {out / 'model.onnx'}")
    images.make_folder(out.parent)
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {out.name} to {out.parent}: {error.strerror or error}") from error
    return out


# --- to a graph -------------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """A network from tensors to a tuple of tensors: probabilities and depth, as far as it has them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, hha: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.network(image) if hha is None else self.network(image, hha=hha)
        probabilities = None if output.logits is None else output.logits.softmax(1)
        return tuple(x for x in (probabilities, output.depth) if x is not None)


def to_onnx(predictor: Predictor, opset: int) -> Any:
    """The predictor's network as an `onnx.ModelProto`. Raises UserError where that cannot be done."""
    example = example_input(predictor, 2, 97, 131)  # an odd size, and no 1: torch takes a size of 1 for a constant
    names = list(answers(predictor, example))
    feed = {name: torch.from_numpy(x) for name, x in feeds(example).items()}
    free = {0: "batch", 2: "height", 3: "width"}
    try:
        with quiet():
            network = with_constant_padding(copy.deepcopy(predictor.network))
            network = network.to(memory_format=torch.contiguous_format)  # pyright: ignore
            dynamic = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
            program = torch.export.export(
                Answers(network).eval(), (), kwargs=feed, dynamic_shapes=dict.fromkeys(feed, dynamic)
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(feed),
                output_names=names,
                external_data=False,
                verbose=False,
            )
            assert exported is not None
            proto = exported.model_proto
    except Exception as error:  # torch's own messages span screens, and the exporter raises many kinds
        kind = type(predictor.network).__name__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"this network ({kind}) cannot be exported to ONNX: {reason}") from error
    strip(proto)
    label_axes(proto, free)
    describe(proto, predictor)
    return proto


def with_constant_padding(network: nn.Module) -> nn.Module:
    """timm's convolutions with "same" padding compute it from the input's size, in a way that torch.export ponders for
    minutes. In a network that pads its images (`pad_to_multiple`), those inputs are whole multiples of the stride, and
    the padding is the same for all of them."""
    from timm.layers import Conv2dSame

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and isinstance(module, Conv2dSame):
            module.__dict__["forward"] = partial(convolve_same, module)
    return network


def convolve_same(conv: nn.Conv2d, x: Float[Tensor, "b c _ _"]) -> Float[Tensor, "b d _ _"]:
    """TensorFlow's "same" convolution of a map whose sides are multiples of the stride."""
    above, left = (max(0, (k - 1) * d + 1 - s) for k, d, s in zip(conv.kernel_size, conv.dilation, conv.stride))
    x = F.pad(x, (left // 2, left - left // 2, above // 2, above - above // 2))
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of torch's exporter and of the packages behind it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def strip(proto: Any) -> None:
    """Drop what the exporter noted for its own debugging: every node's Python stack, with the paths of this machine,
    and the shapes of inner maps as long formulas."""
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    proto.graph.doc_string = ""
    for value in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""


def label_axes(proto: Any, free: dict[int, str]) -> None:
    """Names for the free sizes, which the exporter calls s73 or by a formula."""
    for value in proto.graph.input:
        for axis, name in free.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    for value in proto.graph.output:
        *_, height, width = value.type.tensor_type.shape.dim
        value.type.tensor_type.shape.dim[0].dim_param = free[0]
        height.dim_param, width.dim_param = f"{value.name}_height", f"{value.name}_width"


def describe(proto: Any, predictor: Predictor) -> None:
    """Write into the file what it takes to use it: the meaning of inputs and outputs beside each, and as metadata
    (JSON, but for bare strings) names and colours of the classes, size [height, width] and focal length (pixels) of
    training, the label space, the licence of the weights, and what made the file."""
    meta, space = predictor.meta, predictor.space
    told = {
        "description": "what each pixel shows and perhaps how far it is; see the remarks at inputs and outputs",
        "enfilade": enfilade.__version__,
        "space": space.name,
        "names": list(space.names),
        "colours": ["#" + bytes(colour).hex() for colour in space.colours],
        "size": list(meta["size"]),
        "focal": predictor.focal,
    }
    told |= {key: meta[key] for key in ("model", "recipe", "license", "ignored") if meta.get(key) is not None}
    for key, value in told.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    proto.producer_name, proto.producer_version = "enfilade", enfilade.__version__
    proto.doc_string = told["description"]
    proto.graph.name = str(meta.get("model", type(predictor.network).__name__))
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = ABOUT[value.name]


def shape(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


# --- the check --------------------------------------------------------------------------------------------------------


def verify(
    predictor: Predictor, data: bytes, height: int, width: int, runs: int
) -> tuple[tuple[Difference, ...], Latency]:
    """Compare the serialized graph with torch, and time both, on one image of `height` x `width`, on as many threads as
    torch uses. Raises UserError where an answer differs by more than `TOLERANCE`."""
    import onnx
    import onnxruntime

    image = example_input(predictor, 1, height, width)
    torch_ms = median_ms(lambda: answers(predictor, image), runs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        onnx.checker.check_model(data, full_check=True)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # neither package has a common type for its errors
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the exported graph is not valid, and was not written: {reason}") from error
    differences = tuple(compare(predictor, session, *size) for size in ((1, height, width), *CHECKS))
    feed = feeds(image)
    onnx_ms = median_ms(lambda: session.run(None, feed), runs)
    return differences, Latency(height, width, torch_ms, onnx_ms, runs, torch.get_num_threads())


def compare(predictor: Predictor, session: Any, batch: int, height: int, width: int) -> Difference:
    """Torch and onnxruntime on random images. Raises UserError where they differ."""
    example = example_input(predictor, batch, height, width)
    differences = {}
    where = f"for {batch} x {width}x{height} pixels"
    for (name, want), have in zip(answers(predictor, example).items(), session.run(None, feeds(example)), strict=True):
        if have.shape != want.shape:
            sizes = f"{list(have.shape)} instead of {list(want.shape)}"
            raise UserError(f"onnxruntime's {name} {where} is {sizes}; the file was not written: please report this")
        differences[name] = float(np.abs(have - want).max())
        if not differences[name] <= TOLERANCE[name]:
            difference = f"differs from torch's by {differences[name]:.2g}, more than {TOLERANCE[name]:g}"
            raise UserError(f"onnxruntime's {name} {where} {difference}; the file was not written: please report this")
    return Difference(batch, height, width, differences)


def example_input(predictor: Predictor, batch: int, height: int, width: int) -> Float32[np.ndarray, "b c h w"]:
    """Noise in [0, 1]: RGB, followed by HHA for a network that takes it."""
    channels = 6 if "hha" in getattr(predictor.network, "uses", ()) else 3
    return np.random.default_rng(0).random((batch, channels, height, width), dtype=np.float32)


def feeds(example: Float32[np.ndarray, "b c h w"]) -> dict[str, np.ndarray]:
    """The inputs of the graph by name."""
    rgb, hha = example[:, :3], example[:, 3:]
    return {"image": rgb, "hha": hha} if hha.shape[1] else {"image": rgb}


def answers(predictor: Predictor, example: Float32[np.ndarray, "b c h w"]) -> dict[str, np.ndarray]:
    """Torch's answers by the names of the graph's outputs."""
    output = predictor.infer(torch.from_numpy(example), getattr(predictor.network, "uses", ()))
    found = {"probabilities": output.logits, "depth": output.depth}
    return {name: x.numpy() for name, x in found.items() if x is not None}


def median_ms(call: Callable[[], object], runs: int) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


# --- for reading ------------------------------------------------------------------------------------------------------


def table(report: ExportReport) -> str:
    """The report in words and columns."""
    lines = [f"{report.file}  {report.format}, opset {report.opset}, {report.bytes / 1e6:.1f} MB"]
    for kind, values in (("input", report.inputs), ("output", report.outputs)):
        lines += [f"  {kind:<8}{name} [{', '.join(map(str, axes))}]" for name, axes in values.items()]
    if report.differences:
        names = list(report.outputs)
        lines += ["", f"{'largest difference from torch':<32}" + "".join(f"{name:>16}" for name in names)]
        for d in report.differences:
            told = f"  {d.batch} x {d.width}x{d.height}"
            lines.append(f"{told:<32}" + "".join(f"{d.outputs[name]:>16.1e}" for name in names))
    if report.latency is not None:
        latency = report.latency
        threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
        lines += ["", f"one image of {latency.width}x{latency.height}, {threads}, median of {latency.runs}"]
        lines += [f"  torch       {latency.torch:8.1f} ms", f"  onnxruntime {latency.onnxruntime:8.1f} ms"]
    return "\n".join(lines)
