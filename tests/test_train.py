"""Training is a function of the recipe and the data: nothing that stops it, and no number of processes, changes it.

This file is also the program that the subprocess tests start: `python test_train.py FOLDER OPTIONS...`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from enfilade import checkpoint
from enfilade import train as training
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.stages import Recipe, Stage
from enfilade.types import IGNORE, Batch, Sample, collate

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
        image = palette[labels] + rng.normal(0, 0.03, (h, w, 3)).astype(np.float32)
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
    fixed = {"name": "tiny", "model": "gad", "scale": 1.0, "focal": None, "precision": precision}
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
    return training.train(recipe, data, out=out, workers=0, quiet=True, **options)


# Killing and resuming


def killed_recipe(world: int, save: str) -> Recipe:
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

    save_every = {"update": 1, "third": 3, "epoch": 0}[save]
    recipe = killed_recipe(int(world), save)
    training.train(recipe, Slow(12), out=folder, save_every=save_every, workers=1, log_every=1, quiet=True)


def start(folder, world: int, save: str, pause: float) -> subprocess.Popen:
    job = [str(Path(__file__)), str(folder), str(world), save, str(pause)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    source = Path(training.__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(launcher if world == 2 else []), *job]
    folder.mkdir(exist_ok=True)
    with open(folder / "stderr.txt", "ab") as errors:
        return subprocess.Popen(command, env=env, stderr=errors, stdout=errors, start_new_session=True)


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
    """SIGKILL the whole process group once `count` updates are logged."""
    until = time.monotonic() + 200
    while updates(folder) < count:
        assert process.poll() is None, (folder / "stderr.txt").read_text()[-3000:]
        assert time.monotonic() < until, "the run did not come far enough to be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_and_compare(tmp_path, world: int, save: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # 12 samples in updates of 4: 3 updates an epoch, 12 in stage one, 9 in stage two
    uninterrupted = start(whole, world, save, 0)
    if world == 2:  # two processes at a time are enough for two cores
        finish(uninterrupted, whole)
    # 1/20 s a sample: several updates fit between two looks at the log, wherever the kill falls
    rng = random.Random(f"{world} {save}")
    for stop in (rng.randint(4, 9), rng.randint(14, 18)):
        process = start(broken, world, save, 0.05)
        kill_after(process, broken, stop)
        assert not (broken / "final.safetensors").exists()
        assert (broken / "last.safetensors").is_file()
    finish(start(broken, world, save, 0), broken)
    if world == 1:
        finish(uninterrupted, whole)
    assert updates(broken) == updates(whole) == 21
    assert_same(weights_of(whole), weights_of(broken))
    assert_same(weights_of(whole, "last"), weights_of(broken, "last"))
    first = checkpoint.build("gad", killed_recipe(world, save).arguments)
    final = weights_of(whole)
    assert any(not torch.equal(v, final[k]) for k, v in first.state_dict().items()), "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize("save", ["update", "epoch"])
def test_resume_after_kill_is_bit_exact(tmp_path, save):
    kill_and_compare(tmp_path, 1, save)


@pytest.mark.slow
def test_resume_after_kill_is_bit_exact_with_two_processes(tmp_path):
    kill_and_compare(tmp_path, 2, "update")


if __name__ == "__main__":
    program(*sys.argv[1:])
