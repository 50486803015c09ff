"""Mean field of the fully connected CRF at 640x480: ours, its parts, and plain forms of the same.

    python benchmarks/crf.py --threads 1 2 --image photo.jpg --out crf.json

Ten iterations over 40 classes, one bilateral and one spatial kernel (theta 3 pixels), full C x C weights and
compatibilities unless "Potts" is said. The bilateral kernel's theta is 80 pixels and 13 of 255, then 160 and 3. Every
number of threads has a process of its own. Without --image a scene of soft areas and noise stands in for a photo: the
number of vertices, and so the time, depends on the picture.

Of our steps one by one, splat, blur, slice and products are separate passes over memory, as `ops.lattice.filter` makes
them; fused is `ops.crf.mean_field` with the lattices at hand. Peers: the lattice in torch operations; mean field in a
window of 11x11 pixels (as in ConvCRF), in torch operations; MONAI's permutohedral filter, where MONAI is installed
with its compiled parts. A peer that sums over a window or filters differently gives other numbers, so only times are
compared. The lattice of place alone is kept from call to call, as in a training; only where both lattices are said to
be built it is built anew. With more threads than free cores torch's threads wait for each other, and the peers' times
mean nothing.
"""

import argparse
import datetime
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from gap import hardware  # the script beside this one

THETAS = ((80.0, 13.0), (160.0, 3.0))
SPATIAL = 3.0
ITERATIONS, TRAINED = 10, 5
WINDOW = 5  # pixels to each side
SHRINK = 8  # of the image and of theta, where exact Gaussians are computed


def scene(width: int, height: int, path: Path | None):
    """1 3 h w in [0, 1]."""
    import torch
    import torch.nn.functional as F

    if path is not None:
        import cv2

        from enfilade import images

        photo = cv2.resize(images.read(path).rgb, (width, height), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(photo).permute(2, 0, 1)[None].contiguous()
    generator = torch.Generator().manual_seed(0)
    areas = 0
    for cells in (6, 24):
        coarse = torch.rand(1, 3, cells * 3 // 4, cells, generator=generator)
        areas = areas + F.interpolate(coarse, (height, width), mode="bicubic").mul(3).round() / 3 / 2
    noise = 0.015 * torch.randn(areas.shape, generator=generator)
    return (F.avg_pool2d(areas, 3, 1, 1, count_include_pad=False) + noise).clamp(0, 1)


def problem(image, classes: int, potts: bool):
    """Logits that follow areas of the image, as a network's would, weights and compatibilities."""
    import torch
    import torch.nn.functional as F

    from enfilade.ops import crf

    generator = torch.Generator().manual_seed(1)
    level = F.avg_pool2d(image.mean(1, keepdim=True), 9, 1, 4, count_include_pad=False)
    labels = (level * classes).long().clamp(max=classes - 1)[:, 0]
    unary = 5 * F.one_hot(labels, classes).permute(0, 3, 1, 2).float()
    unary = unary + torch.randn(unary.shape, generator=generator)
    weights = torch.tensor([7.0, 3.0])[:, None, None] * torch.eye(classes)
    compatibility = crf.potts(classes)
    if not potts:
        weights = weights + 0.1 * torch.randn(weights.shape, generator=generator)
        compatibility = compatibility + 0.05 * torch.randn(compatibility.shape, generator=generator)
    return unary.contiguous(), weights, compatibility


def torch_lattice(unary, lattices, matrices, iterations: int):
    """Mean field with the lattices in torch operations."""
    import torch

    from enfilade.ops.lattice import _filter_torch

    scaled = [lattice.scaled(lattice.norm**-0.5) for lattice in lattices]
    z = unary
    for _ in range(iterations):
        q = z.softmax(1)
        z = unary
        for lattice, m in zip(scaled, matrices):
            message = _filter_torch(q, lattice, False) - lattice.self_weight * q
            z = z - torch.einsum("lm,bmhw->blhw", m, message)
    return z


def windowed(unary, image, theta: tuple[float, float], matrices, iterations: int):
    """Mean field in which a pixel hears the pixels of a window, with exact Gaussians, one shift at a time."""
    import torch
    import torch.nn.functional as F

    h, w = unary.shape[2:]
    steps = [(y, x) for y in range(-WINDOW, WINDOW + 1) for x in range(-WINDOW, WINDOW + 1) if (y, x) != (0, 0)]

    def shifted(padded, y, x):
        return padded[..., WINDOW + y : WINDOW + y + h, WINDOW + x : WINDOW + x + w]

    around = [WINDOW] * 4
    colours, inside = F.pad(image * 255 / theta[1], around), F.pad(torch.ones(1, 1, h, w), around)
    kernels = []
    for y, x in steps:
        near = -0.5 * (x * x + y * y)
        apart = (shifted(colours, y, x) - image * 255 / theta[1]).square().sum(1, keepdim=True)
        there = shifted(inside, y, x)
        kernels.append(
            [there * torch.exp(near / theta[0] ** 2 - 0.5 * apart), there * torch.exp(torch.tensor(near / SPATIAL**2))]
        )
    norms = [torch.stack([k[i] for k in kernels]).sum(0) + 1 for i in range(2)]
    z = unary
    for _ in range(iterations):
        padded, messages = F.pad(z.softmax(1), around), [0, 0]
        for (y, x), pair in zip(steps, kernels):
            there = shifted(padded, y, x)
            messages = [message + kernel * there for message, kernel in zip(messages, pair)]
        z = unary
        for m, message, norm in zip(matrices, messages, norms):
            z = z - torch.einsum("lm,bmhw->blhw", m, message / norm)
    return z


def monai_lattice(unary, features, matrices, iterations: int):
    """Mean field with MONAI's permutohedral filter, divided by what it makes of ones."""
    import torch

    filtering = importlib.import_module("monai.networks.layers.filtering")

    def smooth(x, f):
        return filtering.PHLFilter.apply(x, f)

    norms = [smooth(torch.ones_like(unary[:, :1]), f) for f in features]
    z = unary
    for _ in range(iterations):
        q = z.softmax(1)
        z = unary
        for f, norm, m in zip(features, norms, matrices):
            z = z - torch.einsum("lm,bmhw->blhw", m, smooth(q, f) / norm)
    return z


def bytes_moved(lattices, classes: int) -> int:
    """Of one fused iteration, if every array went to memory and back once a pass: the rows of the points (the unary; Q
    read and written), their corners, and the vertices' rows in the sweep, the blurs and the products."""
    b, h, w = lattices[0].size
    row = 4 * (-(-classes // 8) * 8)
    points = b * h * w * (3 * row + sum(8 * (lattice.dimension + 1) for lattice in lattices))
    sweep_and_products = 6 * row
    blur = [(lattice.dimension + 1) * (2 * row + 8) for lattice in lattices]
    return points + sum(lattice.vertices * (sweep_and_products + x) for lattice, x in zip(lattices, blur))


def accuracy(image, theta: tuple[float, float], classes: int) -> dict:
    """The lattice against exact Gaussians: relative L2 of row-normalised outputs of each kernel, and the mean
    difference of Q after mean field."""
    import torch
    import torch.nn.functional as F

    from enfilade.ops import crf
    from enfilade.ops.lattice import Lattice, filter, gaussian_reference

    image = F.interpolate(image, scale_factor=1 / SHRINK, mode="area")
    unary, weights, compatibility = problem(image, classes, potts=False)
    kernels = (crf.Kernel(xy=theta[0] / SHRINK, rgb=theta[1]), crf.Kernel(xy=SPATIAL))
    features, found = [k.features(image) for k in kernels], {}
    q = unary.softmax(1)
    for name, f in zip(("bilateral", "spatial"), features):
        exact = gaussian_reference(q, f)
        found[name] = float((filter(q, Lattice.build(f)) - exact).norm() / exact.norm())
    with torch.no_grad():
        lattices = [Lattice.build(f) for f in features]
        ours = crf.mean_field(unary, lattices, weights, compatibility, ITERATIONS).softmax(1)
        exact = crf.mean_field_reference(unary, features, weights, compatibility, ITERATIONS).softmax(1)
    agree = (ours.argmax(1) == exact.argmax(1)).float().mean()
    return found | {"q": float((ours - exact).abs().sum(1).mean() / 2), "labels": float(agree)}


def cells_of(image, theta: tuple[float, float], classes: int, batch: int) -> tuple[dict, dict, dict]:
    """What is timed, by name; facts; why some peers are missing."""
    import torch

    from enfilade.ops import crf, lattice
    from enfilade.ops.mean_field import join

    kernels = (crf.Kernel(xy=theta[0], rgb=theta[1]), crf.Kernel(xy=SPATIAL))
    unary, weights, compatibility = problem(image, classes, potts=False)
    _, plain, potts = problem(image, classes, potts=True)
    grids, several = (crf.build_lattices(kernels, x) for x in (image, image.repeat(batch, 1, 1, 1)))
    many = unary.repeat(batch, 1, 1, 1)
    matrices = compatibility @ weights
    values = unary.softmax(1).flatten(2).numpy()
    tables = [lattice._splat_compiled(values, grid) for grid in grids]
    message = torch.from_numpy(values)[0]
    direction = torch.randn(unary.shape, generator=torch.Generator().manual_seed(2))

    def train(checkpoint: bool) -> None:
        leaves = [x.clone().requires_grad_() for x in (unary, weights, compatibility)]
        grids = crf.build_lattices(kernels, image)
        out = crf.mean_field(leaves[0], grids, leaves[1], leaves[2], TRAINED, checkpoint=checkpoint)
        out.backward(direction)

    def train_torch() -> None:
        leaves = [x.clone().requires_grad_() for x in (unary, weights, compatibility)]
        grids = crf.build_lattices(kernels, image)
        torch_lattice(leaves[0], grids, leaves[2] @ leaves[1], TRAINED).backward(direction)

    cells: dict[str, Callable] = {
        "build both lattices": lambda: (crf._of_place.cache_clear(), crf.build_lattices(kernels, image)),
        "join and normalise": lambda: join([replace(grid) for grid in grids], "symmetric", True),
        "splat": lambda: [lattice._splat_compiled(values, grid) for grid in grids],
        "blur": lambda: [lattice._blur_compiled(t, grid, False) for t, grid in zip(tables, grids)],
        "slice": lambda: [lattice._slice_compiled(t, grid, classes) for t, grid in zip(tables, grids)],
        "C x C products": lambda: [m @ message for m in matrices],
        "softmax": lambda: unary.softmax(1),
        "fused": lambda: crf.mean_field(unary, grids, weights, compatibility, ITERATIONS),
        "fused, Potts": lambda: crf.mean_field(unary, grids, plain, potts, ITERATIONS),
        "fused, batch": lambda: crf.mean_field(many, several, weights, compatibility, ITERATIONS),
        "train": lambda: train(False),
        "train, checkpoints": lambda: train(True),
        "peer: lattice in torch": lambda: torch_lattice(unary, grids, matrices, ITERATIONS),
        "peer: lattice in torch, train": train_torch,
        "peer: window in torch": lambda: windowed(unary, image, theta, matrices, ITERATIONS),
    }
    missing = {}
    try:
        features = [k.features(image) for k in kernels]
        monai_lattice(unary, features, matrices, 1)
        cells["peer: MONAI"] = lambda: monai_lattice(unary, features, matrices, ITERATIONS)
    except Exception as error:  # not installed, or without its compiled parts: an error of many kinds
        missing["peer: MONAI"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    facts = {"vertices": [grid.vertices for grid in grids], "bytes": bytes_moved(grids, classes)}
    return cells, facts, missing


def measure(args: argparse.Namespace) -> dict:
    """All cells with the one number of threads that `args` names."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads[0])
    width, height = args.size
    image = scene(width, height, args.image)
    source, target = (np.ones(1 << 25, np.float32) for _ in range(2))
    found: dict = {"thetas": []}

    def copy():
        from enfilade.ops.lattice import run_parts

        run_parts(lambda _, i, j: np.copyto(target[i:j], source[i:j]), len(source))

    for theta in THETAS:
        cells, facts, missing = cells_of(image, theta, args.classes, args.batch)
        cells["copy"] = copy
        walls, works = {name: [] for name in cells}, {name: [] for name in cells}
        order, shuffler = list(cells), random.Random(0)
        for turn in range(args.runs + 1):  # the first warms up
            shuffler.shuffle(order)
            for name in order:
                if name.startswith("peer") and not 0 < turn <= args.peer_runs:
                    continue
                if sys.stderr.isatty():
                    print(f"\r{args.threads[0]} threads, theta {theta}, {turn}: {name:40}", end="", file=sys.stderr)
                begun, work = time.perf_counter(), time.process_time()
                with torch.set_grad_enabled("train" in name):
                    cells[name]()
                if turn:
                    works[name].append(1e3 * (time.process_time() - work))
                    walls[name].append(1e3 * (time.perf_counter() - begun))
        if sys.stderr.isatty():
            print(file=sys.stderr)
        rows = {
            name: {"ms": statistics.median(times), "min_ms": min(times), "cpu_ms": min(works[name]), "all_ms": times}
            for name, times in walls.items()
            if times
        }
        missing |= {name: "--peer-runs 0" for name, times in walls.items() if not times}
        facts["copy_gb_per_s"] = 2e-6 * source.nbytes / rows.pop("copy")["min_ms"]
        facts |= {"theta": theta, "rows": rows, "missing": missing}
        facts["accuracy"] = accuracy(image, theta, args.classes)
        found["thetas"].append(facts)
    return found


def show(threads: int, facts: dict, args: argparse.Namespace) -> None:
    rows, (xy, rgb) = facts["rows"], facts["theta"]
    bilateral, spatial = facts["vertices"]
    print(f"## theta {xy:g}/{rgb:g}, {threads} thread{'s' if threads > 1 else ''}\n")
    print(f"Vertices: {bilateral:,} bilateral, {spatial:,} spatial; {args.size[0] * args.size[1]:,} pixels.\n")
    print(f"| one step of {ITERATIONS}, not fused | ms | min | CPU ms |\n|---|--:|--:|--:|")
    steps = ("splat", "blur", "slice", "C x C products", "softmax")
    for name in steps:
        print(f"| {name} " + "".join(f"| {rows[name][k]:.1f} " for k in ("ms", "min_ms", "cpu_ms")) + "|")
    apart = ITERATIONS * sum(rows[name]["ms"] for name in steps)
    print(f"\n| {ITERATIONS} iterations | ms | min | CPU ms | this / ours |\n|---|--:|--:|--:|--:|")

    def line(name: str, told: str, base: str) -> None:
        if name in facts["missing"]:
            print(f"| {told} | not run: {facts['missing'][name]} | | | |")
            return
        r = rows[name]
        print(f"| {told} | {r['ms']:.0f} | {r['min_ms']:.0f} | {r['cpu_ms']:.0f} ", end="")
        print(f"| {r['ms'] / rows[base]['ms']:.2f} |" if base else "| |")

    line("build both lattices", "both lattices built", "fused")
    line("join and normalise", "norms, weights and corners joined (part of each row below)", "fused")
    line("fused", "ours, fused", "fused")
    line("fused, Potts", "ours, fused, Potts", "fused")
    print(f"| the steps above, one after the other | {apart:.0f} | | | {apart / rows['fused']['ms']:.2f} |")
    line("fused, batch", f"ours, fused, batch of {args.batch}", "fused")
    line("peer: lattice in torch", "lattice in torch operations", "fused")
    line("peer: window in torch", f"window of {2 * WINDOW + 1}x{2 * WINDOW + 1} in torch operations", "fused")
    line("peer: MONAI", "MONAI's permutohedral filter", "fused")
    print(f"\n| {TRAINED} iterations forward and backward, with the build | ms | min | CPU ms | this / ours |")
    print("|---|--:|--:|--:|--:|")
    line("train", "ours", "train")
    line("train, checkpoints", "ours, with checkpoints", "train")
    line("peer: lattice in torch, train", "lattice in torch operations", "train")
    rate = 1e-6 * facts["bytes"] * ITERATIONS / rows["fused"]["min_ms"]
    print(f"\nMemory: an iteration moves {1e-6 * facts['bytes']:.0f} MB if nothing stays in a cache; ", end="")
    print(f"fused, that is {rate:.1f} GB/s, where copying moves {facts['copy_gb_per_s']:.1f} GB/s.")
    a = facts["accuracy"]
    print(f"Accuracy at 1/{SHRINK} of the size and of theta, against exact Gaussians: row-normalised ", end="")
    print(f"outputs, relative L2, bilateral {100 * a['bilateral']:.1f} %, spatial {100 * a['spatial']:.1f} %; ", end="")
    print(f"after {ITERATIONS} iterations {100 * a['q']:.1f} % of Q's mass lies elsewhere and ", end="")
    print(f"{100 * a['labels']:.1f} % of labels agree.\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", "--json", type=Path, help="also write the tables there, with each run's time")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--image", type=Path, help="a photo, scaled to the size")
    parser.add_argument("--size", nargs=2, type=int, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, default=7, help="of which the median and the least are told")
    parser.add_argument("--peer-runs", type=int, default=2, help="the same of the peers, which are slow")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args)))
        return

    about: dict = {"hardware": hardware(), "size": args.size, "classes": args.classes, "runs": args.runs}
    about |= {"date": datetime.date.today().isoformat(), "load_before": os.getloadavg()[0]}
    about["packages"] = {package: metadata.version(package) for package in ("torch", "numba", "numpy")}
    print(f"{about['hardware']}; ", end="")
    print(", ".join(f"{package} {version}" for package, version in about["packages"].items()), end="; ")
    print(f"{about['date']}; load of the machine before: {about['load_before']:.1f}\n")
    print(
        f"{args.size[0]}x{args.size[1]}, {args.classes} classes, {args.image.name if args.image else 'a drawn scene'}."
    )
    print(f"Median and least of {args.runs} runs, {args.peer_runs} of the peers; CPU ms: of all threads, the least.\n")
    for threads in args.threads:
        command = [sys.executable, __file__, "--job", "--threads", str(threads), "--runs", str(args.runs)]
        command += ["--size", *map(str, args.size), "--classes", str(args.classes), "--batch", str(args.batch)]
        command += ["--peer-runs", str(args.peer_runs), *(["--image", str(args.image)] if args.image else [])]
        own = {"OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(f"timing with {threads} threads failed")
        about[f"threads_{threads}"] = found = json.loads(result.stdout.splitlines()[-1])
        for facts in found["thetas"]:
            show(threads, facts, args)
    if args.out:
        temporary = args.out.with_name(args.out.name + ".part")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
