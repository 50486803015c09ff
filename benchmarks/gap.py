"""GAP, GAD Eq. (3): the O(n) form `dot`, attention (`softmax`) and the n x n matrix as the equation is written.

    python benchmarks/gap.py --threads 2 --json gap.json

32 channels, batch 1, fp32. Each cell runs in a process of its own: its first call gives the peak memory beyond the
inputs, further calls the median time. The n x n form is not tried where its matrices do not fit into free memory.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = ((60, 80), (120, 160), (240, 320))
FORMS = ("dot", "softmax", "n x n")
CHANNELS = 32
MATRICES = {"forward": 1, "backward": 2}  # n x n matrices alive at once: W; and its gradient


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def free_bytes() -> int:
    """Memory that a process may take without swapping."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def peak_of(function) -> int:
    """Bytes of resident memory that one call needs at its worst, beyond what was there before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of importing torch
        before = status_bytes("VmRSS")
        function()
        return status_bytes("VmHWM") - before
    except OSError:  # elsewhere the peak cannot be reset: a lower bound
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def cell(form: str, height: int, width: int, mode: str, threads: int, seconds: float) -> dict:
    """One measurement, in this process."""
    import torch

    from enfilade.models import geometry_distillation as gad

    torch.set_num_threads(threads)
    propagate = {"dot": gad.propagate_dot, "softmax": gad.propagate_softmax, "n x n": gad.propagate_reference}[form]
    torch.manual_seed(0)
    # 8 x 8 positions first: thread pools and kernels are set up outside the measurement
    for h, w in ((8, 8), (height, width)):
        maps = [torch.randn(1, CHANNELS, h, w, requires_grad=mode == "backward") for _ in range(3)]
        direction = torch.randn(1, CHANNELS, h, w)

        def call(maps=maps, direction=direction):
            out = propagate(*maps)
            if mode == "backward":
                out.backward(direction)
                for x in maps:
                    x.grad = None

        if h == 8:
            call()
    start = time.perf_counter()
    peak = peak_of(call)
    times = [time.perf_counter() - start]
    repeats = int(min(20, seconds / times[0]))
    if repeats >= 2:  # else the first call, whose fresh pages cost little beside its seconds
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(times), "calls": len(times), "peak_mib": peak / 2**20}


def measure(form: str, height: int, width: int, mode: str, threads: int, seconds: float) -> dict:
    """One measurement, in a fresh process, or the reason why not."""
    n = height * width
    if form == "n x n":
        need = MATRICES[mode] * 4 * n * n
        if need > 0.8 * free_bytes():
            return {"does_not_fit": f"W alone is {4 * n * n / 1e9:.1f} GB"}
    job = [sys.executable, __file__, "--cell", form, str(height), str(width), mode]
    job += ["--threads", str(threads), "--seconds", str(seconds)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(job, env=env, capture_output=True, text=True)
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1] if result.stderr.strip() else str(result.returncode)}
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on repeated calls of a cell")
    parser.add_argument("--cell", nargs=4, metavar=("FORM", "H", "W", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        form, height, width, mode = args.cell
        print(json.dumps(cell(form, int(height), int(width), mode, args.threads, args.seconds)))
        return

    from importlib.metadata import version

    about = {
        "hardware": hardware(),
        "threads": args.threads,
        "torch": version("torch"),
        "date": datetime.date.today().isoformat(),
    }
    print(f"{about['hardware']}; {args.threads} threads; torch {about['torch']}; {about['date']}")
    print(f"GAP over all positions, {CHANNELS} channels, batch 1, fp32; peak memory beyond the inputs\n")
    print(f"{'size':>9}  {'form':8}{'forward':>12}{'peak':>13}{'fwd + bwd':>14}{'peak':>13}")
    rows = []
    for height, width in SIZES:
        for form in FORMS:
            row: dict = {"height": height, "width": width, "form": form}
            line = f"{f'{height} x {width}':>9}  {form:8}"
            for mode in ("forward", "backward"):
                row[mode] = found = measure(form, height, width, mode, args.threads, args.seconds)
                if "ms" in found:
                    line += f"{found['ms']:>{12 if mode == 'forward' else 14},.1f}".rstrip() + " ms"
                    line += f"{found['peak_mib']:>{9},.1f} MiB"
                else:
                    line += "   " + (
                        f"does not fit: {found['does_not_fit']}" if "does_not_fit" in found else str(found)
                    )
            rows.append(row)
            print(line, flush=True)
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
