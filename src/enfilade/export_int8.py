"""An ONNX graph whose convolutions are of 8-bit numbers, for processors: smaller, faster, and not quite the same.

* Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR 2018
  (the scheme, as onnxruntime has it: weights of 8 bits a channel, maps of 8 bits)

Static quantisation fixes the range of every map by what it is on some frames; dynamic quantisation finds it anew for
every image, which costs about what it gains. Three kinds of convolutions stay in floats: those of an encoder with
depthwise convolutions, whose narrow maps lose most and cost least; the last one before each output; and those of
volumes, which are slower in 8 bits.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from enfilade import images
from enfilade.data import ROOM_SEEDS
from enfilade.data.rooms import room
from enfilade.data.volumes import encode
from enfilade.errors import UserError
from enfilade.export_check import CHECKS, Run, median_ms
from enfilade.export_graph import Answers, answers, example, inputs_of
from enfilade.models.encoders import Encoder
from enfilade.ops.hha import hha
from enfilade.ops.regions import region_support
from enfilade.predict import Predictor

KINDS = ("static", "dynamic")
ROOMS = {"train": 16, "test": 8}  # rendered rooms that fix the ranges, and others that the result is judged by
LIMIT = 0.1  # of labels that change, and of depth: beyond it the file is another network


@dataclass(frozen=True)
class Quantised:
    """What the 8-bit file answers otherwise than torch in 32 bits, on frames that its ranges were not taken from.
    Shares of pixels and voxels whose likeliest class changes, the median of |difference| / depth; None where the
    network has no such output. Medians of milliseconds for one frame, in turns, and the size of the 32-bit file."""

    kind: str
    frames: int
    source: str  # of the frames: "rendered rooms" or "photos"
    pixels: float | None
    voxels: float | None
    depth: float | None
    bytes_fp32: int
    onnxruntime_fp32: float
    onnxruntime_int8: float


# --- frames -----------------------------------------------------------------------------------------------------------


def frames(
    predictor: Predictor, photos: Sequence[str | Path] = ()
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Feeds to take the ranges from, and others to judge by: rendered rooms, or every other photo.

    Raises:
        UserError: fewer than two photos, one that cannot be read, or a network that takes more than an image.
    """
    names = inputs_of(predictor.network)
    if not photos:
        fixing, judging = ([of_room(predictor, ROOM_SEEDS[k][0] + i) for i in range(n)] for k, n in ROOMS.items())
        return fixing, judging
    if names != ("image",):
        raise UserError(f"photos do not tell {' and '.join(names[1:] or names)}: leave --calibrate out to take rooms")
    found = images.find(photos)
    if len(found) < 2:
        raise UserError("to calibrate by photos, give two or more: half of them fix the ranges, half judge the result")
    feeds = [{"image": predictor.prepare(images.read(path).rgb)[None]} for path in found]
    return feeds[::2], feeds[1::2]


def of_room(predictor: Predictor, seed: int) -> dict[str, np.ndarray]:
    """What the network takes of a rendered room."""
    height, width = (int(side) for side in predictor.meta["size"])
    names = inputs_of(predictor.network)
    volumes = "tsdf" in names
    sample = room(seed, width=width, height=height, voxels=volumes, threads=1)
    assert sample.depth is not None
    assert sample.labels is not None
    assert sample.camera is not None
    if volumes:
        sample = encode(sample, space="nyu40")
        made = sample.completion
        assert made is not None
        found = {"image": sample.image.transpose(2, 0, 1), "tsdf": made.tsdf[None]}
        found |= {"voxels": made.voxels.astype(np.int64), "pixels": made.pixels.astype(np.int64)}
        return {name: np.ascontiguousarray(found[name])[None] for name in names}
    found = {"image": predictor.prepare(sample.image)}
    if "hha" in names:
        found["hha"] = predictor.prepare(hha(sample.depth, sample.camera).astype(np.float32) / 255)
    if "support" in names:
        support = region_support(sample.labels, sample.depth)
        found["support"] = predictor.plane("support", support, sample.camera, 1.0)[0]
    if "labels" in names:
        found["labels"] = predictor.plane("labels", sample.labels, sample.camera, 1.0)[0].astype(np.int64)
    return {name: found[name][None] for name in names}


# --- the graph --------------------------------------------------------------------------------------------------------


def quantise(proto: Any, network: nn.Module, kind: str, feeds: Sequence[dict[str, np.ndarray]]) -> Any:
    """The graph with 8-bit convolutions, an `onnx.ModelProto`. `feeds` fix the ranges of a static one.

    Raises:
        UserError: onnxruntime cannot quantise it.
    """
    import onnx
    from onnxruntime import quantization as q

    spared = in_floats(proto.graph, network)
    options: dict[str, Any] = {"op_types_to_quantize": ["Conv"], "nodes_to_exclude": spared}
    with tempfile.TemporaryDirectory() as folder, silent():
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        try:
            if kind == "dynamic":  # signed weights run several times slower
                q.quantize_dynamic(source, target, weight_type=q.QuantType.QUInt8, **options)
            else:
                options |= {"per_channel": True, "weight_type": q.QuantType.QInt8}
                q.quantize_static(source, target, reader(feeds), activation_type=q.QuantType.QUInt8, **options)
            made = onnx.load(target)
        except Exception as error:  # onnxruntime's tools raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"onnxruntime cannot quantise this network: {reason}") from error
    del made.graph.value_info[:]
    kept = [entry for entry in made.metadata_props if not entry.key.startswith("onnx.")]
    del made.metadata_props[:]
    made.metadata_props.extend(kept)
    made.metadata_props.add(key="int8", value=kind)
    made.producer_name, made.producer_version = proto.producer_name, proto.producer_version
    return made


def in_floats(graph: Any, network: nn.Module) -> list[str]:
    """The names of the convolutions that keep their 32 bits."""
    fragile = []
    for name, module in Answers(network).named_modules():
        if isinstance(module, Encoder) and any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in module.modules()):
            fragile.append(name + ".")
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    spared = [n.name for n in convs if ranks.get(n.input[1], 5) == 5 or n.input[1].startswith(tuple(fragile))]
    makers = {out: node for node in graph.node for out in node.output}
    last, seen, waiting = [], set(), [value.name for value in graph.output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type == "Conv":
            last.append(node.name)
        else:
            waiting += node.input
    return spared + last


def reader(feeds: Sequence[dict[str, np.ndarray]]) -> Any:
    """The feeds as onnxruntime's calibration reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore
            return next(self.rest, None)

    return Reader()


@contextmanager
def silent() -> Iterator[None]:
    """Without the warnings that onnxruntime's tools log to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# --- the verdict ------------------------------------------------------------------------------------------------------


def changes(
    want: Sequence[dict[str, np.ndarray]], have: Sequence[dict[str, np.ndarray]]
) -> tuple[float | None, float | None, float | None]:
    """Of the answers to several frames: shares of pixels and of voxels whose likeliest class differs, and the median
    of |difference| / depth; None where there is no such answer."""

    def differing(name: str) -> float | None:
        if name not in want[0]:
            return None
        return float(np.mean([(a[name].argmax(1) != b[name].argmax(1)).mean() for a, b in zip(want, have)]))

    depth = None
    if "depth" in want[0]:
        relative = [np.abs(a["depth"] - b["depth"]) / np.maximum(a["depth"], 1e-3) for a, b in zip(want, have)]
        depth = float(np.median(np.concatenate([x.ravel() for x in relative])))
    return differing("probabilities"), differing("volume_probabilities"), depth


def judge(
    predictor: Predictor,
    fp32: Run,
    int8: Run,
    feeds: Sequence[dict[str, np.ndarray]],
    runs: int,
    *,
    kind: str,
    source: str,
    size: int,
) -> Quantised:
    """Compare the 8-bit graph `int8` with torch on `feeds`, and time it beside the 32-bit graph `fp32`, whose file has
    `size` bytes.

    Raises:
        UserError: it answers in other shapes at some size, or too often otherwise (`LIMIT`).
    """
    for check in CHECKS:
        feed = example(predictor, check)
        shapes = [[list(x.shape) for x in run(feed)] for run in (fp32, int8)]
        if shapes[0] != shapes[1]:
            raise UserError(f"in 8-bit numbers the answers are {shapes[1]}, not {shapes[0]}: please report this")
    want = [answers(predictor.network, feed) for feed in feeds]
    pixels, voxels, depth = changes(want, [dict(zip(want[0], int8(feed))) for feed in feeds])
    for share, what in (
        (pixels, "the label of {} of the pixels"),
        (voxels, "{} of the voxels"),
        (depth, "depth by {}"),
    ):
        if share is not None and not share <= LIMIT:
            raise UserError(
                f"8-bit numbers ({kind}) change {what.format(f'{share:.0%}')} of {source}, more than {LIMIT:.0%}: "
                "export without --int8, take another kind, or calibrate on photos like those to come"
            )
    feed = feeds[0]
    medians = median_ms((lambda: fp32(feed), lambda: int8(feed)), runs)
    return Quantised(kind, len(feeds), source, pixels, voxels, depth, size, *medians)
