"""A network as one file that runs without Enfilade, compared with torch before it is written.

    report = enfilade.export.export("gad-nyuv2", "gad.onnx")  # for onnxruntime and others
    report = enfilade.export.export("gad-nyuv2", "gad.onnx", int8="static")  # its convolutions in 8-bit numbers
    report = enfilade.export.export("imenet-rooms", "room.pt2", format="torch")  # an archive of torch.export

A file takes any number of frames of any size: RGB in [0, 1], and as further inputs what else the network takes. It
answers what the network does, at the network's own resolution: probabilities of classes, depth in metres of the
canonical camera, probabilities of voxels. `export_graph.ABOUT` has them all. What else it takes to use these is in the
file's metadata, see `export_graph.description`.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enfilade import export_check, export_int8, export_onnx, export_torch, images
from enfilade.checkpoint import Loaded, leave_out_crf, load
from enfilade.errors import UserError, unknown
from enfilade.export_check import Difference, Latency
from enfilade.export_graph import refuse
from enfilade.export_int8 import Quantised
from enfilade.export_onnx import to_onnx
from enfilade.predict import Predictor

FORMATS = ("onnx", "torch")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSETS = range(19, 24)  # what torch's exporter writes and onnxruntime reads


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote. Inputs and outputs are given by their shapes, in which a name stands for a free size. A
    file that was not checked has no `differences` and no `latency`; those of an 8-bit file are its 32-bit original's,
    and `int8` tells what 8 bits changed. An archive of torch has no `opset`."""

    file: str
    format: str
    bytes: int
    opset: int | None
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    differences: tuple[Difference, ...] = ()
    latency: Latency | None = None
    int8: Quantised | None = None

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
    int8: str | None = None,
    photos: Sequence[str | Path] = (),
) -> ExportReport:
    """Write a model as one file whose batch, height and width are free, and the sides of its volume.

    Args:
        model: a shipped model's name, a model file, a run's folder, or what `checkpoint.load` returned.
        out: the file; it is written whole or not at all, and only after the check.
        format: "onnx", or "torch": an archive of `torch.export`, to be loaded by torch alone.
        size: height and width of the image by which latency is measured; default: the training size.
        opset: the version of ONNX's operators, 19 to 23.
        check: compare what runs the file (onnxruntime, or torch that loaded it again) with the network at several sizes
            and batches, run onnx's checker, time both; with `int8` also compare the answers of 8 and of 32 bits.
        runs: whose median the latency is.
        crf: False leaves out the dense CRF at the end of a network that has one. No format has operators for it.
        int8: "static" or "dynamic" writes convolutions of 8-bit numbers, see `export_int8`. ONNX only.
        photos: files or folders that stand for the images to come, to calibrate and judge 8-bit numbers by; default:
            rendered rooms.

    Raises:
        UserError: no such model or format, a package that is not installed, a place that cannot be written to, a
            network that cannot be exported, or a file that does not answer as torch does.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if int8 is not None and int8 not in export_int8.KINDS:
        raise unknown("kind of 8-bit numbers", int8, export_int8.KINDS)
    if int8 is not None and format != "onnx":
        raise UserError("8-bit numbers are for ONNX files: leave --int8 or --format torch out")
    if photos and int8 is None:
        raise UserError("photos calibrate 8-bit numbers: give --int8 too, or leave --calibrate out")
    if opset not in OPSETS:
        raise UserError(f"the opset is one of {OPSETS[0]} to {OPSETS[-1]}, not {opset}")
    if runs < 1:
        raise UserError(f"the runs to time are at least 1, not {runs}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"a size is a height and a width of at least one pixel, not {' x '.join(map(str, size))}")
    if format == "onnx":
        need_packages(PACKAGES if check or int8 else PACKAGES[:2])
    loaded = copy.deepcopy(model) if isinstance(model, Loaded) else load(model)
    if not crf:
        leave_out_crf(loaded.network)
    refuse(loaded.network)
    out = writable(Path(out))
    predictor = Predictor(loaded.network, loaded.meta, device="cpu", flip=False, precision="fp32", crf=False)
    height, width = map(int, size or predictor.meta["size"])
    feeds = export_int8.frames(predictor, photos) if int8 else ([], [])

    proto, version, quantised = None, None, None
    if format == "onnx":
        proto = to_onnx(predictor, opset)
        data = proto.SerializeToString()
        sides = proto.graph.input, proto.graph.output
        inputs, outputs = ({port.name: export_onnx.shape(port) for port in side} for side in sides)
        version = int(proto.opset_import[0].version)
        run, runtime = (export_onnx.runner(data) if check else None), "onnxruntime"
    else:
        data, told = export_torch.to_archive(predictor)
        inputs, outputs = ({port["name"]: port["shape"] for port in told[side]} for side in ("inputs", "outputs"))
        run, runtime = (export_torch.runner(data) if check else None), "the archive"
    differences, latency = (), None
    if run is not None:
        differences, latency = export_check.verify(predictor, run, runtime, height, width, runs)
    if int8 is not None:
        size32 = len(data)
        data = export_int8.quantise(proto, predictor.network, int8, feeds[0]).SerializeToString()
        if run is not None:
            told8 = {"kind": int8, "source": "photos" if photos else "rendered rooms", "size": size32}
            quantised = export_int8.judge(predictor, run, export_onnx.runner(data), feeds[1], runs, **told8)
    images.write_atomic(out, data)
    return ExportReport(str(out), format, len(data), version, inputs, outputs, differences, latency, quantised)


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


# --- for reading ------------------------------------------------------------------------------------------------------


def table(report: ExportReport) -> str:
    """The report in words and columns."""
    kind = report.format if report.opset is None else f"{report.format}, opset {report.opset}"
    lines = [f"{report.file}  {kind}, {report.bytes / 1e6:.1f} MB"]
    for side, values in (("input", report.inputs), ("output", report.outputs)):
        lines += [f"  {side:<8}{name} [{', '.join(map(str, axes))}]" for name, axes in values.items()]
    if report.differences:
        names = list(report.outputs)
        widths = [max(16, len(name) + 2) for name in names]
        heads = "".join(f"{name:>{width}}" for name, width in zip(names, widths))
        lines += ["", f"{'largest difference from torch':<32}{heads}"]
        for d in report.differences:
            values = "".join(f"{d.outputs[name]:>{width}.1e}" for name, width in zip(names, widths))
            ties = f"  {d.beyond:.2%} of the values beyond rounding" if d.beyond else ""
            lines.append(f"  {frame(d, d.batch):<30}{values}{ties}")
    if report.latency is not None:
        latency = report.latency
        threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
        lines += ["", f"one frame of {frame(latency)}, {threads}, median of {latency.runs}"]
        runtime = "onnxruntime" if report.format == "onnx" else "the archive"
        lines += [f"  torch       {latency.torch:8.1f} ms", f"  {runtime:<12}{latency.exported:8.1f} ms"]
    if report.int8 is not None:
        q = report.int8
        shares = [(q.pixels, "{:.2%} of pixels change their label"), (q.voxels, "{:.2%} of voxels change their label")]
        shares.append((q.depth, "depth changes by {:.2%} (median)"))
        told = "; ".join(text.format(share) for share, text in shares if share is not None)
        lines += ["", f"8-bit numbers, {q.kind}: on {q.frames} {q.source} {told}"]
        lines += [f"  onnxruntime {q.onnxruntime_fp32:8.1f} ms in 32 bits, {q.bytes_fp32 / 1e6:.1f} MB"]
        lines += [f"  onnxruntime {q.onnxruntime_int8:8.1f} ms in 8 bits, {report.bytes / 1e6:.1f} MB"]
    return "\n".join(lines)


def frame(sizes: Difference | Latency, batch: int | None = None) -> str:
    """The sizes of a frame in words."""
    told = f"{sizes.width}x{sizes.height}" if batch is None else f"{batch} x {sizes.width}x{sizes.height}"
    return told if sizes.grid is None else f"{told}, {'x'.join(map(str, sizes.grid))}"
