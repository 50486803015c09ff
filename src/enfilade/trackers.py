"""Where a training's curves go beside log.jsonl: TensorBoard, Weights & Biases, MLflow.

A tracker gets the recipe when its run begins, numbers at updates, and the end. The first process alone has any. A run
that is resumed goes on in the same place: `trackers.json` in the run folder keeps the names of its runs. Nothing here
draws random numbers that training sees, or can end it: a tracker that fails on the way is left out, and a line says so.
"""

import importlib.util
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from enfilade.errors import UserError, unknown
from enfilade.images import write_atomic

log = logging.getLogger(__name__)

PROJECT = "enfilade"  # the W&B project and the MLflow experiment, unless the environment names others
STATE = "trackers.json"


@dataclass(frozen=True)
class Start:
    """What a tracker is told when it starts: the run's name and folder, what is trained, whether training goes on from
    a saved state, and the id under which the tracker knows the run from then."""

    name: str
    out: Path
    config: Mapping[str, Any]
    resumed: bool = False
    known: str | None = None


@runtime_checkable
class Tracker(Protocol):
    """One place for curves; made from a `Start`."""

    @property
    def id(self) -> str | None:
        """Kept in the run folder, and given back when the run is resumed."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `events`, under the run folder; every resume adds one."""

    id: str | None = None

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(start.out / "events"))
        if not start.resumed:
            self.writer.add_text("config", f"```\n{json.dumps(start.config, indent=1)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=step)
        self.writer.flush()

    def finish(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; its local files are in `wandb`, under the run folder. WANDB_PROJECT, WANDB_MODE and
    the other variables of its client apply."""

    def __init__(self, start: Start):
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", start.name),
                id=start.known,
                resume="allow",
                config=dict(start.config),
                dir=os.environ.get("WANDB_DIR", str(start.out)),
                settings=wandb.Settings(console="off"),  # the terminal belongs to the progress bar
            )
        except wandb.Error as error:
            text = f"W&B does not start: {first_line(error)}"
            raise UserError(f"{text}; run `wandb login`, or set WANDB_MODE=offline") from error
        self.id: str | None = self.run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of the MLflow server that MLFLOW_TRACKING_URI names; without it, of a store of files in `mlruns`, under the
    run folder. MLFLOW_EXPERIMENT_NAME applies."""

    GROUPS: ClassVar = ("val", "norm", "lr")  # what may stand before a slash in a metric's name, see `metric`

    def __init__(self, start: Start):
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow wants a database instead, for which its small package has no drivers
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (start.out.resolve() / "mlruns").as_uri()
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            if start.known is not None:
                self.id = start.known
                self.client.update_run(self.id, status="RUNNING")
            else:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
                experiment = self.client.get_experiment_by_name(name)
                number = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
                self.id = self.client.create_run(number, run_name=start.name).info.run_id
                for key, value in flat(start.config).items():
                    self.client.log_param(self.id, key.replace("/", "."), str(value)[:6000])  # no more is taken
        except (MlflowException, OSError) as error:
            text = f"MLflow does not start at {uri}: {first_line(error)}"
            raise UserError(f"{text}; check MLFLOW_TRACKING_URI, or leave it out for a store in the folder") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(self.metric(k), v, now, step) for k, v in values.items()])

    def metric(self, name: str) -> str:
        """The loss cross_entropy/s2 as cross_entropy.s2: in a store of files the slash would make cross_entropy, which
        is a file, a folder too."""
        return name if name.split("/")[0] in self.GROUPS else name.replace("/", ".")

    def finish(self, failed: bool) -> None:
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[TensorBoard] | type[WandB] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
# The module of each, and what installs it; TensorBoard is always there.
PACKAGES = {"wandb": ("wandb", "enfilade[wandb]"), "mlflow": ("mlflow", "enfilade[mlflow]")}


class Trackers:
    """Those of one run, together: a context that finishes them. Without any, all of this does nothing."""

    def __init__(self, opened: Mapping[str, Tracker]):
        self.opened = dict(opened)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Give every tracker those of `values` that are numbers."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, Real)}
        self._each("log", numbers, step)

    def finish(self, failed: bool = False) -> None:
        self._each("finish", failed)
        self.opened = {}

    def _each(self, what: str, *arguments: Any) -> None:
        for name, tracker in list(self.opened.items()):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:  # a day's training does not end because a server does
                del self.opened[name]
                log.warning("%s fails, and is left out from here on: %s", name, first_line(error))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.finish(failed=kind is not None)


def check(names: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that `names` asks for, each once; "none" alone is none.

    Raises:
        UserError: an unknown name, "none" beside others, or a package that is not installed.
    """
    names = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    if names == ("none",):
        return ()
    for name in names:
        if name == "none":
            raise UserError("track names either none or trackers, not both")
        if name not in TRACKERS:
            raise unknown("tracker", name, [*TRACKERS, "none"])
        module, package = PACKAGES.get(name, ("torch", ""))
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{name} is not installed: pip install '{package}'")
    return names


def start(names: Sequence[str], out: Path, config: Mapping[str, Any], resumed: bool) -> Trackers:
    """Start the trackers of a run in the folder `out`, which exists. `config` is JSON; `resumed` says that training
    goes on from a saved state, and so the trackers go on with the runs that they had.

    Raises:
        UserError: a tracker that cannot start.
    """
    path = out / STATE
    kept: dict[str, str] = {}
    if resumed and path.is_file():
        try:
            kept = {str(k): str(v) for k, v in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError):
            log.warning("%s cannot be read: the trackers begin new runs", path)
    opened: dict[str, Tracker] = {}
    try:
        for name in names:
            opened[name] = TRACKERS[name](Start(out.resolve().name, out, config, resumed, kept.get(name)))
    except BaseException:
        Trackers(opened).finish(failed=True)
        raise
    ids = (kept if resumed else {}) | {k: t.id for k, t in opened.items() if t.id is not None}
    if ids:
        write_atomic(path, json.dumps(ids, indent=1).encode())
    elif path.is_file():
        path.unlink()
    return Trackers(opened)


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict, with keys as `enfilade train --set` has them: stages.0.lr."""
    if isinstance(config, Mapping) and config:
        pairs = config.items()
    elif isinstance(config, list | tuple) and any(isinstance(v, Mapping) for v in config):
        pairs = enumerate(config)
    else:
        return {name: config}
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}.{key}" if name else str(key)).items()}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
