"""Region support of 640x480 images: enfilade.ops.regions, scikit-image, SciPy, and Algorithm 1 as it is printed.

    python benchmarks/regions.py --json regions.json

Three images: a rendered room, and two of patches around random points. Each row is one function on the three; before
it is timed, its result is compared with ours. Every row runs on one thread, and what counts is processor time, so that
a busy machine costs little accuracy. The printed form (`region_support_reference`) looks for each region in the whole
image, in NumPy, and floods it in Python; it takes a minute for the last image, which `--quick` leaves out. scikit-image
is used if it is installed.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

H, W, CLASSES = 480, 640, 40


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def timed(function, check, repeats: int) -> float:
    """Median milliseconds; one call is enough where it takes a second. `check` gets the first result."""
    start = time.thread_time()
    result = function()
    first = time.thread_time() - start
    check(result)
    if first > 1:
        return 1e3 * first
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


def patches(np, points: int):
    """Labels by the nearest of random points, a tenth of them void; depth of a floor and a back wall, with an offset
    and some noise for each patch."""
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:H, :W]
    nearest = cKDTree(rng.uniform((0, 0), (H, W), (points, 2))).query(np.stack([y, x], -1).reshape(-1, 2))[1]
    labels = rng.integers(0, CLASSES, points).astype(np.uint8)
    labels[rng.random(points) < 0.1] = 255
    depth = np.minimum(600 / (y + 60), 5) + rng.uniform(-0.3, 0.3, points)[nearest].reshape(H, W)
    depth = (depth + rng.normal(0, 0.01, (H, W))).astype(np.float32)
    return labels[nearest].reshape(H, W), depth


def support_by_numpy(np, ids, count: int, depth):
    """Step 2 of the algorithm for depth without holes, in array operations; a loop over ten bins is left."""
    ids, metres = ids.reshape(-1), depth.reshape(-1).astype(np.float64)
    pixels = np.bincount(ids, minlength=count + 1)
    low, high = np.full(count + 1, np.inf), np.zeros(count + 1)
    np.minimum.at(low, ids, metres)
    np.maximum.at(high, ids, metres)
    var = (metres.max() - metres.min()) / 10
    wide = ~(high - low < 2 * var)
    bins = np.where(wide, np.clip(np.ceil((high - low) / var - 1e-6), 1, 10), 1).astype(int)
    k = np.minimum(((metres - low[ids]) / var).astype(int), bins[ids] - 1)
    held = np.bincount(ids * 10 + k, minlength=10 * (count + 1)).reshape(-1, 10)
    total = np.bincount(ids * 10 + k, weights=metres, minlength=10 * (count + 1)).reshape(-1, 10)
    part = np.zeros((count + 1, 10), int)  # the last bin of the part that each bin goes to
    n = np.zeros(count + 1, int)
    ends = np.zeros((count + 1, 10), bool)
    for j in range(10):
        n += held[:, j]
        ends[:, j] = (n * bins >= pixels) | (j == bins - 1)
        n[ends[:, j]] = 0
    last = np.full(count + 1, 9)
    for j in range(9, -1, -1):
        last = np.where(ends[:, j], j, last)
        part[:, j] = last
    joined = part + 10 * np.arange(count + 1)[:, None]
    number = np.bincount(joined.reshape(-1), held.reshape(-1), minlength=held.size)
    mean = np.bincount(joined.reshape(-1), total.reshape(-1), minlength=held.size) / np.maximum(number, 1)
    mean[:10] = 0  # void
    return mean[joined.reshape(-1)[ids * 10 + k]].astype(np.float32).reshape(depth.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="leave out the printed form on the third image")
    args = parser.parse_args()

    import numpy as np
    import scipy
    from scipy import ndimage

    from enfilade.data.rooms import room
    from enfilade.ops.regions import region_support, region_support_reference, regions, regions_reference

    try:
        import skimage
        from skimage import measure
    except ImportError:
        skimage = measure = None

    rendered = room(0)
    images = [(rendered.labels, rendered.depth), patches(np, 2800), patches(np, 17500)]
    counts = [regions(labels)[1] for labels, _ in images]
    expected = [region_support(*image) for image in images]

    def by_scikit_image(labels):
        return measure.label(labels.astype(np.int32), background=255, connectivity=2, return_num=True)

    def by_scipy(labels):
        """One search for each label value: SciPy knows a foreground and a background."""
        ids, count = np.zeros(labels.shape, np.int32), 0
        for label in np.unique(labels[labels != 255]):
            components, n = ndimage.label(labels == label, np.ones((3, 3)))
            ids[components > 0] = components[components > 0] + count
            count += n
        return ids, count

    def support_by(find):
        return lambda labels, depth: support_by_numpy(np, *find(labels), depth)

    jobs = {
        "regions": [
            ("enfilade", regions),
            ("scikit-image", by_scikit_image if measure else None),
            ("SciPy, label by label", by_scipy),
            ("as printed", regions_reference),
        ],
        "region support": [
            ("enfilade", region_support),
            ("scikit-image, then numpy", support_by(by_scikit_image) if measure else None),
            ("SciPy, then numpy", support_by(by_scipy)),
            ("as printed", region_support_reference),
        ],
    }

    def check(job, i):
        def compare(result):
            if job == "regions":
                assert result[1] == counts[i]
            else:  # sums in another order, rounded to float32
                np.testing.assert_allclose(result, expected[i], rtol=3e-7)

        return compare

    versions = f"numpy {np.__version__}, scipy {scipy.__version__}"
    versions += f", scikit-image {skimage.__version__}" if skimage else "; scikit-image is not installed"
    head = f"{hardware()}; {versions}; {datetime.date.today()}"
    print(head)
    print("ms of one thread, and how many times as long as ours")
    result = {"hardware": head, "repeats": args.repeats, "regions": counts, "rows": []}
    for job, rows in jobs.items():
        print(f"\n{job + ', 640x480':28s}" + "".join(f"{f'{n} regions':>24s}" for n in counts))
        base = []
        for name, run in rows:
            if run is None:
                continue
            print(f"{name:28s}", end="", flush=True)
            cells: list[float | None] = []
            for i, image in enumerate(images):
                if name == "as printed" and args.quick and i == 2:
                    cells.append(None)
                    continue
                image = image[:1] if job == "regions" else image
                cells.append(timed(lambda run=run, image=image: run(*image), check(job, i), args.repeats))
                base = base if len(base) == len(images) else [*base, cells[-1]]
                print(f"{cells[-1]:14,.2f}{cells[-1] / base[i]:9,.1f}x", end="", flush=True)
            print()
            result["rows"].append({"job": job, "name": name, "ms": cells})
    if args.json:
        temporary = args.json.with_name(args.json.name + ".part")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
