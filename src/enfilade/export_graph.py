"""What an exported network takes and answers, by name, and the `torch.export` program that every file is made from."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import enfilade
from enfilade.complete import raise_truth
from enfilade.errors import UserError
from enfilade.models.completion3d import CVAE, Completion3d, SketchNet
from enfilade.models.mutual_enhancement import Correction
from enfilade.ops import deform
from enfilade.ops.voxels import FACTOR, SHAPE
from enfilade.predict import Predictor

# Every input that a network may have: a name stands for a free size, and one name for one size
AXES: dict[str, tuple[str | int, ...]] = {
    "image": ("batch", 3, "height", "width"),
    "hha": ("batch", 3, "height", "width"),
    "support": ("batch", "height", "width"),
    "labels": ("batch", "height", "width"),
    "tsdf": ("batch", 1, "x", "y", "z"),
    "voxels": ("batch", "height", "width"),
    "pixels": ("batch", "x_out", "y_out", "z_out"),
}
WHOLE = ("labels", "voxels", "pixels")  # int64; all others are float32
OUTPUTS = {  # what follows the batch: "k" are the classes; every other size is the output's own
    "probabilities": ("k", "height", "width"),
    "depth": ("height", "width"),
    "depth_spread": ("height", "width"),
    "volume_probabilities": ("k", "x", "y", "z"),
}
ABOUT = {
    "image": "RGB in [0, 1], of any size; best at about the area of 'size' in the metadata",
    "hha": "the HHA maps of the same frames, divided by 255",
    "support": "region support: metres for a camera of 'focal' pixels, each region at its mean depth, 0 at void",
    "labels": "labels of the pixels, 255 where there is none",
    "tsdf": "flipped truncated signed distances at voxels of 2 cm, in training 240 x 144 x 240; sides that 4 divides",
    "voxels": "of each pixel, the flat number of its point's voxel in the output grid, a quarter of the TSDF's; or -1",
    "pixels": "of each voxel of the output grid, the flat number of its pixel; -1 out of view",
    "probabilities": "of the classes 'names' in the metadata, at the network's own resolution, which may be lower than "
    "the image's: resize bilinearly (half-pixel centres), then take the arg max",
    "depth": "metres for a camera whose focal length at this input is 'focal' pixels; for another, of f pixels, "
    "multiply by f / focal",
    "depth_spread": "metres, as depth: standard deviation over the network's iterations",
    "volume_probabilities": "of the classes 'names' at each voxel of the output grid; 0 is empty",
}


@dataclass(frozen=True)
class Size:
    """Sizes of a network's inputs; `grid` is the TSDF's."""

    batch: int
    height: int
    width: int
    grid: tuple[int, int, int] = SHAPE


def inputs_of(network: nn.Module) -> tuple[str, ...]:
    """The names of a network's inputs, in order."""
    if isinstance(network, Completion3d):  # takes an image for the training loop's sake only
        return ("tsdf",)
    return "image", *getattr(network, "uses", ())


def chooses(network: nn.Module) -> bool:
    """Whether the network takes an arg max on its way. Between two classes that are all but equal rounding decides,
    so that single places of its answers may differ between two programs that are both right."""
    return any(isinstance(m, Correction | SketchNet) for m in network.modules())


def refuse(network: nn.Module) -> None:
    """Raises UserError for a network that no file can hold, and says why."""
    if getattr(network, "crf", None) is not None:
        raise UserError(
            "this network ends in a dense CRF, whose permutohedral lattice has no operator in ONNX or torch.export: "
            "export it without (--no-crf)"
        )
    if needs := {"labels", "volume"} & set(inputs_of(network)) if hasattr(network, "truth") else set():
        raise_truth(needs)
    if any(isinstance(m, CVAE) and not m.deterministic for m in network.modules()):
        raise UserError("this network draws random codes, no two answers alike: export one with deterministic=True")


class Answers(nn.Module):
    """A network from the tensors of `inputs_of`, in order, to a tuple of its outputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.names = network, inputs_of(network)

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The answers by their names in `OUTPUTS`, as far as the network has them."""
        given: dict[str, Any] = {"image": None} | dict(zip(self.names, inputs))
        output = self.network(**given)
        found = {"probabilities": output.logits, "depth": output.depth, "volume_probabilities": output.volume_logits}
        found = {k: x.float() if k == "depth" else x.float().softmax(1) for k, x in found.items() if x is not None}
        if output.side_depths and (count := getattr(self.network, "iterations", 0)) > 1:  # as `Predictor` has it
            steps = [*output.side_depths, output.depth][-count:]
            found["depth_spread"] = torch.stack(steps).float().std(0, correction=0)
        return {name: found[name] for name in OUTPUTS if name in found}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(*inputs).values())


def example(predictor: Predictor, size: Size) -> dict[str, np.ndarray]:
    """Noise for every input, of its range: holes, void and pixels without a voxel among it."""
    rng = np.random.default_rng(0)
    cells, b, h, w = tuple(n // FACTOR for n in size.grid), size.batch, size.height, size.width
    made = {}
    for name in inputs_of(predictor.network):
        if name in ("image", "hha"):
            made[name] = rng.random((b, 3, h, w), np.float32)
        elif name == "support":
            made[name] = 5 * rng.random((b, h, w), np.float32) * (rng.random((b, h, w)) > 0.1)
        elif name == "labels":
            classes = len(predictor.space.names)
            labels = rng.integers(0, classes + 1, (b, h, w))
            made[name] = np.where(labels < classes, labels, 255)
        elif name == "tsdf":
            made[name] = 2 * rng.random((b, 1, *size.grid), np.float32) - 1
        elif name == "voxels":
            made[name] = rng.integers(-1, int(np.prod(cells)), (b, h, w))
        else:
            made[name] = rng.integers(-1, h * w, (b, *cells))
    return made


@torch.inference_mode()
def answers(network: nn.Module, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch's answers to one feed."""
    found = Answers(network).named(*(torch.from_numpy(x) for x in feed.values()))
    return {name: x.numpy() for name, x in found.items()}


# --- the program ------------------------------------------------------------------------------------------------------


def trace(predictor: Predictor) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The network as a program of torch's own operators, for free sizes, and the names of its outputs. The errors are
    torch's own."""
    # Odd sizes, and no 1: torch takes a size of 1 for a constant
    feed = example(predictor, Size(2, 97, 131, (24, 16, 32)))
    outputs = list(answers(predictor.network, feed))
    free = tuple({i: torch.export.Dim.DYNAMIC for i, n in enumerate(AXES[k]) if isinstance(n, str)} for k in feed)
    with quiet(), torch.no_grad():
        network = with_constant_padding(copy.deepcopy(predictor.network))
        network = network.to(memory_format=torch.contiguous_format)  # pyright: ignore
        tensors = tuple(torch.from_numpy(x) for x in feed.values())
        program = torch.export.export(Answers(network).eval(), tensors, dynamic_shapes=(free,))
        if deforms(program):
            own = torch.ops.enfilade.deform_conv3d.default
            program = program.run_decompositions({own: deform.in_plain_operators})
    return program, outputs


def deforms(program: torch.export.ExportedProgram) -> bool:
    return any("enfilade" in str(node.target) for node in program.graph.nodes)


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
    names = ("torch", "torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
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


def cannot(predictor: Predictor, format: str, error: Exception) -> UserError:
    """The error in one sentence: torch's own messages span screens, and its exporter raises many kinds."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"this network ({type(predictor.network).__name__}) cannot be exported to {format}: {reason}")


# --- what a file says of itself ---------------------------------------------------------------------------------------


def description(predictor: Predictor) -> dict[str, Any]:
    """What it takes to use a file, in plain types: names and colours of the classes, size [height, width] and focal
    length (pixels) of training, the label space, the licence of the weights, and what made the file."""
    meta, space = predictor.meta, predictor.space
    told: dict[str, Any] = {
        "description": "what each pixel or voxel shows, or how far it is; see the remarks at inputs and outputs",
        "enfilade": enfilade.__version__,
        "space": space.name,
        "names": list(space.names),
        "colours": ["#" + bytes(colour).hex() for colour in space.colours],
        "size": list(meta["size"]),
    }
    if "tsdf" not in inputs_of(predictor.network):
        told["focal"] = predictor.focal
    return told | {key: meta[key] for key in ("model", "recipe", "license", "ignored") if meta.get(key) is not None}


def output_axes(name: str, axes: Sequence[int | str]) -> list[int | str]:
    """The sizes of an output, with names for those that are free; `axes` are as the exporter has them."""
    inner = OUTPUTS[name]
    return ["batch", *(axes[i + 1] if side == "k" else f"{name}_{side}" for i, side in enumerate(inner))]
