"""Changes to a recipe in text, as the command line gives them: `stages.0.epochs=3`, `seed=1`.

A path names a field of `Recipe`, then of `Stage`, then a key of a dictionary. Stages go by number, by name, or all of
them by `*`. Every value is checked against the type of its field, and a name that does not exist against those that
do, before anything is built.
"""

import collections.abc
import dataclasses
import importlib
import inspect
import json
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from enfilade import labels
from enfilade.errors import UserError, unknown
from enfilade.stages import Recipe, Stage

# Fields of a stage or a recipe that must be larger than zero.
POSITIVE = ("epochs", "size", "zoom", "batch", "accumulate", "lr", "scale", "focal", "step_epochs", "evaluate_every")


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """`recipe` with `PATH=VALUE` assignments applied in order.

    Values are JSON (`0.5`, `true`, `null`, `[240, 320]`, `{"focal": 1}`), a list without brackets (`240,320`) or bare
    text (`adamw`).

    Raises:
        UserError: no such field, stage or key (with the nearest), or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise UserError(f"{assignment!r} is no assignment: write PATH=VALUE, for example stages.0.epochs=3")
        recipe = _set(recipe, keys, text.strip(), path.strip())
    return recipe


def _set(holder: Any, keys: list[str], text: str, path: str) -> Any:
    """`holder` (a recipe or a stage) with the field `keys[0]`, or what lies below it, changed."""
    kind = "stage" if isinstance(holder, Stage) else "recipe"
    hints = typing.get_type_hints(type(holder))
    key, below = keys[0], keys[1:]
    if key not in hints:
        raise unknown(f"field of a {kind}", key, hints)
    old: Any = getattr(holder, key)
    new: Any
    if key == "stages":
        new = _stages(old, below, text, path)
    elif isinstance(old, dict) and below:
        if len(below) > 1:
            raise UserError(f"{path}: {key} has keys but nothing below them")
        new = old | {below[0]: _entry(holder, key, below[0], text, path)}
    elif below:
        raise UserError(f"{path}: {key} has nothing below it")
    elif key == "arguments":
        raise UserError(f"{path}: give one argument at a time, for example arguments.dropout=0.1")
    else:
        new = convert(parse(text), hints[key], path)
    if key in POSITIVE and new is not None:
        values = new if isinstance(new, tuple) else (new,)
        if not all(0 < value < math.inf for value in values):
            raise UserError(f"{path} must be larger than 0, not {text}")
    changed: Any = dataclasses.replace(holder, **{key: new})
    if key == "losses":
        _known_losses(changed.losses)
    if key == "model":
        _constructor(changed.model)
    if key == "space":
        labels.get(changed.space)
    return changed


def _stages(stages: tuple[Stage, ...], keys: list[str], text: str, path: str) -> tuple[Stage, ...]:
    if len(keys) < 2:
        raise UserError(f"{path}: name a stage and its field, for example stages.0.epochs=3 or stages.*.batch=4")
    which = keys[0]
    names = [stage.name for stage in stages]
    if which == "*":
        chosen = range(len(stages))
    elif which.isdigit() and int(which) < len(stages):
        chosen = [int(which)]
    elif which in names:
        chosen = [names.index(which)]
    else:
        raise unknown("stage", which, [*names, *(str(i) for i in range(len(stages))), "*"])
    return tuple(_set(s, keys[1:], text, path) if i in chosen else s for i, s in enumerate(stages))


def _entry(holder: Recipe | Stage, field: str, key: str, text: str, path: str) -> Any:
    """The value of one key of a dictionary: a number, or an argument of the model's constructor."""
    if not isinstance(holder, Recipe):
        return convert(parse(text), float, path)
    constructor = _constructor(holder.model)
    known = [k for k in inspect.signature(constructor).parameters if k != "self"]
    if key not in known:
        raise unknown(f"argument of model {holder.model}", key, known)
    return convert(parse(text), typing.get_type_hints(constructor)[key], path)


def _constructor(model: str) -> Any:
    from enfilade.checkpoint import MODELS

    if model not in MODELS:
        raise unknown("model", model, MODELS)
    module, name = MODELS[model].split(":")
    return getattr(importlib.import_module(module), name).__init__


def _known_losses(losses: dict[str, float]) -> None:
    from enfilade.losses import resolve

    for name in losses:
        resolve(name)


def parse(text: str) -> Any:
    """JSON; else a list of such values, if there are commas; else the text itself."""
    spelled = {"True": True, "False": False, "None": None, "none": None}
    if text in spelled:
        return spelled[text]
    try:
        return json.loads(text)
    except ValueError:
        return [parse(part.strip()) for part in text.split(",")] if "," in text else text


def convert(value: Any, wanted: Any, path: str) -> Any:
    """`value`, as JSON has it, as the type `wanted`: a whole number may stand for a float, and one value for a tuple
    of one. Raises UserError that names `path`."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin is typing.Literal:
        text = "no" if value is False and "no" in arguments else value
        if text not in arguments:
            raise unknown(f"choice for {path}", str(value), [str(a) for a in arguments])
        return text
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), path)
    if origin in (tuple, list, collections.abc.Sequence):
        values = value if isinstance(value, list) else [value]
        fixed = origin is tuple and arguments[-1] is not ...
        kinds = list(arguments) if fixed else [arguments[0]] * len(values)
        if len(values) != len(kinds):
            raise UserError(f"{path} takes {len(kinds)} values, not {len(values)}: {value!r}")
        return tuple(convert(v, kind, path) for v, kind in zip(values, kinds))
    if origin is dict and isinstance(value, dict):
        return {str(k): convert(v, arguments[1], f"{path}.{k}") for k, v in value.items()}
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted in (int, bool, str) and type(value) is wanted:
        return value
    if wanted is str and not isinstance(value, list | dict):
        return str(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{path} is {words.get(wanted, 'a table of names and numbers')}, not {value!r}")
