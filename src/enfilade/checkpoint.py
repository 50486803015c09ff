"""Weights on disk: one safetensors file holds the tensors and, as JSON in its header, how to build the model.

No pickle is ever read. Every write goes to a temporary name and is renamed.
"""

import contextlib
import importlib
import inspect
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from enfilade.errors import UserError, unknown

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
}

# Models that ship inside the package.
SHIPPED: dict[str, str] = {
    "gad-nyuv2": "weights/gad-nyuv2.safetensors",
    "joint-nyuv2": "weights/joint-nyuv2.safetensors",
    "imenet-rooms": "weights/imenet-rooms.safetensors",
    "lrn-camvid": "weights/lrn-camvid.safetensors",
}


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


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Atomic: after a crash the file is the old one or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors wants dense row-major tensors; clones also break storage shared by tied weights
        dense = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(dense, temporary, {"enfilade": json.dumps(meta)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
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
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged or truncated ({error}): copy or download it again") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} is a safetensors file, but not one of Enfilade's models: its header names no model")
    return tensors, meta


def save_model(path: Path, network: nn.Module, meta: dict[str, Any], half: bool = False) -> None:
    """Write weights (fp16 if `half`) and `meta`, which holds at least "model" and "arguments"."""
    tensors = {k: v.half() if half and v.is_floating_point() else v for k, v in network.state_dict().items()}
    # The encoder's own pretrained weights are inside: whoever loads this file does not need them.
    meta = meta | {"arguments": meta["arguments"] | {"weights": None}}
    write(path, tensors, meta)


def resolve(name: str | Path) -> Path:
    """A shipped model's name, a file, or a run folder (its best model)."""
    if str(name) in SHIPPED:
        return Path(__file__).parent / SHIPPED[str(name)]
    path = Path(name)
    if path.is_dir():
        for candidate in ("best.safetensors", "final.safetensors"):
            if (path / candidate).is_file():
                return path / candidate
        raise UserError(f"{path} holds no best.safetensors: has that run passed its first validation?")
    if not path.exists():
        raise unknown("model file or shipped model", str(name), SHIPPED)
    return path


def load(name: str | Path = "gad-nyuv2", device: str | torch.device = "cpu") -> Loaded:
    """Build the model that a file names and fill it, in fp32 and evaluation mode.

    Raises:
        UserError: no such file or model, a damaged file, or weights that do not fit the model that the header names.
    """
    path = resolve(name)
    tensors, meta = read(path)
    if "model" not in meta or "arguments" not in meta:
        raise UserError(f"{path} is no model file: its header lacks 'model' and 'arguments' (is it a training state?)")
    network = build(meta["model"], meta["arguments"])
    wanted = {k: v.shape for k, v in network.state_dict().items()}
    found = {k: v.shape for k, v in tensors.items()}
    if wanted != found:
        wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        text = f"the weights in {path} are of another model than {meta['model']}"
        raise UserError(f"{text}: {len(wrong)} tensors differ, the first is {wrong[0]}")
    network.load_state_dict(tensors)
    return Loaded(network.float().eval().to(device), meta)
