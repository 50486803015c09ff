"""From depth to voxels: the TSDF, label volumes at a quarter, features between pixels and voxels; ours and plain forms.

    python benchmarks/tsdf.py --threads 1 2 --json tsdf.json

One 640x480 frame, 240 x 144 x 240 voxels of 0.02 m. Peers, in the same process: the same TSDF with NumPy and SciPy's
exact distance transform (which use one thread whatever is allowed), the labels in NumPy, and torch.scatter_reduce.
Before it is timed each of ours is compared with its peer, value by value.

Rows are called in rounds, each in a new order, so that what else the machine does meets all alike; median of the
rounds, and beside it the CPU time of all threads together, which a busy machine disturbs least. The frame is that of
the folder --frame (SSCNet's files), else a procedural room. Our volumes come from the system as zero pages: what no
pixel touches is not written, and is paid for by whoever reads it first; scatter_reduce writes it all.
"""

import argparse
import datetime
import json
import random
import statistics
import time
from pathlib import Path

from gap import hardware  # the script beside this one

CHANNELS = 12


def frame_of(folder: Path | None):
    """depth, camera, grid and labels."""
    from enfilade.data import rooms, ssc
    from enfilade.ops.voxels import VoxelGrid

    if folder is None:
        sample = rooms.room(3, voxels=True)
    else:
        (sample,) = ssc.SSC(folder, "all", depth_only=True)
    return sample.depth, sample.camera, VoxelGrid(sample.voxels.origin, sample.camera.pose), sample.voxels.labels


def jobs_of(depth, camera, grid, labels) -> dict:
    """Per job its forms, ours first: functions of the number of threads, None for a peer that knows none."""
    import numpy as np
    import torch

    from enfilade.ops import projection, voxels
    from enfilade.ops.tsdf import tsdf, tsdf_reference, visibility

    jobs = {
        "flipped TSDF": {
            "ours": lambda n: tsdf(depth, camera, grid, threads=n),
            "numpy + scipy": lambda n: tsdf_reference(depth, camera, grid),
        },
        "visibility": {"ours": lambda n: visibility(depth, camera, grid, threads=n)},
        "labels to a quarter": {
            "ours": lambda n: voxels.downsample_labels(labels, threads=n),
            "numpy": lambda n: voxels.downsample_labels_reference(labels),
        },
        "pixels to voxel numbers": {
            "ours": lambda n: voxels.pixel_voxels(depth, camera, grid, threads=n),
            "numpy": lambda n: voxels.pixel_voxels_reference(depth, camera, grid),
        },
    }
    torch.manual_seed(0)
    features = torch.randn(1, CHANNELS, *depth.shape)
    for name, target in (("60x36x60", grid.coarse()), ("240x144x240", grid)):
        index = torch.from_numpy(voxels.pixel_voxels(depth, camera, target))[None]
        count = int(np.prod(target.shape))
        direction = torch.randn(1, CHANNELS, *target.shape)

        def ours(n, index=index, target=target, reduce="max", direction=None):
            x = features.clone().requires_grad_() if direction is not None else features
            out = projection.to_voxels(x, index, target.shape, reduce=reduce)
            return out if direction is None else torch.autograd.grad(out, x, direction)[0]

        def scatter(n, index=index, target=target, count=count, reduce="max", direction=None):
            x = features.clone().requires_grad_() if direction is not None else features
            out = projection._to_voxels_torch(x.flatten(2), index.flatten(1), count, reduce == "max")
            out = out.view(1, CHANNELS, *target.shape)
            return out if direction is None else torch.autograd.grad(out, x, direction)[0]

        for reduce in ("mean", "max"):
            for mode, given in (("", None), (", forward + backward", direction)):
                jobs[f"{CHANNELS} channels to {name}, {reduce}{mode}"] = {
                    "ours": lambda n, f=ours, r=reduce, d=given: f(n, reduce=r, direction=d),
                    "scatter_reduce": lambda n, f=scatter, r=reduce, d=given: f(n, reduce=r, direction=d),
                }
    return jobs


def check(name: str, forms: dict) -> None:
    """Ours against its peer; also compiles the loops."""
    import numpy as np

    found, *others = (np.asarray(form(1)) for form in forms.values())
    for other in others:
        # Whole numbers and the TSDF to the last bit; sums of floats in another order to six digits.
        if not np.allclose(found, other, rtol=1e-5, atol=1e-5):
            raise SystemExit(f"{name}: ours and the peer differ by up to {np.abs(found - other).max()}")


def measure(jobs: dict, threads: int, rounds: int) -> dict:
    """Milliseconds of every form: median, and median of the CPU time."""
    import torch

    torch.set_num_threads(threads)
    times: dict = {(job, form): [] for job, forms in jobs.items() for form in forms}
    for _ in range(rounds):
        for key in random.sample(list(times), len(times)):
            work, start = time.process_time(), time.perf_counter()
            result = jobs[key[0]][key[1]](threads)
            times[key].append((time.perf_counter() - start, time.process_time() - work))
            del result
    return {key: [1e3 * statistics.median(column) for column in zip(*found)] for key, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frame", type=Path, help="a folder with one frame of SSCNet")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", help="only jobs whose name holds this")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()

    from importlib.metadata import version

    random.seed(0)
    about = {
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "frame": str(args.frame.name) if args.frame else "room 3",
        "rounds": args.rounds,
        **{name: version(name) for name in ("numpy", "scipy", "torch", "numba")},
    }
    print(
        f"{about['hardware']}; numpy {about['numpy']}, scipy {about['scipy']}, torch {about['torch']}; {about['date']}"
    )
    jobs = {k: v for k, v in jobs_of(*frame_of(args.frame)).items() if not args.jobs or args.jobs in k}
    for name, forms in jobs.items():
        check(name, forms)
    rows = []
    for threads in args.threads:
        print(f"\n{f'{threads} threads, ms':50}{'ours':>9}{'CPU':>9}{'peer':>10}{'CPU':>10}  peer            times")
        found = measure(jobs, threads, args.rounds)
        for job, forms in jobs.items():
            (wall, work), peers = found[job, "ours"], [form for form in forms if form != "ours"]
            row = {"threads": threads, "job": job, "ms": wall, "cpu_ms": work}
            line = f"{job:50}{wall:9.1f}{work:9.1f}"
            for peer in peers:
                other, other_work = found[job, peer]
                row |= {"peer": peer, "peer_ms": other, "peer_cpu_ms": other_work, "times": other / wall}
                line += f"{other:10.1f}{other_work:10.1f}  {peer:15}{other / wall:6.1f}"
            rows.append(row)
            print(line, flush=True)
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
