"""One image through our networks and through U-Net and FPN of segmentation_models_pytorch, all with MobileNetV2.

    python benchmarks/inference.py --threads 1 --out inference.json

Latency, peak memory and arithmetic of one forward pass, from RGB to logits, with random weights (which change neither).
ONNX Runtime gets the graph of `enfilade.export` without its last step, the softmax. Before a cell is timed, its logits
are compared with those of eager fp32.

Latency: all cells of one size live in one process. Each round calls every cell twice, in a new order, and times the
second call, so that what else the machine does meets all cells alike. Memory: each cell in a fresh process; the
resident set at its worst during one call, beyond what the loaded (and compiled) network takes. Where the system keeps
no peak that can be reset (VmHWM of Linux), it is ru_maxrss beyond its own value before, a lower bound.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from gap import hardware, peak_of  # the script beside this one

WARM_UP = 2
MATRIX = 1024  # the floor's rate is that of a product of two such matrices
TOLERANCE = 1e-3  # of the logits' norm, fp32 modes; random weights let bf16 drift by tenths
PEER = "unet-camvid"
MODELS = {
    "lrn-camvid": "LRN",
    "lrn-camvid-plain": "LRN, the paper's widths",
    "segnet-camvid": "SegNet",
    "gad-nyuv2": "GAD",
    "fpn-peer": "FPN (smp)",
    PEER: "U-Net (smp)",
}
MODES = {
    "eager": "eager fp32",
    "channels-last": "eager fp32, channels-last",
    "bf16": "eager bf16, channels-last",
    "compile": "torch.compile fp32, channels-last",
    "compile-bf16": "torch.compile bf16, channels-last",
    "onnx": "ONNX Runtime fp32",
}


def network_of(name: str):
    import torch

    from enfilade import checkpoint, recipes

    recipe = recipes.get(name)
    torch.manual_seed(0)
    return checkpoint.build(recipe.model, recipe.arguments | {"weights": None}).eval()


def image_of(width: int, height: int, mode: str):
    """Noise in [0, 1] as the mode wants it: a numpy array, or a tensor of either layout."""
    import torch

    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    if mode == "onnx":
        return image.numpy()
    return image if mode == "eager" else image.contiguous(memory_format=torch.channels_last)


def write_onnx(name: str, file: Path) -> None:
    """The exported graph, cut before the softmax: logits, as in the other modes."""
    from enfilade import export, recipes
    from enfilade.predict import Predictor

    meta = {"space": recipes.get(name).space}
    proto = export.to_onnx(Predictor(network_of(name), meta, device="cpu", flip=False, precision="fp32"), opset=20)
    (last,) = (node for node in proto.graph.node if "probabilities" in node.output)
    if last.op_type != "Softmax":
        raise RuntimeError(f"the exported graph ends in {last.op_type}, not in Softmax")
    proto.graph.output[0].name = last.input[0]
    proto.graph.node.remove(last)
    file.write_bytes(proto.SerializeToString())


def load(name: str, mode: str, threads: int, folder: Path) -> Callable:
    """A function from an image to its logits. What is compiled is compiled at the first call."""
    import torch

    if mode == "onnx":
        import onnxruntime

        if not (file := folder / f"{name}.onnx").exists():
            write_onnx(name, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else it slows the next cell
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {"image": image})[0]
    network = network_of(name)
    if mode != "eager":
        network = network.to(memory_format=torch.channels_last)
    if mode.startswith("compile"):
        network = torch.compile(network, dynamic=False, fullgraph=True)  # no part falls back to eager unseen

    def call(image):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mode.endswith("bf16")):
            return network(image).logits

    return call


def reason(error: Exception) -> str:
    """Why a cell could not be run, for a table. torch wraps the compiler's errors in its own."""
    lines = str(getattr(error, "inner_exception", error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:150].replace("|", "/")


def latency(args: argparse.Namespace, width: int, height: int) -> dict:
    """Milliseconds of all cells at one size."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(args.threads)
    models, rows, cells = [], [], {}
    for name in args.models:
        network = network_of(name)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            truth = network(image_of(width, height, "eager")).logits.numpy()
        models.append({"model": name, "classes": truth.shape[1], "logits": truth.shape[:1:-1]})
        models[-1]["parameters"] = sum(p.numel() for p in network.parameters())
        models[-1]["gflop"] = counter.get_total_flops() / 1e9
        for mode in args.modes:
            print(f"{width}x{height} {name} {mode}", file=sys.stderr, flush=True)
            rows.append({"model": name, "mode": mode})
            begun = time.perf_counter()
            try:
                call, image = load(name, mode, args.threads, args.folder), image_of(width, height, mode)
                for _ in range(WARM_UP):
                    found = call(image)
                found = np.asarray(found if mode == "onnx" else found.float())
                rows[-1]["difference"] = difference = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
                if not difference < TOLERANCE and not mode.endswith("bf16"):
                    raise RuntimeError(f"its logits differ from those of eager fp32 by {difference:.1g}")
            except Exception as error:  # of torch, of its compiler, of ONNX Runtime: no common type
                rows[-1]["failed"] = reason(error)
                continue
            rows[-1]["ready_s"] = time.perf_counter() - begun
            cells[name, mode] = lambda call=call, image=image: call(image)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.rand(MATRIX, MATRIX).to(dtype)
        cells["matmul", precision] = lambda matrix=matrix: matrix @ matrix

    walls, works = {key: [] for key in cells}, {key: [] for key in cells}
    order, shuffler = list(cells), random.Random(0)
    for _ in range(args.runs):
        shuffler.shuffle(order)
        for key in order:
            cells[key]()
            begun, work = time.perf_counter(), time.process_time()
            cells[key]()
            works[key].append(1e3 * (time.process_time() - work))
            walls[key].append(1e3 * (time.perf_counter() - begun))
    for row in rows:
        if times := walls.get(key := (row["model"], row["mode"])):
            row |= {"ms": statistics.median(times), "min_ms": min(times), "all_ms": times}
            row["cpu_ms"] = statistics.median(works[key])
    gflop = {model["model"]: model["gflop"] for model in models}
    peer = {row["mode"]: row["ms"] for row in rows if row["model"] == PEER and "ms" in row}
    for row in rows:
        if ms := row.get("ms"):
            base, same = peer.get("channels-last"), peer.get(row["mode"])
            row |= {"ratio": base and base / ms, "ratio_same_mode": same and same / ms}
            row["gflop_per_s"] = 1e3 * gflop[row["model"]] / ms
    rates = {p: 2e-6 * MATRIX**3 / min(walls["matmul", p]) for p in ("fp32", "bf16")}
    return {"models": models, "rows": rows, "matmul_gflop_per_s": rates}


def memory(args: argparse.Namespace, width: int, height: int) -> dict:
    """Peak of one call of the only cell that `args` names. A small image comes first, for thread pools and kernels;
    for compiled code, which is of one size, the image itself."""
    import torch

    torch.set_num_threads(args.threads)
    (name,), (mode,) = args.models, args.modes
    call, image = load(name, mode, args.threads, args.folder), image_of(width, height, mode)
    call(image if mode.startswith("compile") else image_of(96, 64, mode))
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc keeps freed pages, which would hide the next call's
        ctypes.CDLL(None).malloc_trim(0)
    return {"peak_mib": peak_of(lambda: call(image)) / 2**20}


def in_process(job: str, args: argparse.Namespace, size: str, models: list[str], modes: list[str]) -> dict:
    """`latency` or `memory` in a fresh process, or why it failed."""
    command = [sys.executable, __file__, "--job", job, "--folder", str(args.folder), "--sizes", size]
    command += ["--models", *models, "--modes", *modes, "--threads", str(args.threads), "--runs", str(args.runs)]
    own = {"OMP_NUM_THREADS": str(args.threads), "TORCHINDUCTOR_CACHE_DIR": str(args.folder / "inductor")}
    quiet = subprocess.PIPE if job == "memory" else None
    result = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=quiet, text=True)
    if result.returncode:
        return {"failed": ((result.stderr or "").strip().splitlines() or [f"exit status {result.returncode}"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def show(size: str, found: dict) -> None:
    rates = found["matmul_gflop_per_s"]
    told = f"{rates['fp32']:.0f} GFLOP/s in fp32 and {rates['bf16']:.0f} in bf16"
    print(f"## {size}\n\nFloor: the arithmetic at the rate of a {MATRIX}x{MATRIX} matrix product, {told}.\n")
    print("| model | recipe | classes | logits | parameters | GFLOP | floor fp32, ms | floor bf16, ms |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for m in found["models"]:
        floors = " | ".join(f"{1e3 * m['gflop'] / rates[p]:.1f}" for p in ("fp32", "bf16"))
        print(f"| {MODELS[m['model']]} | `{m['model']}` | {m['classes']} | {m['logits'][0]}x{m['logits'][1]} ", end="")
        print(f"| {m['parameters'] / 1e6:.2f} M | {m['gflop']:.2f} | {floors} |")
    print("\n| model | mode | ms | min | CPU ms | U-Net channels-last / this | U-Net same mode / this ", end="")
    print("| GFLOP/s | peak MiB |\n|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in found["rows"]:
        head = f"| {MODELS[row['model']]} | {MODES[row['mode']]} "
        if "failed" in row:
            print(head + f"| not run: {row['failed']} | | | | | | |")
            continue
        times = " | ".join(f"{row[k]:.1f}" for k in ("ms", "min_ms", "cpu_ms"))
        ratios = " | ".join(f"{row[k]:.2f}" if row[k] else "-" for k in ("ratio", "ratio_same_mode"))
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else row["peak_failed"]
        print(head + f"| {times} | {ratios} | {row['gflop_per_s']:.1f} | {peak} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", "--json", type=Path, help="also write the tables there, with each run's time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15, help="rounds, of whose times the median and the least are told")
    parser.add_argument("--sizes", nargs="+", default=["480x360", "640x480"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--job", choices=("latency", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        width, height = map(int, args.sizes[0].split("x"))
        print(json.dumps({"latency": latency, "memory": memory}[args.job](args, width, height)))
        return

    if wrong := [size for size in args.sizes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size)]:
        parser.error(f"a size is WIDTHxHEIGHT, such as 480x360, not {wrong[0]}")
    about: dict = {"hardware": hardware(), "threads": args.threads, "runs": args.runs, "packages": {}}
    about |= {"date": datetime.date.today().isoformat(), "load_before": os.getloadavg()[0]}
    for package in ("torch", "onnxruntime", "segmentation_models_pytorch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            about["packages"][package] = metadata.version(package)
    print(f"{about['hardware']}; threads: {args.threads}", end="; ")
    print(", ".join(f"{package} {version}" for package, version in about["packages"].items()), end="; ")
    print(f"{about['date']}; load of the machine before: {about['load_before']:.1f}\n")
    print(f"One image, median and least of {args.runs} runs. A multiplication and an addition count as two FLOP.")
    print("CPU ms: of all threads, which waiting for a busy core does not lengthen. Ratios are of medians.\n")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for size in args.sizes:
            about[size] = found = in_process("latency", args, size, args.models, args.modes)
            if "failed" in found:
                sys.exit(f"timing {size} failed: {found['failed']}")
            for row in found["rows"]:
                if "failed" not in row:
                    taken = in_process("memory", args, size, [row["model"]], [row["mode"]])
                    row |= {"peak_failed" if k == "failed" else k: v for k, v in taken.items()}
            show(size, found)
    if args.out:
        temporary = args.out.with_name(args.out.name + ".part")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
