"""Hostile files, and processes killed while they write: a little of what `benchmarks/abuse.py` does at length."""

import json
import os
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from enfilade import checkpoint
from enfilade.errors import UserError

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.append(BENCHMARKS)
abuse = pytest.importorskip("abuse", reason="needs benchmarks/abuse.py, which the source archive does not hold")
sys.path.remove(BENCHMARKS)


def outcomes(job: str, count: int) -> Counter:
    """Of the first inputs of a job, each judged in this process; fails with the first that is a finding."""
    make, judge = abuse.KINDS[job]
    found: Counter = Counter()
    for index in range(count):
        outcome, what = abuse.judged(judge, *make(0, index))
        assert outcome != "finding", f"{job} {index}: {what}"
        found[outcome] += 1
    return found


@pytest.mark.filterwarnings("ignore:::PIL")
def test_mutated_pictures():
    found = outcomes("images", 400)
    assert min(found["taken"], found["refused"]) > 50  # else the mutations are too mild, or too wild


def test_every_picture_is_read_before_it_is_mutated():
    for name, data in abuse.pictures().items():
        assert abuse.judge_picture(name.split("/")[0], data) == "taken", name


def test_mutated_model_files():
    found = outcomes("weights", 150)
    assert min(found["taken"], found["refused"]) > 10
    assert abuse.judge_model("", abuse.model_file()) == "taken"


@pytest.mark.parametrize("job", ["images", "weights"])
def test_the_same_seed_makes_the_same_files(job):
    make = abuse.KINDS[job][0]
    first, again, other = ([make(seed, index) for index in range(20)] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_faults_are_found(tmp_path):
    """An exception, a crash and a gigabyte, and the inputs behind them are still judged."""
    told = abuse.hunt("planted", 0, 6, tmp_path, say=lambda line: None)
    assert len(told["findings"]) == 3
    assert "KeyError" in told["findings"][0]
    assert "died" in told["findings"][1]
    assert "MiB of memory" in told["findings"][2]
    assert told["rows"]["planted"] | {"slowest_ms": 0} == {"inputs": 6, "taken": 3, "findings": 3, "slowest_ms": 0}
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"\1", b"\2", b"\3"]


def test_files_are_whole_after_a_kill():
    told = abuse.kill(0, 3)
    assert told["findings"] == []
    assert told["files"] >= 3 * 11


def test_half_a_file_is_noticed(tmp_path):
    """The check that `test_files_are_whole_after_a_kill` trusts."""
    for write in abuse.writers(tmp_path):
        write(7)
    for path in sorted(tmp_path.iterdir()):
        abuse.whole(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(Exception):  # noqa: B017  (of whichever reader)
            abuse.whole(path)


@pytest.mark.filterwarnings("ignore:::schemathesis", "ignore:::PIL")
def test_requests_made_from_the_schema():
    pytest.importorskip("schemathesis", reason="needs schemathesis: pip install schemathesis")
    pytest.importorskip("fastapi")
    told = abuse.schema(0, 12)
    assert told["findings"] == []
    assert all(200 in told["rows"][f"POST /{path}"] for path in ("predict", "complete"))


# --- what was found ---------------------------------------------------------------------------------------------------


def rewritten(path: Path, **changes) -> Path:
    """The smallest model file with changes of its description; `arguments` are added to those it has."""
    data = abuse.model_file()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["enfilade"])
    if isinstance(changes.get("arguments"), dict):
        changes["arguments"] = meta["arguments"] | changes["arguments"]
    header["__metadata__"]["enfilade"] = changes.pop("text", None) or json.dumps(meta | changes)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length :])
    return path


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"arguments": 3}, "'arguments' makes no sense"),
        ({"arguments": {"width": "wide"}}, "cannot be built"),
        ({"arguments": {"width": float("inf")}}, "cannot be built"),
        ({"arguments": {"classes": -3}}, "cannot be built"),
        ({"arguments": {"classes": 2**40}}, "larger than the weights in it|cannot be built"),
        ({"arguments": {"width": 500.0}}, "larger than the weights in it"),
        ({"size": [0, 32]}, "'size' makes no sense"),
        ({"size": 32}, "'size' makes no sense"),
        ({"focal": "far"}, "'focal' makes no sense"),
        ({"scale": -1}, "'scale' makes no sense"),
        ({"space": ["nyu40"]}, "'space' makes no sense"),
        ({"model": {}}, "'model' makes no sense"),
        ({"text": "[" * 100_000}, "damaged"),
    ],
)
def test_model_files_that_describe_no_model(tmp_path, changes, want):
    with pytest.raises(UserError, match=want) as caught:
        checkpoint.load(rewritten(tmp_path / "m.safetensors", **changes))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_model_file_cannot_ask_for_other_files(tmp_path, monkeypatch):
    """Not for a path, and not for a download."""
    from enfilade.models import encoders

    asked = []
    monkeypatch.setattr(encoders.Encoder, "__init__", lambda self, name, *, weights=None, **_: asked.append(weights))
    for weights in ("timm", str(tmp_path / "other.safetensors")):
        path = rewritten(tmp_path / "m.safetensors", model="lrn")
        meta = {"model": "lrn", "arguments": {"encoder": "test_efficientnet", "weights": weights}}
        rewritten(path, text=json.dumps(meta))
        with pytest.raises(UserError):  # the stand-in for the encoder has no channels
            checkpoint.load(path)
    assert asked == [None, None]


def test_model_files_can_be_read_by_others(tmp_path):
    """As the umask says, like every other file that is written."""
    checkpoint.write(tmp_path / "m.safetensors", {"w": torch.ones(1)}, {})
    (tmp_path / "other").touch()
    assert os.stat(tmp_path / "m.safetensors").st_mode == os.stat(tmp_path / "other").st_mode
