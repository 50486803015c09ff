"""3-D deformable convolution, 12 -> 12 channels, 3^3 kernel, 60 x 36 x 60 voxels: ours and pure-torch forms.

    python benchmarks/deform.py --threads 1 2 --json deform.json

Forms: `ops.deform`; one grid_sample for each of the 27 taps; one grid_sample for all, of a grid 27 times as long; and a
plain conv3d, which samples nothing, as the floor. Forward, and forward + backward with the gradients of all four
tensors. Offsets are normal, of one voxel. Before it is timed each form is compared with ours, value by value.

Times are taken in one process for each number of threads, the forms in rounds, each in a new order, so that what else
the machine does meets all alike: the median of the rounds, and beside it that of the CPU time of all threads together,
which a busy machine disturbs least. Peak memory, beyond the inputs, is of one call in a process of its own, after
a call of a small volume.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gap import hardware, peak_of  # the script beside this one

CHANNELS, SIZE, SPREAD = 12, (60, 36, 60), 1.0
FORMS = ("ours", "27 grid_samples", "one grid_sample", "plain conv3d")
MODES = ("forward", "forward + backward")


def places(offsets):
    """Where torch's sampler finds what each tap looks at, of -1 to 1 over the volume: taps of b x y z 3, last axis
    first."""
    import torch

    b, _, *size = offsets.shape
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), -1)
    taps = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
    steps = offsets.view(b, 27, 3, *size).movedim(2, -1)
    scale = 2 / (torch.tensor(size) - 1)
    return [((grid + tap + steps[:, t]) * scale - 1).flip(-1) for t, tap in enumerate(taps)]


def by_tap(x, offsets, weight, bias):
    import torch
    import torch.nn.functional as F

    out = bias[:, None, None, None]
    for grid, matrix in zip(places(offsets), weight.flatten(2).unbind(2)):
        found = F.grid_sample(x, grid, align_corners=True)
        out = out + torch.einsum("oc,bcxyz->boxyz", matrix, found)
    return out


def at_once(x, offsets, weight, bias):
    import torch
    import torch.nn.functional as F

    b, c, *size = x.shape
    found = F.grid_sample(x, torch.cat(places(offsets), 1), align_corners=True)
    found = found.view(b, c * 27, -1)
    return (weight.flatten(1) @ found + bias[:, None]).view(b, -1, *size)


def plain(x, offsets, weight, bias):
    import torch.nn.functional as F

    return F.conv3d(x, weight, bias, padding=1)


def tensors_of(size):
    import torch

    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, CHANNELS, *size), torch.randn(CHANNELS, CHANNELS, 3, 3, 3), torch.randn(CHANNELS)
    return [x, SPREAD * torch.randn(1, 81, *size), weight, bias]


def call_of(form: str, mode: str, size=SIZE):
    """A function of nothing, with the output, or the output and the gradients."""
    import torch

    from enfilade.ops.deform import deform_conv3d

    convolve = (deform_conv3d, by_tap, at_once, plain)[FORMS.index(form)]
    backward = mode == MODES[1]
    tensors = [t.requires_grad_(backward) for t in tensors_of(size)]
    direction = torch.randn(1, CHANNELS, *size)

    def call():
        out = convolve(*tensors)
        if not backward:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, tensors, direction, allow_unused=True)

    return call


def peak(form: str, mode: str, threads: int) -> float:
    """MiB that one call needs beyond its inputs; in this process."""
    import torch

    torch.set_num_threads(threads)
    call_of(form, mode, (8, 8, 8))()
    return peak_of(call_of(form, mode)) / 2**20


def check() -> None:
    """The forms against ours. Sums of some thousand products differ in the fifth digit; where torch's rounding of a
    place, to a millionth of the volume, crosses a voxel, the derivative in that offset is another."""
    expected = call_of(FORMS[0], MODES[1])()
    for form in FORMS[1:3]:
        for name, found, ours in zip(("out", "x", "offsets", "weight", "bias"), call_of(form, MODES[1])(), expected):
            off = float((found - ours).norm() / ours.norm())
            if off > (1e-2 if name == "offsets" else 1e-4):
                raise SystemExit(f"{form} and ours differ in {name} by {off:.1e} of the norm")


def times(threads: int, rounds: int) -> dict:
    """Medians of the time and of the CPU time, ms, of each form and mode; in this process."""
    import torch

    torch.set_num_threads(threads)
    check()
    calls = {(form, mode): call_of(form, mode) for form in FORMS for mode in MODES}
    found: dict = {key: [] for key in calls}
    for _ in range(rounds):
        for key in random.sample(list(calls), len(calls)):
            work, start = time.process_time(), time.perf_counter()
            result = calls[key]()
            found[key].append((time.perf_counter() - start, time.process_time() - work))
            del result
    return {"|".join(key): [1e3 * statistics.median(c) for c in zip(*column)] for key, column in found.items()}


def ask(*job: str, threads: int):
    """What this script prints in a fresh process."""
    command = [sys.executable, __file__, "--threads", str(threads), *job]
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(job)} failed")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        kind, threads = args.part, args.threads[0]
        print(json.dumps(times(threads, args.rounds) if kind == ["times"] else peak(kind[0], kind[1], threads)))
        return

    from importlib.metadata import version

    about = {
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "rounds": args.rounds,
        **{name: version(name) for name in ("torch", "numba")},
    }
    print(f"{about['hardware']}; torch {about['torch']}, numba {about['numba']}; {about['date']}")
    rows = []
    for threads in args.threads:
        found = ask("--rounds", str(args.rounds), "--part", "times", threads=threads)
        for mode in MODES:
            print(f"\n{f'{mode}, {threads} threads':34}{'ms':>9}{'CPU ms':>9}{'MiB':>7}   times ours: ms, CPU, MiB")
            ours: list = []
            for form in FORMS:
                cell = [*found[f"{form}|{mode}"], ask("--part", form, mode, threads=threads)]
                ours = ours or cell
                ratios = [a / b for a, b in zip(cell, ours)]
                names = ("ms", "cpu_ms", "peak_mib")
                rows.append({"threads": threads, "mode": mode, "form": form, **dict(zip(names, cell))})
                line = f"{form:34}{cell[0]:9.1f}{cell[1]:9.1f}{cell[2]:7.0f}   "
                print(line + "".join(f"{ratio:7.2f}" for ratio in ratios), flush=True)
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
