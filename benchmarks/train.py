"""Training speed of the recipe `gad-nyuv2` and of its FPN peer: images per second and the share spent waiting for data.

    python benchmarks/train.py --root FOLDER --json train.json

FOLDER holds NYUv2 frames (`enfilade data prepare nyuv2`); without it, procedural rooms rendered beforehand are used,
and the table says so. Each row runs in a process of its own: whole training steps (loading, augmentation, forward,
losses, backward, clipping, optimiser, moving average), one loader process, the first steps left out.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

WARM_UP = 2


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


class Rendered:
    """Some rooms, rendered once and kept: a training step must not wait for the renderer."""

    def __init__(self, count: int):
        from enfilade.data import open_dataset

        rooms = open_dataset("rooms", split="train", length=count)
        self.samples = [rooms[i].replace(voxels=None) for i in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index]


def data_of(root: str | None):
    if root is None:
        return Rendered(8)
    from enfilade.data import open_dataset

    return open_dataset("nyuv2", root, split="train")


def row(
    name: str, precision: str, layout: str, root: str | None, threads: int, steps: int, size: tuple[int, int]
) -> dict:
    """Median step of one configuration, in this process. The layout and the loop stand here, because `train` has but
    one layout; each step does what `enfilade.train.Run.update` does on one process."""
    import torch

    from enfilade import checkpoint, recipes
    from enfilade import train as training
    from enfilade.data.epochs import batches
    from enfilade.losses import objective

    torch.set_num_threads(threads)
    recipe = recipes.get(name)
    stage = replace(recipe.stages[0], size=size, epochs=1000, ema=0.998)
    recipe = recipe.replace(stages=(stage,))
    torch.manual_seed(recipe.seed)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network = checkpoint.build(recipe.model, recipe.arguments).to(memory_format=memory)
    training.freeze(network, stage)
    optimiser = training.make_optimiser(network, stage)
    owner = training.part_of(network)
    average = training.MovingAverage(network, stage.ema)
    data = data_of(root)
    loader = batches(data, recipe, 0, 0, 0, 1, 1)
    walls, waits = [], []
    for step in range(WARM_UP + steps):
        begun = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - begun)
        image = batch.image.contiguous(memory_format=memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = network(image, **training.extra_inputs(network, batch))
            loss, _ = objective(output, batch, stage.losses)
        loss.backward()
        training.clip(network, owner, stage.clip)
        optimiser.step()
        optimiser.zero_grad()
        average.update(network, step)
        walls.append(time.perf_counter() - begun)
    wall = statistics.median(walls[WARM_UP:])
    return {
        "images_per_second": stage.batch / wall,
        "step_ms": 1e3 * wall,
        "data_waiting": sum(waits[WARM_UP:]) / sum(walls[WARM_UP:]),
        "batch": stage.batch,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--root", help="folder of NYUv2 frames; procedural rooms if not given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=6, help=f"timed steps of a row, after {WARM_UP} others")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 288), metavar=("H", "W"), help="training crop")
    parser.add_argument("--row", nargs=3, metavar=("RECIPE", "PRECISION", "LAYOUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = (args.size[0], args.size[1])
    if args.row:
        print(json.dumps(row(*args.row, args.root, args.threads[0], args.steps, size)))
        return

    from importlib.metadata import version

    source = f"NYUv2 frames of {args.root}" if args.root else "8 procedural rooms, rendered beforehand"
    about = {
        "hardware": hardware(),
        "torch": version("torch"),
        "date": datetime.date.today().isoformat(),
        "data": "nyuv2" if args.root else "rooms",
        "size": size,
        "steps": args.steps,
    }
    print(f"{about['hardware']}; torch {about['torch']}; {about['date']}")
    print(f"{source}; crops of {size[1]}x{size[0]}, random weights, median of {args.steps} steps\n")
    print(f"{'recipe':11}{'threads':>8}  {'precision':10}{'layout':15}{'images/s':>9}{'ms/step':>10}{'waiting':>9}")
    kinds = [("gad-nyuv2", p, m) for p in ("bf16", "fp32") for m in ("channels_last", "contiguous")]
    kinds.append(("fpn-peer", "bf16", "channels_last"))
    rows = []
    for threads in args.threads:
        for name, precision, layout in kinds:
            job = [sys.executable, __file__, "--row", name, precision, layout, "--threads", str(threads)]
            job += ["--steps", str(args.steps), "--size", *map(str, size)]
            job += ["--root", args.root] if args.root else []
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            result = subprocess.run(job, env=env, capture_output=True, text=True)
            head = f"{name:11}{threads:>8}  {precision:10}{layout:15}"
            if result.returncode:
                print(
                    head + "failed: " + (result.stderr.strip().splitlines() or [str(result.returncode)])[-1], flush=True
                )
                continue
            found = json.loads(result.stdout.splitlines()[-1])
            rows.append({"recipe": name, "threads": threads, "precision": precision, "layout": layout, **found})
            print(
                head + f"{found['images_per_second']:>9.2f}{found['step_ms']:>10.0f}{found['data_waiting']:>9.1%}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
