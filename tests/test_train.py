"""Training is a function of the recipe and the data: nothing that stops it, and no number of processes, changes it.

This file is also the program that the subprocess tests start: `python test_train.py FOLDER OPTIONS...`.
"""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from enfilade import checkpoint, optim
from enfilade import train as training
from enfilade.camera import Camera
from enfilade.data.epochs import Augmented, Order, class_weights, supervised
from enfilade.errors import UserError
from enfilade.labels import SPACES
from enfilade.stages import Recipe, Stage
from enfilade.types import IGNORE, Output, Sample, collate

CLASSES = 5
JOINT = {"cross_entropy": 1.0, "side_cross_entropy": 0.2, "depth_berhu": 0.5}


class Boards:
    """Seeded samples in memory: blocks of colour whose label is the colour and whose depth grows with the label."""

    def __init__(self, length: int = 10, size: tuple[int, int] = (48, 64), spoil: dict[int, str] | None = None):
        self.length, self.size, self.spoil = length, size, spoil or {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((7, index))
        h, w = self.size
        labels = np.kron(rng.integers(0, CLASSES, (3, 4)), np.ones((h // 3, w // 4))).astype(np.uint8)
        palette = np.random.default_rng(1).random((CLASSES, 3)).astype(np.float32)
        image = np.clip(palette[labels] + rng.normal(0, 0.03, (h, w, 3)), 0, 1).astype(np.float32)
        depth = (1.0 + 0.5 * labels).astype(np.float32)
        labels[:2] = IGNORE
        depth[-2:] = 0
        kind = self.spoil.get(index)
        if kind == "nan image":
            image[5, 5] = np.nan
        elif kind == "infinite depth":
            depth[5:40, 5:40] = np.inf
        elif kind == "no depth":
            depth = None
        return Sample(image=image, name=str(index), labels=labels, depth=depth, camera=Camera.from_fov(w, h))


def tiny(*stages: Stage, precision="no", **changes) -> Recipe:
    arguments = {"classes": CLASSES, "encoder": "test_efficientnet", "weights": None}
    arguments |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8, "dropout": 0.2}
    fixed = {"name": changes.pop("name", "tiny"), "model": "gad", "scale": 1.0, "focal": None, "precision": precision}
    return Recipe(**fixed, arguments=arguments | changes.pop("arguments", {}), stages=stages, **changes)


def stage(name="one", **changes) -> Stage:
    usual = {"epochs": 2, "losses": JOINT, "size": (32, 64), "zoom": (0.8, 1.2), "batch": 2, "lr": 3e-3}
    return Stage(name=name, **{**usual, **changes})


def weights_of(folder, name="final") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / f"{name}.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[:3]}"


def run(recipe, data, out, **options):
    return training.train(recipe, data, out=out, **{"workers": 0, "quiet": True, **options})


# Killing and resuming


def killed_recipe(world: int) -> Recipe:
    """Two stages, EMA, accumulation, dropout, bf16, clipping, a frozen part in the second: all that has a state."""
    first = stage(
        epochs=4,
        batch=1 if world == 2 else 2,
        accumulate=2,
        ema=0.9,
        weight_decay=0.01,
        clip={"semantic": 0.5},
        lr_parts={"trunk": 0.5},
    )
    second = replace(first, name="two", epochs=3, train=("semantic", "depth", "fusion", "spf"), optimiser="sgd")
    return tiny(first, second, precision="bf16", class_weighting=0.5)


def program(folder: str, world: str, save: str, pause: str) -> None:
    """Train; each sample takes `pause` seconds, so that a kill finds the run between its first and last update."""
    torch.set_num_threads(1)

    class Slow(Boards):
        def __getitem__(self, index):
            time.sleep(float(pause))
            return super().__getitem__(index)

    if save == "plain":
        checkpoint.MODELS["plain"] = "test_train:Plain"
        run(plain_recipe(batch=2, accumulate=2), Boards(16), folder)
        return
    save_every = {"update": 1, "epoch": 0}[save]
    recipe = killed_recipe(int(world))
    training.train(recipe, Slow(12), out=folder, save_every=save_every, workers=1, log_every=1, quiet=True)


def start(folder, world: int, save: str, pause: float) -> subprocess.Popen:
    job = [str(Path(__file__)), str(folder), str(world), save, str(pause)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    source = Path(training.__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(launcher if world == 2 else []), *job]
    folder.mkdir(exist_ok=True)
    with open(folder / "stderr.txt", "ab") as errors:
        return subprocess.Popen(command, env=env, stderr=errors, stdout=errors)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(process: subprocess.Popen, folder) -> None:
    assert process.wait(timeout=300) == 0, (folder / "stderr.txt").read_text()[-3000:]


def updates(folder) -> int:
    path = folder / "log.jsonl"
    return len({json.loads(s)["update"] for s in path.read_text().splitlines() if s}) if path.is_file() else 0


def kill_after(process: subprocess.Popen, folder, count: int) -> None:
    """SIGKILL the run and all its children once `count` updates are logged. torchrun starts its workers in sessions of
    their own, so that a signal to the process group would leave them training."""
    until = time.monotonic() + 200
    while updates(folder) < count:
        assert process.poll() is None, (folder / "stderr.txt").read_text()[-3000:]
        assert time.monotonic() < until, "the run did not come far enough to be killed"
        time.sleep(0.002)
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]  # the launcher first, so that it can tidy nothing up
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)
    assert not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in family[1:])


def kill_and_compare(whole, broken, world: int, save: str) -> None:
    """`whole` is finished; the same training in `broken` is killed once in each stage, and must end with equal bits."""
    rng = random.Random(f"{world} {save}")
    # 12 samples in updates of 4: 3 updates an epoch, 12 in stage one, 9 in stage two
    for stop in (rng.randint(4, 9), rng.randint(14, 18)):
        # 1/20 s a sample: an update takes longer than a look at the log, so the kill falls near where it should
        process = start(broken, world, save, 0.05)
        kill_after(process, broken, stop)
        assert not (broken / "final.safetensors").exists()
        assert (broken / "last.safetensors").is_file()
    finish(start(broken, world, save, 0), broken)
    assert updates(broken) == updates(whole) == 21
    assert not list(broken.glob(".*"))  # what a killed process left half-written is gone
    assert_same(weights_of(whole), weights_of(broken))
    assert_same(weights_of(whole, "last"), weights_of(broken, "last"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder, 1, "epoch", 0), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("save", ["update", "epoch"])
def test_resume_after_kill_is_bit_exact(tmp_path, one_process, save):
    kill_and_compare(one_process, tmp_path / "broken", 1, save)


@pytest.mark.slow
def test_resume_after_kill_is_bit_exact_with_two_processes(tmp_path):
    finish(start(tmp_path / "whole", 2, "epoch", 0), tmp_path / "whole")
    kill_and_compare(tmp_path / "whole", tmp_path / "broken", 2, "update")


def test_resume_from_every_update_is_bit_exact(tmp_path):
    recipe = killed_recipe(1)
    recipe = recipe.replace(stages=tuple(replace(s, epochs=2) for s in recipe.stages))
    data = Boards(8)  # 2 updates an epoch, 4 a stage
    whole = run(recipe, data, tmp_path / "whole")
    assert whole["complete"]
    assert whole["updates"] == 8
    for stop in range(1, 8):
        out = tmp_path / str(stop)
        part = run(recipe, data, out, stop_after=stop)
        assert (part["complete"], part["updates"]) == (False, stop)
        assert not (out / "final.safetensors").exists()
        assert run(recipe, data, out)["updates"] == 8
        assert_same(weights_of(tmp_path / "whole"), weights_of(out))
        assert_same(weights_of(tmp_path / "whole", "last"), weights_of(out, "last"))


def test_seed_matters_and_loader_processes_do_not(tmp_path):
    recipe = tiny(stage(epochs=1))
    run(recipe, Boards(4), tmp_path / "a")
    training.train(recipe, Boards(4), out=tmp_path / "b", workers=2, quiet=True)
    assert_same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    run(recipe.replace(seed=1), Boards(4), tmp_path / "c")
    a, c = weights_of(tmp_path / "a"), weights_of(tmp_path / "c")
    assert not torch.equal(a["squeeze.0.weight"], c["squeeze.0.weight"])


def test_a_finished_run_returns_at_once(tmp_path):
    recipe = tiny(stage(epochs=1))
    run(recipe, Boards(4), tmp_path)
    before = {n: (tmp_path / f"{n}.safetensors").read_bytes() for n in ("last", "final", "best")}
    assert before["best"] == before["final"]  # nothing was validated

    class Untouchable(Boards):
        def __getitem__(self, index):
            raise AssertionError("a finished run needs no data")

    result = run(recipe, Untouchable(4), tmp_path)
    assert result["complete"]
    assert result["updates"] == 2
    assert {n: (tmp_path / f"{n}.safetensors").read_bytes() for n in before} == before
    network = checkpoint.load(tmp_path / "final.safetensors").network
    assert_same(dict(network.state_dict()), weights_of(tmp_path))


def test_recipes_of_other_precision_can_follow_in_one_process(tmp_path):
    """A table trains its rows one after the other; accelerate keeps its settings in a singleton."""
    for precision in ("no", "bf16", "no"):
        recipe = tiny(stage(epochs=1), precision=precision, name=f"tiny-{precision}")
        out = tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}"
        assert run(recipe, Boards(2), out)["complete"]
    assert_same(weights_of(tmp_path / "no0"), weights_of(tmp_path / "no2"))
    fp32, bf16 = weights_of(tmp_path / "no0"), weights_of(tmp_path / "bf161")
    assert any(not torch.equal(fp32[k], bf16[k]) for k in fp32)


def test_a_stage_can_have_a_precision_of_its_own(tmp_path):
    runs = {
        "fp32": tiny(stage(epochs=1)),
        "bf16": tiny(stage(epochs=1), precision="bf16"),
        "exact": tiny(stage(epochs=1, precision="no"), precision="bf16"),
    }
    for name, recipe in runs.items():
        run(recipe, Boards(2), tmp_path / name)
    fp32, bf16, exact = (weights_of(tmp_path / name) for name in runs)
    assert_same(exact, fp32)
    assert any(not torch.equal(fp32[k], bf16[k]) for k in fp32)


@pytest.mark.parametrize("passed", [1, 2])
def test_stages_passed_elsewhere_are_as_if_trained_here(tmp_path, passed):
    """Dropout, order, augmentation: all that depends on how many updates came before."""
    stages = (stage("one", ema=0.9), stage("two", epochs=1), stage("three", epochs=1))
    run(tiny(*stages), Boards(6), tmp_path / "whole")
    run(tiny(*stages[:passed]), Boards(6), tmp_path / "first")
    init = tmp_path / "first/final.safetensors"
    result = run(tiny(*stages), Boards(6), tmp_path / "rest", init=init, passed=passed)
    assert result["updates"] == sum(s.epochs * 3 for s in stages)
    assert_same(weights_of(tmp_path / "rest"), weights_of(tmp_path / "whole"))


# The run folder


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its recipe.json lacks a setting that came later: the setting's default is what it was trained with."""
    recipe = tiny(stage(epochs=2, batch=2), name="old")
    run(recipe, Boards(4), tmp_path, stop_after=1)
    path = tmp_path / "recipe.json"
    told = json.loads(path.read_text())
    del told["class_weights"], told["stages"][0]["precision"], told["stages"][0]["zoom"]
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="another recipe"):
        run(recipe, Boards(4), tmp_path)  # this stage's zoom is not the default
    told["stages"][0]["zoom"] = list(recipe.stages[0].zoom)
    path.write_text(json.dumps(told))
    assert run(recipe, Boards(4), tmp_path)["complete"]


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    run(tiny(stage(epochs=1)), Boards(2), tmp_path)
    kept = (tmp_path / "last.safetensors").read_bytes()
    other = tiny(stage(epochs=1, lr=1e-4))
    with pytest.raises(UserError, match="another recipe"):
        run(other, Boards(2), tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == kept
    assert json.loads((tmp_path / "recipe.json").read_text())["stages"][0]["lr"] == 3e-3
    assert run(other, Boards(2), tmp_path, resume=False)["complete"]
    assert json.loads((tmp_path / "recipe.json").read_text())["stages"][0]["lr"] == 1e-4


def test_a_fresh_start_that_breaks_leaves_no_state_of_the_old_recipe(tmp_path):
    run(tiny(stage(epochs=1)), Boards(2), tmp_path)
    other = tiny(stage(epochs=1, lr=1e-4))
    with pytest.raises(UserError, match="diverged"):
        run(other, Boards(2, spoil={0: "nan image", 1: "nan image"}), tmp_path, resume=False)
    run(other, Boards(2), tmp_path)  # resumes nothing: same as in an empty folder
    run(other, Boards(2), tmp_path / "fresh")
    assert_same(weights_of(tmp_path), weights_of(tmp_path / "fresh"))


def test_a_run_can_start_from_a_models_weights(tmp_path, capsys):
    recipe = tiny(stage(epochs=1))
    run(recipe, Boards(4), tmp_path / "first")
    still = tiny(stage(epochs=1, lr=1e-12, schedule="constant"), name="still")
    run(still, Boards(4), tmp_path / "second", init=tmp_path / "first", quiet=False)
    assert "starts from" in capsys.readouterr().out
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    for name in (n for n in before if n.endswith(".weight")):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)

    # resumed, it goes on from its own state and not from the model again
    moved = tiny(stage(epochs=2), name="moved")
    run(moved, Boards(4), tmp_path / "whole", init=tmp_path / "first")
    run(moved, Boards(4), tmp_path / "broken", init=tmp_path / "first", stop_after=3)
    run(moved, Boards(4), tmp_path / "broken", init=tmp_path / "first")
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


def test_of_several_models_each_gives_what_fits_and_later_ones_win(tmp_path):
    network = checkpoint.build("gad", tiny().arguments)
    first = {k: torch.full_like(v, 1) for k, v in network.state_dict().items()}
    second = {k: torch.full_like(v, 2) for k, v in first.items() if k.startswith("classifier.")}
    for name, tensors in (("first", first), ("second", second)):
        checkpoint.write(tmp_path / f"{name}.safetensors", tensors, {})
    told = training.start_from(network, [tmp_path / "first.safetensors", tmp_path / "second.safetensors"])
    assert "first.safetensors" in told
    assert "second.safetensors (2 of " in told
    for name, value in network.state_dict().items():
        assert (value == (2 if name.startswith("classifier.") else 1)).all(), name


def test_an_encoder_fits_wherever_a_network_keeps_its_own(tmp_path):
    network = checkpoint.build("gad", tiny().arguments)
    trunk = {k: torch.full_like(v, 3) for k, v in network.state_dict().items() if k.startswith("trunk.")}
    strange = {"branches.trunk.net.nothing": torch.ones(1), "branches.classifier.weight": torch.ones(1)}
    checkpoint.write(tmp_path / "other.safetensors", {f"branches.{k}": v for k, v in trunk.items()} | strange, {})
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert f"({len(trunk)} of " in training.start_from(network, tmp_path / "other.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, trunk.get(name, before[name]), rtol=0, atol=0)


def test_each_model_fills_one_of_the_encoders_that_stand_side_by_side(tmp_path):
    trunk = {k: v for k, v in checkpoint.build("gad", tiny().arguments).state_dict().items() if k.startswith("trunk.")}
    for value, prefix in ((1, ""), (2, "branches.")):
        tensors = {f"{prefix}{k}": torch.full_like(v, value) for k, v in trunk.items()}
        checkpoint.write(tmp_path / f"{value}.safetensors", tensors, {})
    network = checkpoint.build("gad", {**tiny().arguments, "encoders": 2})
    told = training.start_from(network, [tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert told.count(f"({len(trunk)} of ") == 2
    state = network.state_dict()
    for name in trunk:
        for index, value in ((0, 1), (1, 2)):
            assert (state[name.replace("trunk.", f"trunk.nets.{index}.", 1)] == value).all(), name
    checkpoint.write(tmp_path / "both.safetensors", {k: v for k, v in state.items() if k.startswith("trunk.")}, {})
    single = checkpoint.build("gad", tiny().arguments)
    training.start_from(single, tmp_path / "both.safetensors")  # it takes the first
    assert all((single.state_dict()[name] == 1).all() for name in trunk)


def test_what_does_not_fit_starts_anew_and_is_named(tmp_path, capsys):
    run(tiny(stage(epochs=1)), Boards(2), tmp_path / "first")
    more = tiny(stage(epochs=1), arguments={"classes": CLASSES + 1})
    run(more, Boards(2), tmp_path / "second", init=tmp_path / "first", quiet=False)
    assert "new are classifier.bias, classifier.weight" in capsys.readouterr().out
    other = Recipe(
        "other", "lrn", {"classes": 3, "encoder": "vgg11_bn"}, (stage(losses={"focal": 1.0}),), scale=1.0, focal=None
    )
    with pytest.raises(UserError, match=r"no tensor of .* fits LRN"):
        run(other, Boards(2), tmp_path / "third", init=tmp_path / "first")


def test_a_file_of_class_weights_is_taken(tmp_path, monkeypatch):
    from enfilade import labels
    from enfilade.data import weights

    names = labels.get("camvid11").names
    rows = [{"name": n, "weight": 1.0 + i} for i, n in enumerate(names)]
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"space": "camvid11", "classes": rows}))
    assert list(weights.read(path).values()) == [1.0 + i for i in range(11)]
    seen = []
    real = training.objective
    monkeypatch.setattr(training, "objective", lambda *a: seen.append(a[3]) or real(*a))
    arguments = {"classes": 11}
    run(
        tiny(stage(epochs=1), space="camvid11", class_weights=str(path), arguments=arguments),
        Boards(2),
        tmp_path / "run",
    )
    assert seen[0].tolist() == [1.0 + i for i in range(11)]
    with pytest.raises(UserError, match="camvid11, not the 40 of nyu40"):
        run(tiny(stage(epochs=1), class_weights=str(path)), Boards(2), tmp_path / "wrong")


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".last.safetensors.123.tmp").write_bytes(b"half")
    run(tiny(stage(epochs=1)), Boards(2), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write to"):
        run(tiny(stage(epochs=1)), Boards(2), tmp_path / "file" / "run")


# Validation


class Scored(Boards):
    """Boards as a whole reader, for `enfilade.evaluate`."""

    name, space, ignored, score_crop = "boards/val", SPACES["nyu40"], (39,), None

    @property
    def names(self):
        return tuple(map(str, range(len(self))))


def test_validation_changes_nothing_and_keeps_the_best(tmp_path):
    one = stage(epochs=4, ema=0.9, evaluate_every=2, lr=1e-2)
    recipe = tiny(one, arguments={"classes": 40})
    run(recipe, Boards(6), tmp_path / "blind")
    result = run(recipe, Scored(6), tmp_path / "seeing", val_data=Scored(2))
    for name in ("final", "last"):
        assert_same(weights_of(tmp_path / "blind", name), weights_of(tmp_path / "seeing", name))
    records = [json.loads(line) for line in (tmp_path / "seeing" / "log.jsonl").read_text().splitlines()]
    scores = [r["val"] for r in records if "val" in r]
    assert [r["epoch"] for r in records if "val" in r] == [2, 4]
    assert result["best_miou"] == max(s["miou"] for s in scores)
    assert result["miou"] == scores[-1]["miou"]
    assert result["rmse"] > 0
    best = checkpoint.load(tmp_path / "seeing" / "best.safetensors")
    assert best.meta["scores"]["miou"] == result["best_miou"]
    assert best.meta["ignored"] == [39]
    assert best.meta["space"] == "nyu40"


def test_resume_remembers_the_best_score(tmp_path, monkeypatch):
    """The best score comes early; a resumed run must not overwrite it with a later, worse one."""
    falling = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(training, "validate", lambda *_: {"miou": next(falling)})
    recipe = tiny(stage(epochs=4, evaluate_every=1))
    run(recipe, Boards(4), tmp_path, val_data=Scored(1), stop_after=4)  # two epochs
    kept = (tmp_path / "best.safetensors").read_bytes()
    result = run(recipe, Boards(4), tmp_path, val_data=Scored(1))
    assert result["best_miou"] == 0.5
    assert result["miou"] == 0.2
    assert (tmp_path / "best.safetensors").read_bytes() == kept


# What is not finite


@pytest.mark.parametrize(("kind", "term"), [("nan image", "cross_entropy"), ("infinite depth", "depth_berhu")])
def test_nonfinite_loss_stops_and_keeps_the_last_good_state(tmp_path, kind, term):
    recipe = tiny(stage(epochs=4, batch=2, zoom=(1.0, 1.0), size=(48, 64)))
    bad = Boards(8, spoil={3: kind})
    good = run(recipe, Boards(8), tmp_path / "good", stop_after=4)  # the first epoch
    assert good["updates"] == 4
    run(recipe, Boards(8), tmp_path / "bad", stop_after=4)
    kept = (tmp_path / "bad" / "last.safetensors").read_bytes()
    with pytest.raises(UserError, match=term) as error:
        run(recipe, bad, tmp_path / "bad")
    assert "stage 'one'" in str(error.value)
    assert str(tmp_path / "bad" / "last.safetensors") in str(error.value)
    assert (tmp_path / "bad" / "last.safetensors").read_bytes() == kept
    assert run(recipe, Boards(8), tmp_path / "bad")["complete"]  # and it can go on from there


def test_nonfinite_updates_are_skipped_under_the_flag(tmp_path):
    recipe = tiny(stage(epochs=3, batch=2, zoom=(1.0, 1.0), size=(48, 64), ema=0.9, accumulate=2))
    result = run(recipe, Boards(8, spoil={3: "nan image"}), tmp_path, skip_nonfinite=True)
    assert result["complete"]
    assert result["updates"] == 6
    for name in ("final", "last"):
        assert all(v.isfinite().all() for v in weights_of(tmp_path, name).values())
    fresh = checkpoint.build("gad", recipe.arguments).state_dict()
    final = weights_of(tmp_path)
    assert not torch.equal(final["trunk.net.bn1.running_mean"], fresh["trunk.net.bn1.running_mean"])


def test_a_skipped_update_changes_nothing_but_the_counter(tmp_path):
    recipe = tiny(stage(epochs=1, batch=2))
    run(recipe, Boards(2, spoil={0: "nan image", 1: "nan image"}), tmp_path, skip_nonfinite=True)
    torch.manual_seed(recipe.seed)
    fresh = checkpoint.build("gad", recipe.arguments).state_dict()
    assert_same(weights_of(tmp_path), dict(fresh))


# Stages: parts, clipping, rates, averages


def test_frozen_parts_keep_every_bit(tmp_path):
    both = stage(epochs=1), stage("two", epochs=2, train=("semantic", "spf"), weight_decay=0.1)
    run(tiny(both[0]), Boards(6), tmp_path / "first")
    run(tiny(*both), Boards(6), tmp_path / "both")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "both")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    frozen = {k for k in before if k.split(".")[0] in ("trunk", "depth", "depth_head", "fusion")}
    assert any("running_mean" in k for k in frozen)
    assert not moved & frozen
    learned = {k for k in before if k.split(".")[0] in ("squeeze", "semantic", "classifier", "spf")}
    assert learned | frozen == before.keys()
    assert moved == learned  # their batch norms and counters move, too


def test_running_norms_are_kept_while_all_else_learns(tmp_path):
    both = stage(epochs=1), stage("two", epochs=1, norms="running")
    run(tiny(both[0]), Boards(6), tmp_path / "first")
    run(tiny(*both), Boards(6), tmp_path / "both")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "both")
    kept = {k for k in before if torch.equal(before[k], after[k])}
    statistics = {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert kept == statistics | {"trunk.mean", "trunk.std"}  # those of the image never move


def test_freeze_unfreezes_again():
    network = checkpoint.build("gad", tiny().arguments)
    optim.freeze(network, stage(train=("spf",)))
    assert not any(p.requires_grad for p in network.trunk.parameters())
    assert not any(m.training for m in network.trunk.modules())
    assert all(m.training for m in network.spf.modules())
    optim.freeze(network, stage(train=("*",)))
    assert all(p.requires_grad for p in network.parameters())
    assert all(m.training for m in network.modules())


def test_an_unknown_part_is_named():
    network = checkpoint.build("gad", tiny().arguments)
    for wrong in ({"train": ("decoder",)}, {"clip": {"decoder": 1.0}}, {"lr_parts": {"decoder": 0.1}}):
        with pytest.raises(UserError, match=r"'one'.*'decoder'"):
            optim.freeze(network, stage(**wrong))


def test_every_parameter_has_one_part_and_the_right_rate():
    network = checkpoint.build("gad", tiny().arguments)
    owner = optim.part_of(network)
    assert owner.keys() == dict(network.named_parameters()).keys()
    one = stage(lr=0.1, lr_parts={"trunk": 0.01}, weight_decay=0.5)
    optim.freeze(network, one)
    optimiser = optim.make_optimiser(network, one)
    names = {id(p): n for n, p in network.named_parameters()}
    seen = []
    for group in optimiser.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            seen.append(name)
            assert group["lr"] == pytest.approx(0.001 if owner[name] == "trunk" else 0.1)
            assert group["weight_decay"] == (0.5 if p.ndim > 1 else 0.0)
    assert sorted(seen) == sorted(owner)


def test_clipping_bounds_the_named_parts_only():
    network = checkpoint.build("gad", tiny().arguments)
    owner = optim.part_of(network)
    generator = torch.Generator().manual_seed(3)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    before = {n: p.grad.clone() for n, p in network.named_parameters()}

    def norm(gradients, part):
        return torch.cat([g.flatten() for n, g in gradients.items() if owner[n] == part]).double().norm().item()

    small = norm(before, "fusion") * 2  # a limit that is not reached must change nothing
    norms = optim.clip(network, owner, {"semantic": 0.5, "spf": 1e-3, "fusion": small})
    after = {n: p.grad for n, p in network.named_parameters()}
    for part in ("trunk", "semantic", "depth", "fusion", "spf"):
        assert norms[part] == pytest.approx(norm(before, part), rel=1e-5)  # fp32 sums of up to 1e5 squares
    assert norm(after, "semantic") == pytest.approx(0.5, rel=1e-5)
    assert norm(after, "spf") == pytest.approx(1e-3, rel=1e-5)
    for name, part in owner.items():
        if part in ("trunk", "depth", "fusion"):
            assert torch.equal(after[name], before[name])
        else:  # scaled, not bent
            scale = {"semantic": 0.5, "spf": 1e-3}[part] / norms[part]
            torch.testing.assert_close(after[name], before[name] * scale, rtol=1e-5, atol=0)


def test_schedules():
    total, per_epoch = 200, 10

    def rates(**changes):
        return [optim.learning_rate(stage(**changes), k, total, per_epoch) for k in range(total)]

    assert rates(schedule="constant") == [1.0] * total
    cycle = rates(schedule="onecycle", warmup=0.1)
    peak = int(np.argmax(cycle))
    assert peak == 20
    assert cycle[peak] == pytest.approx(1, abs=1e-3)
    assert all(np.diff(cycle[1:21]) > 0)
    assert all(np.diff(cycle[20:]) < 0)
    assert cycle[110] == pytest.approx(0.5, abs=1e-3)  # half of the cosine
    assert 0 < cycle[0] <= 0.05
    assert 0 < cycle[-1] < 1e-3
    assert rates(schedule="poly") == pytest.approx([(1 - k / total) ** 0.9 for k in range(total)])
    step = rates(schedule="step", step_epochs=5)
    assert step == pytest.approx([1.0] * 50 + [0.1] * 50 + [0.01] * 50 + [0.001] * 50)
    assert min(rates(schedule="onecycle", warmup=0.0)) > 0


def test_moving_average_by_hand():
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    average = optim.MovingAverage(network, 0.5)
    wanted, mean = 1.0, 0.0
    for step, value in enumerate((3.0, -2.0, 8.0), start=100):  # late: the decay is 0.5 in full
        with torch.no_grad():
            network[0].weight.fill_(value)
            network[1].running_mean.fill_(2 * value)
            network[1].num_batches_tracked.fill_(step)
        average.update(network, step)
        wanted, mean = 0.5 * wanted + 0.5 * value, 0.5 * mean + value
    assert average.state["0.weight"].item() == wanted
    assert average.state["1.running_mean"].item() == mean
    assert average.state["1.num_batches_tracked"].item() == 102
    young = optim.MovingAverage(network, 0.999)
    with torch.no_grad():
        network[0].weight.fill_(18.0)
    young.update(network, 0)  # (1 + 0) / (10 + 0) of the start is kept
    assert young.state["0.weight"].item() == pytest.approx(0.1 * 8 + 0.9 * 18, rel=1e-6)


def test_a_stage_hands_over_its_average(tmp_path):
    """One update, the first: the average is a tenth of the start and nine tenths of the step."""
    recipe = tiny(stage(epochs=1))
    torch.manual_seed(recipe.seed)
    start = checkpoint.build("gad", recipe.arguments).state_dict()
    run(recipe, Boards(2), tmp_path / "raw")
    run(recipe.with_stages(ema=0.99), Boards(2), tmp_path / "average")
    raw, average = weights_of(tmp_path / "raw"), weights_of(tmp_path / "average")
    for k, v in start.items():
        if v.is_floating_point():
            torch.testing.assert_close(average[k], 0.1 * v + 0.9 * raw[k])
    state = weights_of(tmp_path / "average", "last")
    assert_same(average, {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})


def test_swapped_gives_the_weights_back():
    network = checkpoint.build("gad", tiny().arguments)
    average = optim.MovingAverage(network, 0.9)
    kept = {k: v.clone() for k, v in network.state_dict().items()}
    for v in average.state.values():
        v.zero_()
    with optim.swapped(network, average) as inside:
        assert not any(v.any() for v in inside.state_dict().values())
    assert_same(dict(network.state_dict()), kept)


class Plain(nn.Module):
    """A network without batch norm, where a sum of gradients is the gradient of the sum."""

    loaded = "nothing"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3, padding=1)

    @property
    def parts(self):
        return {"all": [self.conv]}

    def forward(self, image):
        return Output(logits=self.conv(image))


def plain_recipe(batch: int, accumulate: int) -> Recipe:
    fixed = {"losses": {"cross_entropy": 1.0}, "size": (48, 64), "zoom": (1.0, 1.0), "optimiser": "sgd", "lr": 0.1}
    one = stage(epochs=2, batch=batch, accumulate=accumulate, **fixed)
    return Recipe("plain", "plain", {}, (one,), scale=1.0, focal=None, precision="no")


def assert_close(a, b):
    assert a.keys() == b.keys()
    for k in a:  # fp32 sums in another order
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)


def test_accumulation_equals_a_larger_batch(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint.MODELS, "plain", f"{__name__}:Plain")
    run(plain_recipe(4, 1), Boards(8), tmp_path / "large")
    run(plain_recipe(2, 2), Boards(8), tmp_path / "small")
    run(plain_recipe(2, 1), Boards(8), tmp_path / "other")
    large, small, other = (weights_of(tmp_path / n) for n in ("large", "small", "other"))
    assert_close(large, small)
    assert not torch.allclose(large["conv.weight"], other["conv.weight"], rtol=1e-3)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint.MODELS, "plain", f"{__name__}:Plain")
    finish(start(tmp_path / "two", 2, "plain", 0), tmp_path / "two")
    run(plain_recipe(4, 2), Boards(16), tmp_path / "one")
    assert_close(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))


# What a step sees


def samples_of(recipe, count, start, rank, world):
    return list(Order(count, recipe, 0, start, rank, world))


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(20, 2, 1), (23, 2, 3), (9, 4, 1), (3, 2, 2)])
def test_two_processes_share_the_samples_of_one(count, batch, accumulate):
    two = tiny(stage(batch=batch, accumulate=accumulate, epochs=3))
    larger = tiny(stage(batch=2 * batch, accumulate=accumulate, epochs=3))
    longer = tiny(stage(batch=batch, accumulate=2 * accumulate, epochs=3))
    ranks = [samples_of(two, count, 0, r, 2) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(Order(count, two, 0, 0, 0, 2))
    together = [a + b for a, b in zip(*ranks)]
    assert together == samples_of(larger, count, 0, 0, 1)
    assert [b for pair in zip(*ranks) for b in pair] == samples_of(longer, count, 0, 0, 1)
    for epoch in range(3):
        seen = [i for b in together for e, i in b if e == epoch]
        assert set(seen) <= set(range(count))
        if len(seen) <= count:
            assert len(set(seen)) == len(seen)  # no sample twice
        else:
            assert set(seen) == set(range(count))  # a small set is repeated, all of it
    orders = [[i for b in together for e, i in b if e == epoch] for epoch in range(3)]
    assert orders[0] != orders[1] or orders[1] != orders[2]  # few samples have few orders


def test_an_epoch_of_some_samples_draws_anew():
    """Of 30 samples, 12 in each epoch: others in the next, and none twice in one."""
    recipe = tiny(stage(batch=4, samples=12, epochs=3))
    batches = list(Order(30, recipe, 0, 0, 0, 1))
    assert len(batches) == 9
    epochs = [[i for b in batches for e, i in b if e == epoch] for epoch in range(3)]
    assert all(len(set(chosen)) == 12 and max(chosen) < 30 for chosen in epochs)
    assert len({frozenset(chosen) for chosen in epochs}) == 3
    assert set().union(*epochs) - set(range(12))  # not the first twelve only
    more = recipe.with_stages(samples=99)  # more than there are is all
    assert len(list(Order(30, more, 0, 0, 0, 1))) == len(list(Order(30, recipe.with_stages(samples=0), 0, 0, 0, 1)))


def test_an_epoch_with_extra_samples_has_all_of_its_own_and_a_share_of_others():
    """Of 12 own samples and 7 others, at a quarter: 12 and 4 in each epoch, other four in the next."""
    recipe = tiny(stage(batch=4, extra=0.25, epochs=3))
    batches = list(Order(12, recipe, 0, 0, 0, 1, extra=7))
    assert len(batches) == 3 * 4
    epochs = [[i for b in batches for e, i in b if e == epoch] for epoch in range(3)]
    others = [{i for i in chosen if i >= 12} for chosen in epochs]
    for chosen, more in zip(epochs, others):
        assert sorted(set(chosen) - more) == list(range(12))
        assert len(more) == 4
        assert max(more) < 19
        assert max(chosen[:12]) >= 12  # mixed, not behind one another
    assert others[0] != others[1] or others[1] != others[2]
    assert list(Order(12, recipe, 0, 5, 0, 1, extra=7)) == batches[5:]
    few = list(Order(12, recipe, 0, 0, 0, 1, extra=3))  # too few are repeated
    assert {i for b in few for _, i in b} == set(range(15))
    none = recipe.with_stages(extra=0.0)
    assert list(Order(12, none, 0, 0, 0, 1, extra=7)) == list(Order(12, none, 0, 0, 0, 1))


class Ignoring(Boards):
    """Boards whose class 2 cannot be told from void."""

    space, name, ignored = SPACES["nyu13"], "ignoring", (2,)


class Others(Boards):
    """Boards of the same label space, dark ones."""

    space, name, ignored = SPACES["nyu13"], "others", ()

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample.replace(image=0.01 * sample.image)


def test_extra_samples_follow_the_own_ones_with_depth_and_without_ignored_classes():
    recipe = tiny(stage(extra=0.5, colour=0.0, size=(48, 64), zoom=(1.0, 1.0)), depth_fraction=0.0)
    data = Augmented(Ignoring(3), recipe, 0, Others(5))
    assert len(data) == 8
    own, other = data[(0, 1)], data[(0, 3 + 1)]
    assert own.depth is None
    assert (other.depth > 0).any()  # the share with depth is one of the own samples
    assert own.image.max() > 0.1 > other.image.max()
    classes = np.unique(Others(5)[1].labels)
    assert 2 in classes
    assert set(np.unique(other.labels)) == set(classes) - {2}


def test_a_run_with_extra_data_resumes_as_if_it_had_never_stopped(tmp_path):
    recipe = tiny(stage(extra=0.5, epochs=2), stage("two", epochs=1), space="nyu13")
    data, extra = Ignoring(4), Others(5)
    whole = run(recipe, data, tmp_path / "whole", extra_data=extra)
    assert whole["updates"] == 2 * 4 + 2
    run(recipe, data, tmp_path / "broken", extra_data=extra, stop_after=3)
    run(recipe, data, tmp_path / "broken", extra_data=extra)
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))
    run(recipe, data, tmp_path / "same", extra_data=Ignoring(5))
    different = weights_of(tmp_path / "same")
    assert any(not torch.equal(v, different[k]) for k, v in weights_of(tmp_path / "whole").items())


@pytest.mark.parametrize(
    ("changes", "extra", "sentence"),
    [
        ({"extra": 0.5}, None, "stage 'one' mixes extra data in, and there is none"),
        ({}, Others(2), "no stage of tiny mixes extra data in: set extra"),
        ({"extra": 1.0}, Others(2), "extra is a share from 0 to below 1, not 1"),
        ({"extra": -0.1}, Others(2), "not -0.1"),
        ({"extra": 0.5, "augmentation": "offline"}, Others(2), "go without extra data"),
    ],
)
def test_extra_data_and_the_wish_for_it_go_together(tmp_path, changes, extra, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tiny(stage(**changes), space="nyu13"), Ignoring(2), tmp_path, extra_data=extra)
    assert not list(tmp_path.iterdir())  # before anything is written


def test_extra_data_have_the_labels_of_the_others(tmp_path):
    extra = Others(2)
    extra.space = SPACES["nyu40"]
    with pytest.raises(UserError, match="others has labels of nyu40, ignoring of nyu13"):
        run(tiny(stage(extra=0.5), space="nyu13"), Ignoring(2), tmp_path, extra_data=extra)


def test_a_late_start_continues_the_same_order():
    recipe = tiny(stage(batch=2, accumulate=2, epochs=3))
    whole = samples_of(recipe, 11, 0, 0, 1)
    for start in range(len(whole) + 1):
        assert samples_of(recipe, 11, start, 0, 1) == whole[start:]


def test_augmentation_is_a_function_of_epoch_and_index():
    recipe = tiny(stage())
    data = Augmented(Boards(4), recipe, 0)
    a, b = data[(1, 2)], data[(1, 2)]
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.depth, b.depth)
    assert not np.array_equal(a.image, data[(2, 2)].image)
    assert not np.array_equal(a.image, Augmented(Boards(4), recipe.replace(seed=1), 0)[(1, 2)].image)


def test_a_share_of_the_samples_gets_something_pasted_in():
    plain = Augmented(Boards(4), tiny(stage()), 0)
    pasted = Augmented(Boards(4), tiny(stage(paste=0.5)), 0)
    items = [(epoch, index) for epoch in range(10) for index in range(4)]
    changed = [not np.array_equal(plain[item].image, pasted[item].image) for item in items]
    assert 8 <= sum(changed) <= 30  # a fair coin, less what another sample hides: all else is as it was
    for item in items[:8]:  # a function of epoch and index, as the rest
        np.testing.assert_array_equal(pasted[item].image, pasted[item].image)


def test_offline_augmentation_has_six_fixed_pictures_of_each_sample():
    recipe = tiny(stage(augmentation="offline", colour=0.0, size=(48, 64)))
    data = Augmented(Boards(4), recipe, 0)
    assert len(data) == 24
    six = [data[(0, 6 + k)] for k in range(6)]
    for k, sample in enumerate(six):
        np.testing.assert_array_equal(sample.image, data[(3, 6 + k)].image)  # the same in each epoch
    whole = Boards(4)[1]
    np.testing.assert_allclose(six[0].image, whole.image, atol=1e-6)
    np.testing.assert_allclose(six[1].image, whole.image[:, ::-1], atol=1e-6)
    assert len({s.image.tobytes() for s in six}) == 6
    order = samples_of(recipe, 4, 0, 0, 1)
    epochs = [[i for batch in order for e, i in batch if e == epoch] for epoch in (0, 1)]
    assert sorted(epochs[0]) == list(range(24))
    assert epochs[0] == epochs[1] != sorted(epochs[0])  # shuffled once


def test_crops_divide_depth_by_their_zoom():
    recipe = tiny(stage(augmentation="offline", colour=0.0, size=(24, 32), zoom=(2.0, 2.0)))
    data = Augmented(Boards(2), recipe.replace(scale=0.5, focal=Boards(2)[0].camera.fx * 0.5), 0)
    whole, crop = data[(0, 0)], data[(0, 2)]
    depths = {round(float(d), 3) for d in np.unique(whole.depth[whole.depth > 0])}
    assert {round(2 * float(d), 3) for d in np.unique(crop.depth[crop.depth > 0])} <= depths


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_depth_fraction_is_a_fixed_subset(fraction):
    chosen = supervised(50, fraction, seed=3)
    assert chosen.sum() == round(50 * fraction)
    np.testing.assert_array_equal(chosen, supervised(50, fraction, seed=3))
    if 0 < fraction < 1:
        assert (chosen != supervised(50, fraction, seed=4)).any()
    data = Augmented(Boards(50), tiny(stage(), depth_fraction=fraction, seed=3), 0)
    for epoch in (0, 1):
        assert [data[(epoch, i)].depth is not None for i in range(10)] == list(chosen[:10])


def test_larger_fractions_contain_smaller_ones():
    """Table 5 compares fractions: what 20 % have, 40 % must have, too."""
    subsets = [supervised(795, f, 0) for f in (0.2, 0.4, 0.6, 0.8)]
    for small, large in itertools.pairwise(subsets):
        assert (large | ~small).all()


def test_class_weights_by_hand():
    class Labels:
        """Two images: class 0 fills 6 of 8 and 4 of 8 pixels, class 1 two of the first, class 2 four of the second."""

        images = (
            np.array([[0, 0, 0, 0], [0, 0, 1, 1], [255] * 4], np.uint8),
            np.array([[0, 0, 0, 0], [2, 2, 2, 2], [255] * 4], np.uint8),
        )

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Sample(image=np.zeros((3, 4, 3), np.float32), labels=self.images[i])

    # frequencies 10/16, 2/8, 4/8; their median is 1/2; class 3 never occurs
    wanted = torch.tensor([0.5 / 0.625, 2.0, 1.0, 0.0])
    torch.testing.assert_close(class_weights(Labels(), 1.0, 4), wanted)
    torch.testing.assert_close(class_weights(Labels(), 0.5, 4), wanted.sqrt())
    assert class_weights(Labels(), 0.0, 4) is None

    class Quick(Labels):
        def labels(self, i):
            return self.images[i]

        def __getitem__(self, i):
            raise AssertionError("labels() spares the decoding of images")

    torch.testing.assert_close(class_weights(Quick(), 1.0, 4), wanted)


# Semi-supervised depth


def depth_gradients(spoil, **arguments):
    network = checkpoint.build("gad", tiny(arguments={"dropout": 0.0, **arguments}).arguments)
    optim.freeze(network, stage())
    data = Boards(2, spoil=spoil)
    batch = collate([data[0], data[1]])
    output = network(batch.image, **training.extra_inputs(network, batch))
    loss, _ = training.objective(output, batch, {"cross_entropy": 1.0, "depth_berhu": 1.0})
    loss.backward()
    total = dict.fromkeys(network.parts, 0.0)
    for name, part in optim.part_of(network).items():
        grad = network.get_parameter(name).grad
        total[part] += 0 if grad is None else grad.abs().sum().item()
    return total


@pytest.mark.parametrize("fusion", ["gap", "vanilla", "none"])
def test_a_batch_without_depth_does_not_train_the_depth_decoder(fusion):
    without = depth_gradients({0: "no depth", 1: "no depth"}, fusion=fusion)
    assert without["depth"] == 0
    assert without["trunk"] > 0
    assert without["semantic"] > 0
    assert depth_gradients({0: "no depth"}, fusion=fusion)["depth"] > 0


def test_semi_supervised_training_runs(tmp_path):
    recipe = tiny(stage(epochs=3, batch=2), depth_fraction=0.25)
    assert run(recipe, Boards(8), tmp_path)["complete"]
    assert all(v.isfinite().all() for v in weights_of(tmp_path).values())
    nothing = recipe.replace(depth_fraction=0.0)
    assert run(nothing, Boards(8), tmp_path / "none")["complete"]


def test_missing_inputs_are_named(tmp_path):
    recipe = tiny(stage(epochs=1), arguments={"hha": True, "depth": False, "fusion": "none"})
    recipe = recipe.with_stages(losses={"cross_entropy": 1.0})
    with pytest.raises(UserError, match="hha"):
        run(recipe, Boards(2), tmp_path)


def test_training_learns(tmp_path):
    """Colour blocks are easy: in a few epochs the loss must fall far below its start."""
    recipe = tiny(stage(epochs=12, batch=4, lr=1e-2, colour=0.0, size=(48, 64), zoom=(1.0, 1.0)))
    run(recipe, Boards(8), tmp_path, log_every=1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for term in ("cross_entropy", "depth_berhu"):
        assert np.mean([r[term] for r in records[-4:]]) < 0.6 * records[0][term]
    assert 0 <= records[-1]["data_waiting"] <= 1
    assert records[-1]["images_per_second"] > 0


if __name__ == "__main__":
    program(*sys.argv[1:])
