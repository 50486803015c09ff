"""Curves go where the flag says: read back from TensorBoard, W&B and MLflow as their own readers see them."""

import json
import logging
import struct
from pathlib import Path

import pytest
import torch

from enfilade import trackers
from enfilade import train as training
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.trackers import Start, Trackers, check, flat
from test_train import Boards, Scored, run, stage, tiny


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    """No variable of the machine sends a test's numbers elsewhere."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


class Fake:
    """Remembers what it is told. `broken` fails at the first numbers."""

    made: "list[Fake]" = []  # noqa: RUF012  (emptied by `fakes`)
    broken = False

    def __init__(self, start: Start):
        self.start, self.told, self.ended = start, [], None
        self.id = start.known or f"run {len(self.made)}"
        self.made.append(self)

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("the server is gone.\nA traceback of it")
        self.told.append((step, dict(values)))

    def finish(self, failed):
        self.ended = failed

    @property
    def losses(self):
        return {step: values["cross_entropy"] for step, values in self.told if "cross_entropy" in values}


class Broken(Fake):
    broken = True


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(Fake, "made", [])
    for name, kind in (("fake", Fake), ("broken", Broken)):
        monkeypatch.setitem(trackers.TRACKERS, name, kind)
    return Fake.made


def jsonl(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def told_in_jsonl(folder, key="cross_entropy"):
    return {r["update"]: r[key] for r in jsonl(folder) if key in r}


# What a tracker is told


def test_a_tracker_is_told_the_recipe_the_curves_and_the_end(tmp_path, fakes, monkeypatch):
    answers = iter([{"miou": 0.1, "rmse": 0.9}, {"miou": 0.2, "rmse": 0.8}])
    monkeypatch.setattr(training, "validate", lambda *_: next(answers))
    recipe = tiny(stage(epochs=2, lr=0.01, lr_parts={"trunk": 0.5}, evaluate_every=1))
    run(recipe, Scored(4), tmp_path / "mine", val_data=Scored(2), track="fake", log_every=1)
    (fake,) = fakes
    assert fake.ended is False
    assert (fake.start.name, fake.start.known, fake.start.resumed) == ("mine", None, False)
    assert fake.start.config["stages"][0]["lr"] == 0.01
    assert fake.start.config["data"] == {"train": "boards/val", "val": "boards/val"}
    assert fake.losses == told_in_jsonl(tmp_path / "mine")
    assert set(fake.losses) == {1, 2, 3, 4}
    scores = [(step, {k.removeprefix("val/"): x for k, x in v.items()}) for step, v in fake.told if "val/miou" in v]
    assert scores == [(r["update"], r["val"]) for r in jsonl(tmp_path / "mine") if "val" in r]
    assert [step for step, _ in scores] == [2, 4]
    for step, values in fake.told:
        if "cross_entropy" in values:
            factor = training.learning_rate(recipe.stages[0], step - 1, 4, 2)
            assert values["lr/semantic"] == pytest.approx(0.01 * factor)
            assert values["lr/trunk"] == pytest.approx(0.005 * factor)
            assert {"norm/trunk", "norm/spf", "images_per_second"} <= values.keys()
    assert not (tmp_path / "mine" / "events").exists()


def test_resumed_it_goes_on_with_its_run(tmp_path, fakes):
    recipe = tiny(stage(epochs=2))
    run(recipe, Boards(4), tmp_path / "whole", track="fake", log_every=1)
    whole = fakes.pop()
    run(recipe, Boards(4), tmp_path / "cut", track="fake", log_every=1, stop_after=3)
    run(recipe, Boards(4), tmp_path / "cut", track="fake", log_every=1)
    first, second = fakes
    assert first.losses | second.losses == whole.losses
    assert not first.losses.keys() & second.losses.keys()
    assert (second.start.resumed, second.start.known) == (True, first.id)
    run(recipe, Boards(4), tmp_path / "cut", track="fake")
    assert len(fakes) == 2  # a finished run bothers nobody
    run(recipe, Boards(4), tmp_path / "cut", track="fake", resume=False)
    assert (fakes[2].start.resumed, fakes[2].start.known) == (False, None)
    assert json.loads((tmp_path / "cut" / "trackers.json").read_text()) == {"fake": fakes[2].id}


def test_a_tracker_named_later_keeps_the_ids_of_the_others(tmp_path, fakes, caplog):
    path = tmp_path / "trackers.json"
    path.write_text('{"wandb": "kept", "fake": "known"}')
    trackers.start(["fake"], tmp_path, {}, resumed=True)
    assert fakes[0].start.known == "known"
    assert json.loads(path.read_text()) == {"wandb": "kept", "fake": "known"}
    path.write_text('{"fake": ')
    with caplog.at_level(logging.WARNING):
        trackers.start(["fake"], tmp_path, {}, resumed=True)
    assert fakes[1].start.known is None
    assert "begin new runs" in caplog.text
    trackers.start([], tmp_path, {}, resumed=False)
    assert not path.exists()  # an id of a run that was started over


def test_a_failing_tracker_is_left_out_and_training_goes_on(tmp_path, fakes, caplog):
    recipe = tiny(stage(epochs=1))
    with caplog.at_level(logging.WARNING):
        result = run(recipe, Boards(6), tmp_path / "a", track=("broken", "fake"), log_every=1)
    assert result["complete"]
    assert [r.getMessage() for r in caplog.records if "fails" in r.getMessage()] == [
        "broken fails, and is left out from here on: the server is gone"
    ]
    assert len(fakes[1].losses) == 3
    run(recipe, Boards(6), tmp_path / "b", track="none")
    for name in ("last", "final"):
        assert (tmp_path / "a" / f"{name}.safetensors").read_bytes() == (
            tmp_path / "b" / f"{name}.safetensors"
        ).read_bytes()


def test_the_end_is_told_also_when_training_breaks(tmp_path, fakes):
    with pytest.raises(UserError, match="diverged"):
        run(tiny(stage(epochs=1)), Boards(2, spoil={0: "nan image", 1: "nan image"}), tmp_path, track="fake")
    assert fakes[0].ended is True


def test_one_that_cannot_start_ends_those_before_it(tmp_path, fakes, monkeypatch):
    def refuse(start):
        raise UserError("no")

    monkeypatch.setitem(trackers.TRACKERS, "refusing", refuse)
    with pytest.raises(UserError, match="no"):
        trackers.start(["fake", "refusing"], tmp_path, {}, resumed=False)
    assert fakes[0].ended is True
    assert not (tmp_path / "trackers.json").exists()


def test_only_numbers_are_told():
    with Trackers({"fake": Fake(Start("n", Path("."), {}))}) as both:
        both.log({"a": 1, "b": torch.tensor(2.0).item(), "c": None, "d": "text"}, 7)
        (fake,) = both.opened.values()
    assert fake.told == [(7, {"a": 1.0, "b": 2.0})]
    assert fake.ended is False


def test_nested_settings_have_the_keys_of_set():
    config = {"a": 1, "b": {"c": (1, 2), "d": {}}, "stages": ({"lr": 0.1}, {"lr": 0.2})}
    assert flat(config) == {"a": 1, "b.c": (1, 2), "b.d": {}, "stages.0.lr": 0.1, "stages.1.lr": 0.2}


# Names


def test_names_are_checked(monkeypatch, tmp_path, capsys):
    assert check("tensorboard") == check(("tensorboard", "tensorboard")) == ("tensorboard",)
    assert check("none") == check(()) == ()
    with pytest.raises(UserError, match=r"no tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        check("tensorbord")
    with pytest.raises(UserError, match="either none or trackers"):
        check(("tensorboard", "none"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install 'enfilade\[mlflow\]'"):
        run(tiny(stage(epochs=1)), Boards(2), tmp_path / "run", track="mlflow")
    assert not (tmp_path / "run").exists()
    words = ["train", "gad-nyuv2", "--data", "rooms", "--out", str(tmp_path / "run"), "--track", "mlflow"]
    assert main(words) == 2
    assert "pip install 'enfilade[mlflow]'" in capsys.readouterr().err


# The real ones, read back


def test_tensorboard_reads_what_was_told(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny(stage(epochs=2))
    run(recipe, Boards(4), tmp_path, log_every=1, stop_after=2)
    run(recipe, Boards(4), tmp_path, log_every=1)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    told = told_in_jsonl(tmp_path)
    seen = {e.step: e.value for e in events.Scalars("cross_entropy")}
    assert seen == pytest.approx(told)  # events hold fp32
    assert len(told) == 4
    texts = events.Tensors("config/text_summary")
    assert len(texts) == 1  # not again at the resume
    assert json.loads(texts[0].tensor_proto.string_val[0].decode().strip("`\n"))["name"] == "tiny"


def test_mlflow_reads_what_was_told(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    losses = {"cross_entropy": 1.0, "cross_entropy/s2": 0.3}
    recipe = tiny(stage(epochs=2, losses=losses, evaluate_every=1))
    scores = iter([{"miou": 0.1}, {"miou": 0.2}])
    monkeypatch.setattr(training, "validate", lambda *_: next(scores))
    out = tmp_path / "a run"
    run(recipe, Boards(4), out, val_data=Scored(1), track="mlflow", log_every=1, stop_after=2)
    run(recipe, Boards(4), out, val_data=Scored(1), track="mlflow", log_every=1)
    client = mlflow.MlflowClient(tracking_uri=(out / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("enfilade")
    (found,) = client.search_runs([experiment.experiment_id])  # one run, not two
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "a run"
    assert found.data.params["stages.0.lr"] == "0.003"
    assert found.data.params["arguments.encoder"] == "test_efficientnet"
    for key, name in (("cross_entropy", "cross_entropy"), ("cross_entropy/s2", "cross_entropy.s2")):
        history = client.get_metric_history(found.info.run_id, name)
        assert {m.step: m.value for m in history} == told_in_jsonl(out, key)
        assert len(history) == 4
    history = client.get_metric_history(found.info.run_id, "val/miou")
    assert [(m.step, m.value) for m in history] == [(2, 0.1), (4, 0.2)]


def test_mlflow_that_cannot_start_says_why(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    with pytest.raises(UserError, match=r"MLflow does not start at nonsense://here: .*; check MLFLOW_TRACKING_URI"):
        trackers.start(["mlflow"], tmp_path, {}, resumed=False)


def wandb_records(path):
    """The records of a `.wandb` file: LevelDB's log format (blocks of 32 KiB; records of checksum, length and kind,
    1 whole, 2 to 4 first, middle and last part) after 7 bytes of header; each is a protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:
            break
        part = data[position + 7 : position + 7 + length]
        whole = part if kind in (1, 2) else whole + part
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)


def test_wandb_reads_what_was_told(tmp_path):
    pytest.importorskip("wandb")
    recipe = tiny(stage(epochs=2))
    run(recipe, Boards(4), tmp_path, track="wandb", log_every=1, stop_after=2)
    kept = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    run(recipe, Boards(4), tmp_path, track="wandb", log_every=1)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    losses, exits = {}, []
    for path in files:
        records = list(wandb_records(path))
        (begun,) = (r.run for r in records if r.HasField("run"))
        assert (begun.run_id, begun.project, begun.display_name) == (kept, "enfilade", tmp_path.name)
        config = {c.key: json.loads(c.value_json) for c in begun.config.update}
        assert config["stages"][0]["lr"] == 0.003
        exits += [r.exit.exit_code for r in records if r.HasField("exit")]
        for record in (r.history for r in records if r.HasField("history")):
            told = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.item}
            losses[record.step.num] = told["cross_entropy"]
            assert told["lr/trunk"] > 0
    assert losses == told_in_jsonl(tmp_path)
    assert len(losses) == 4
    assert exits == [0, 0]


def test_wandb_that_cannot_start_says_why(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"W&B does not start: No API key configured; run `wandb login`, or set"):
        trackers.start(["wandb"], tmp_path, {}, resumed=False)
