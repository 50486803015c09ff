"""Weights on disk: one safetensors file holds the tensors and, as JSON in its header, how to build the model.

No pickle is ever read. Every write goes to a temporary name and is renamed.
"""

import contextlib
import importlib
import inspect
import json
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from enfilade.errors import UserError, unknown
from enfilade.shipped import DEFAULT, SHIPPED

# What a model file may name. The module is imported when it is needed.
MODELS: dict[str, str] = {
    "gad": "enfilade.models.geometry_distillation:GAD",
    "lrn": "enfilade.models.label_refinement:LRN",
    "segnet": "enfilade.models.label_refinement:SegNet",
    "joint": "enfilade.models.joint_crf:JointCRF",
    "completion": "enfilade.models.completion3d:Completion3d",
    "imenet": "enfilade.models.mutual_enhancement:IMENet",
    "rsn": "enfilade.models.region_support:RSN",
    "fcn8s": "enfilade.models.label_refinement:FCN8s",
    "peer": "enfilade.models.peers:Peer",
    "ensemble": "enfilade.models.ensemble:Ensemble",
}

COMPLETES = ("completion", "imenet")  # those that complete rooms

SPARE = 4_000_000  # numbers that a constructor may make beyond four times those of its file


@dataclass(frozen=True)
class Loaded:
    """A network in evaluation mode and what its file says of it (`meta`: model, arguments, space, size, focal, ...)."""

    network: nn.Module
    meta: dict[str, Any]


def build(model: str, arguments: dict[str, Any]) -> nn.Module:
    """Construct a model by its name in `MODELS`."""
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    module, name = MODELS[model].split(":")
    constructor = getattr(importlib.import_module(module), name)
    if strange := arguments.keys() - inspect.signature(constructor).parameters.keys():
        raise unknown(f"argument of {model}", sorted(strange)[0], inspect.signature(constructor).parameters)
    return constructor(**arguments)


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write and flush. The function of this name in safetensors writes to a name of its own first, which stays behind
    where the process is killed, and leaves a file that only its owner may read."""
    with open(path, "wb") as file:
        file.write(save(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Atomic: after a crash the file is the old one or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors wants dense row-major tensors; clones also break storage shared by tied weights
        dense = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(dense, temporary, {"enfilade": json.dumps(meta)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; choose a folder that you may write to") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is a file, the error above says so
            temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON header of a file that `write` made.

    Raises:
        UserError: missing, truncated, a pickle, or a safetensors file that is not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    with open(path, "rb") as file:
        head = file.read(9)
    # Eight bytes of length and then JSON are safetensors, even where the length looks like a pickle (640 is 80 02)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[8:] != b"{":
        raise UserError(f"{path} is a pickle, which can run code when it is read: convert it to safetensors first")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("enfilade", "null"))
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is damaged or truncated ({_reason(error)}): copy or download it again") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} is a safetensors file, but not one of Enfilade's models: its header names no model")
    return tensors, meta


def save_model(path: Path, network: nn.Module, meta: dict[str, Any], half: bool = False) -> None:
    """Write weights (fp16 if `half`) and `meta`, which holds at least "model" and "arguments"."""
    tensors = {k: v.half() if half and v.is_floating_point() else v for k, v in network.state_dict().items()}
    # The encoder's own pretrained weights are inside: whoever loads this file does not need them.
    write(path, tensors, meta | {"arguments": without_files(meta["arguments"])})


def resolve(name: str | Path) -> Path:
    """A shipped model's name, a file, a folder (a run's best model, or `hub.save`'s), or hf://user/name, fetched."""
    if str(name) in SHIPPED:
        return Path(__file__).parent / SHIPPED[str(name)]
    if str(name).startswith("hf://"):
        from enfilade.hub import fetch

        return fetch(str(name))
    path = Path(name)
    if path.is_dir():
        for candidate in ("best.safetensors", "final.safetensors", "model.safetensors"):
            if (path / candidate).is_file():
                return path / candidate
        raise UserError(f"{path} holds no best.safetensors: has that run passed its first validation?")
    if not path.exists():
        raise unknown("model file or shipped model", str(name), SHIPPED)
    return path


def _reason(error: Exception) -> str:
    """The first line, shortened: it may quote the file."""
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return line if len(line) <= 150 else f"{line[:150]}..."


def _check(meta: dict[str, Any], path: Path) -> None:
    """Raise UserError for a header whose values could not be used later on."""

    def number(value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6

    size = meta.get("size", [1, 1])
    wrong = [
        name
        for name, well in (
            ("model", isinstance(meta["model"], str)),
            ("arguments", isinstance(meta["arguments"], dict)),
            ("space", isinstance(meta.get("space", ""), str)),
            ("size", isinstance(size, list) and len(size) == 2 and all(number(side) for side in size)),
            ("focal", meta.get("focal") is None or number(meta["focal"])),
            ("scale", meta.get("scale") is None or number(meta["scale"])),
            ("crf", isinstance(meta.get("crf", False), bool)),
            ("ignored", isinstance(meta.get("ignored", []), list)),
        )
        if not well
    ]
    if wrong:
        told = _reason(ValueError(repr(meta[wrong[0]])))
        raise UserError(f"{path} is no model file: its header's {wrong[0]!r} makes no sense ({told})")


@contextlib.contextmanager
def _at_most(limit: int, path: Path):
    """Raise UserError as soon as modules that this thread builds hold more than `limit` numbers. Memory that nobody has
    written to yet costs nothing, so it is early enough."""
    thread, count = threading.get_ident(), 0

    def counted(module, name, parameter) -> None:
        nonlocal count
        if threading.get_ident() == thread and parameter is not None:
            count += parameter.numel()
            if count > limit:
                raise UserError(f"{path} describes a model far larger than the weights in it: make it anew")

    hook = nn.modules.module.register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def load(name: str | Path = DEFAULT, device: str | torch.device = "cpu") -> Loaded:
    """Build the model that a file names and fill it, in fp32 and evaluation mode.

    Raises:
        UserError: no such file or model, a damaged file, or weights that do not fit the model that the header names.
    """
    path = resolve(name)
    tensors, meta = read(path)
    if "model" not in meta or "arguments" not in meta:
        raise UserError(f"{path} is no model file: its header lacks 'model' and 'arguments' (is it a training state?)")
    _check(meta, path)
    # Whoever made the file chose its words: none of them may read another file, or ask for the machine's memory
    arguments = without_files(meta["arguments"])
    try:
        with _at_most(SPARE + 4 * sum(v.numel() for v in tensors.values()), path):
            network = build(meta["model"], arguments)
    except UserError:
        raise
    except Exception as error:  # a constructor may raise anything where its arguments are not what it thinks
        raise UserError(f"{path} describes a model that cannot be built ({_reason(error)}): make it anew") from error
    wanted = {k: v.shape for k, v in network.state_dict().items()}
    found = {k: v.shape for k, v in tensors.items()}
    if wanted != found:
        wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        text = f"the weights in {path} are of another model than {meta['model']}"
        raise UserError(f"{text}: {len(wrong)} tensors differ, the first is {wrong[0]}")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:  # of a type that cannot become the model's
        raise UserError(f"the weights in {path} do not fit their model ({_reason(error)}): make it anew") from error
    return Loaded(network.float().eval().to(device), meta)


def without_files(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, but for the name of the file of pretrained weights that it would read."""
    return {k: None if k == "weights" else v for k, v in arguments.items()}


def leave_out_crf(network: nn.Module) -> None:
    """Take the dense CRF off a network that ends in one; others stay as they are."""
    if hasattr(network, "crf"):
        network.crf = None  # pyright: ignore[reportArgumentType]
