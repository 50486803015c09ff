"""Enfilade: labels, metric depth and a completed 3-D room from one image.

    import enfilade

    model = enfilade.load()
    prediction = model.predict("photo.jpg")
    prediction.labels, prediction.depth, prediction.show()

Importing this package is cheap: torch is imported with the first name that needs it.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names and where they live.
_PUBLIC = {
    "load": "enfilade.predict:load",
    "predict": "enfilade.predict:predict",
    "Predictor": "enfilade.predict:Predictor",
    "Camera": "enfilade.camera:Camera",
    "Prediction": "enfilade.types:Prediction",
    "Sample": "enfilade.types:Sample",
    "Batch": "enfilade.types:Batch",
    "open_dataset": "enfilade.data:open_dataset",
    "train": "enfilade.train:train",
    "finetune": "enfilade.finetune:finetune",
    "evaluate": "enfilade.evaluate:score",
}

__all__ = ["Batch", "Camera", "Prediction", "Predictor", "Sample"]
__all__ += ["evaluate", "finetune", "load", "open_dataset", "predict", "train"]

if TYPE_CHECKING:
    from enfilade.camera import Camera as Camera
    from enfilade.data import open_dataset as open_dataset
    from enfilade.evaluate import score as evaluate
    from enfilade.finetune import finetune as finetune
    from enfilade.predict import Predictor as Predictor
    from enfilade.predict import load as load
    from enfilade.predict import predict as predict
    from enfilade.train import train as train
    from enfilade.types import Batch as Batch
    from enfilade.types import Prediction as Prediction
    from enfilade.types import Sample as Sample


class _Verb(ModuleType):
    """A module that can be called. `predict`, `train`, `finetune` and `evaluate` are modules and public functions of
    one name: importing such a module anywhere would put it in the place of the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _target(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_target(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds each submodule to its package by this
        if name in _PUBLIC and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _target(name: str) -> Any:
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'enfilade' has no attribute {name!r}")
    if _PUBLIC[name].startswith(f"enfilade.{name}:"):
        return importlib.import_module(f"enfilade.{name}")
    return _target(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
