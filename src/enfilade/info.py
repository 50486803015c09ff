"""What is installed, on which machine, and what can be named on the command line."""

import json
import os
import platform
import struct
from importlib import metadata
from pathlib import Path
from typing import Any

import enfilade
from enfilade import recipes
from enfilade.errors import UserError
from enfilade.shipped import DEFAULT

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "numba", "opencv-python-headless")


def cores() -> int:
    """Processor cores that this process may use: its affinity, and its quota in a container (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return count


def completes(model: str | Path) -> bool:
    """Whether a model file is of a network that completes rooms."""
    from enfilade.checkpoint import COMPLETES, resolve

    return header(resolve(model)).get("model") in COMPLETES


def header(path: str | os.PathLike) -> dict[str, Any]:
    """What a model file says of itself, read without its weights. Raises UserError where it is no model file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            return json.loads(json.loads(file.read(length))["__metadata__"]["enfilade"])
    except FileNotFoundError:
        raise UserError(f"no weight file at {path}") from None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path} is not one of Enfilade's model files, or is damaged ({error})") from error


def model_info(name: str) -> dict[str, Any]:
    """File, size and header of a shipped model, a model file or a run folder."""
    from enfilade.checkpoint import resolve

    path = resolve(name)
    return {"name": name, "file": str(path), "megabytes": path.stat().st_size / 1e6, **header(path)}


def info(model: str | None = None) -> dict[str, Any]:
    """Versions, devices, threads, and the names of models, recipes, tables and data sets, as plain types.

    With `model`, only that model: its file, its constructor's arguments and the scores it was saved with.
    """
    if model is not None:
        return {"model": model_info(model)}
    import torch

    from enfilade.checkpoint import SHIPPED, resolve
    from enfilade.data import READERS
    from enfilade.tables import TABLES

    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    shipped = []
    for name in SHIPPED:
        shipped.append(model_info(name) if resolve(name).is_file() else {"name": name, "file": None})
    return {
        "versions": {"enfilade": enfilade.__version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": cores(),
            "torch_threads": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "gpus": devices,
        },
        "models": shipped,
        "recipes": [_recipe(name) for name in recipes.RECIPES],
        "tables": {name: table.title for name, table in TABLES.items()},
        "data": list(READERS),
    }


def _versions() -> dict[str, str | None]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def _recipe(name: str) -> dict[str, Any]:
    recipe = recipes.get(name)
    stages = [{"name": s.name, "epochs": s.epochs, "size": list(s.size), "batch": s.batch} for s in recipe.stages]
    return {"name": name, "model": recipe.model, "encoder": recipe.arguments.get("encoder"), "stages": stages}


def text(found: dict[str, Any]) -> str:
    """`info()` for reading."""
    if "model" in found:
        return "\n".join(_model(found["model"], everything=True))
    machine = found["machine"]
    lines = ["versions", *(f"  {k:<24}{v or 'not installed'}" for k, v in found["versions"].items())]
    threads = f"{machine['cores']} cores, {machine['torch_threads']} torch threads"
    if machine["OMP_NUM_THREADS"]:
        threads += f" (OMP_NUM_THREADS={machine['OMP_NUM_THREADS']})"
    lines += ["", "machine", f"  {machine['system']} ({machine['vectors']}), {threads}"]
    lines += [f"  GPU {i}: {name}" for i, name in enumerate(machine["gpus"])] or ["  no GPU: runs on the processor"]
    lines += ["", "models (--model NAME, a file, or a run folder)"]
    for model in found["models"]:
        lines += _model(model) if model["file"] else [f"  {model['name']:<24}not in this installation"]
    lines += ["", "recipes (enfilade train NAME)"]
    for recipe in found["recipes"]:
        stages = ", then ".join(f"{s['epochs']} epochs at {s['size'][1]}x{s['size'][0]}" for s in recipe["stages"])
        lines.append(f"  {recipe['name']:<24}{recipe['model']}, {recipe['encoder']}: {stages}")
    lines += ["", "tables (enfilade reproduce NAME)", *(f"  {k:<24}{v}" for k, v in found["tables"].items())]
    lines += ["", "data (--data NAME)", f"  {', '.join(found['data'])}"]
    return "\n".join(lines)


def _model(model: dict[str, Any], everything: bool = False) -> list[str]:
    scores = model.get("scores") or {}
    told = "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, int | float))
    kind = f"{model.get('model')}, labels {model.get('space')}, {model['megabytes']:.1f} MB"
    lines = [f"  {model['name']:<24}{kind}{', the default' if model['name'] == DEFAULT else ''}"]
    lines += [f"    scores  {told}"] if told else []
    if everything:
        rest = {k: v for k, v in model.items() if k not in ("name", "model", "space", "megabytes", "scores")}
        lines += [f"    {k}  {json.dumps(v)}" for k, v in rest.items()]
    return lines
