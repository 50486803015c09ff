"""What can be exported: every system in every format, what that does to its answers, its size and its time.

    python benchmarks/export.py --threads 1 --out export.json

A cell is one `enfilade.export.export`, with its own check: the largest difference from torch over five sizes and
batches, and the latency of one frame of the training size in turns with torch's, of which the ratio of medians is told.
With one thread that is the process's CPU time, which waiting for a busy core does not lengthen. 8 bits are compared
with torch on rendered rooms that their ranges were not taken from, and timed in turns with the 32-bit file; their ratio
to torch is the product of both. A cell that is refused or fails tells why, and the rest go on.

The models that ship have their trained weights. The other networks, of the recipes named in `SYSTEMS`, have random
ones, large where answers are made, so that these differ from place to place; 8 bits are not judged by them, for what
random weights answer nobody has learned. Their volumes are of `--grid` voxels in place of 240x144x240 (the sizes of
the check beside it are small in any case). `imenet-rooms` is timed at the whole size, and in 8 bits only with --long:
24 rooms of 8 million voxels are rendered, encoded and completed.

The cells of a system are made in one process and share its ONNX graph, the check of that and the rooms. With --out
every cell is kept as soon as it is done, and a run that was stopped goes on there.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from gap import hardware  # the script beside this one

FORMATS = {"onnx": "ONNX", "torch": "torch.export", "static": "ONNX int8, static", "dynamic": "ONNX int8, dynamic"}


class System(NamedTuple):
    shown: str
    source: str  # a shipped model, or the recipe whose network it is
    changes: dict[str, Any] | None = None  # of the recipe's arguments
    crf: bool = False


SYSTEMS = {
    "gad-joint-nyuv2": System("`gad-joint-nyuv2` (the default), no CRF", "gad-joint-nyuv2"),
    "gad-nyuv2": System("`gad-nyuv2`", "gad-nyuv2"),
    "lrn-camvid": System("`lrn-camvid`", "lrn-camvid"),
    "joint-nyuv2": System("`joint-nyuv2`, no CRF", "joint-nyuv2"),
    "joint-nyuv2-crf": System("`joint-nyuv2` with its CRF", "joint-nyuv2", crf=True),
    "imenet-rooms": System("`imenet-rooms`", "imenet-rooms"),
    "rsn": System("RSN end to end", "rsn-end-to-end", {}),
    "rsn-labels": System("RSN guided by labels", "rsn-semantic", {}),
    "rsn-support": System("RSN guided by region support", "rsn-end-to-end", {"generation": False}),
    "sscnet": System("SSCNet", "sscnet-rooms", {}),
    "sketch": System("sketch network", "sscnet-rooms", {"backbone": "sketch"}),
    "imenet-e": System("IMENet with DCP and DDA", "imenet-e", {}),
}
NOT_JUDGED = "random weights: what 8 bits change is not judged"
LONG = {("imenet-rooms", kind): "24 rooms of 240x144x240 take long: only with --long" for kind in ("static", "dynamic")}


# --- one system, in a process of its own ------------------------------------------------------------------------------


def loaded(system: System):
    """The shipped model; or the recipe's network with random weights that answer otherwise from place to place."""
    import torch
    from torch import nn

    from enfilade import checkpoint, recipes
    from enfilade.models.mutual_enhancement import ContextPyramid

    if system.changes is None:
        return checkpoint.load(system.source)
    recipe = recipes.get(system.source)
    torch.manual_seed(0)
    network = checkpoint.build(recipe.model, recipe.arguments | {"weights": None} | system.changes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_var.uniform_(0.5, 2)  # pyright: ignore
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.out_channels in (1, 12):
            gain = 0.1 if module.out_channels == 1 else 3.0  # factors of depth; logits
            nn.init.normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)
        if isinstance(module, ContextPyramid):
            for conv in module.offsets:
                nn.init.normal_(conv.weight, std=0.5)  # pyright: ignore
    meta = {"model": recipe.model, "space": recipe.space, "size": list(recipe.stages[0].size)}
    if recipe.focal is not None:
        meta["focal"] = recipe.focal
    return checkpoint.Loaded(network.eval(), meta)


def once(function: Callable) -> Callable:
    """The first answer to the same words and numbers, whatever else is given."""
    answers = {}

    def call(*given, **options):
        key = tuple(x for x in given if isinstance(x, str | int))
        if key not in answers:
            answers[key] = function(*given, **options)
        return answers[key]

    return call


def reason(error: Exception) -> str:
    """Why a cell failed, for a table."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"[:200].replace("|", "/")


def job(name: str, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """The cells of one system: what `export` reports, or why there is nothing to report."""
    import torch

    from enfilade import export, export_check, export_int8
    from enfilade.errors import UserError

    torch.set_num_threads(args.threads)
    system = SYSTEMS[name]
    if system.changes is not None:
        export_check.SHAPE = tuple(args.grid)
    if args.threads == 1:
        export_check.time = SimpleNamespace(perf_counter=time.process_time)  # pyright: ignore
    export.to_onnx, export_check.verify = once(export.to_onnx), once(export_check.verify)
    export_int8.frames = once(export_int8.frames)
    model = loaded(system)
    for format in args.formats:
        begun, work = time.perf_counter(), time.process_time()
        options: dict[str, Any] = {"int8": format} if format in export_int8.KINDS else {"format": format}
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = export.export(model, Path(folder) / "file", runs=args.runs, crf=system.crf, **options)
                found = {k: v for k, v in report.as_dict().items() if k != "file"}
            except UserError as error:
                found = {"refused": str(error).replace("|", "/")}
            except Exception as error:  # of torch, onnx, onnxruntime: no common type
                found = {"failed": reason(error)}
        found |= {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - work}
        yield format, found


# --- all systems ------------------------------------------------------------------------------------------------------


def run(name: str, formats: list[str], args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """`job` in a fresh process. A process that ends before its time fails the cell at which it was, and goes on."""
    while formats:
        command = [sys.executable, __file__, "--job", name, "--formats", *formats, "--threads", str(args.threads)]
        command += ["--runs", str(args.runs), "--grid", *map(str, args.grid)]
        own = {"OMP_NUM_THREADS": str(args.threads), "NUMBA_NUM_THREADS": str(args.threads)}
        with subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    told = json.loads(line)
                    formats = [format for format in formats if format != told["format"]]
                    yield told["format"], told["found"]
        if formats:
            yield formats[0], {"failed": f"its process ended with exit status {process.returncode}"}
            formats = formats[1:]


def without_a_run(name: str, format: str, long: bool) -> str | None:
    """Why a cell is not tried; None where it is."""
    if SYSTEMS[name].changes is not None and format in ("static", "dynamic"):
        return NOT_JUDGED
    return None if long else LONG.get((name, format))


def table(about: dict) -> list[str]:
    """The lines of a Markdown table of all cells, and of the reasons why some have no numbers."""
    formats = [format for format in FORMATS if any(format in cells for cells in about["cells"].values())]
    lines = [
        f"| system | frame | {' | '.join(FORMATS[format] for format in formats)} |",
        "|---" * (len(formats) + 2) + "|",
    ]
    reasons: list[str] = []
    for name, system in SYSTEMS.items():
        if cells := about["cells"].get(name):
            row = [cell_text(cells.get(format, {"skipped": "not asked for"}), reasons) for format in formats]
            lines.append(f"| {system.shown} | {frame_text(cells)} | {' | '.join(row)} |")
    return lines + [""] * bool(reasons) + [f"{i}. {text}" for i, text in enumerate(reasons, 1)]


def frame_text(cells: dict) -> str:
    """The sizes by which a system's latency was measured."""
    for cell in cells.values():
        if latency := cell.get("latency"):
            image = [f"{latency['width']}x{latency['height']}"] if "image" in cell["inputs"] else []
            return ", ".join(image + (["x".join(map(str, latency["grid"]))] if latency["grid"] else []))
    return "-"


def cell_text(cell: dict, reasons: list[str]) -> str:
    """A cell in words: what changes, size of the file, how many times faster than torch."""
    for kind, word in (("refused", "refused"), ("failed", "failed"), ("skipped", "not run")):
        if kind in cell:
            if cell[kind] not in reasons:
                reasons.append(cell[kind])
            return f"{word} ({reasons.index(cell[kind]) + 1})"
    ratio = cell["latency"]["torch"] / cell["latency"]["exported"]
    if judged := cell["int8"]:
        ratio *= judged["onnxruntime_fp32"] / judged["onnxruntime_int8"]
        shown = {"pixels": "labels", "voxels": "voxels", "depth": "depth"}
        changes = [f"{judged[key]:.1%} {word}" for key, word in shown.items() if judged[key] is not None]
    else:
        largest = {key: max(d["outputs"][key] for d in cell["differences"]) for key in cell["outputs"]}
        changes = []
        for metres, unit in ((False, ""), (True, " m")):
            if found := [x for key, x in largest.items() if key.startswith("depth") == metres]:
                changes.append(f"{max(found):.0e}{unit}" if any(found) else f"0{unit}")
        if beyond := max(d["beyond"] for d in cell["differences"]):
            changes.append(f"{100 * beyond:.1g}% beyond rounding")
    return f"{', '.join(changes)}; {cell['bytes'] / 1e6:.1f} MB; {ratio:.2f}x"


def write(about: dict, out: Path | None) -> None:
    if out is not None:
        temporary = out.with_name(out.name + ".part")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(temporary, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", "--json", type=Path, help="keep the cells there, and go on with those that it lacks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7, help="of whose times the medians are taken")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--grid", nargs=3, type=int, default=(120, 72, 120), metavar=("X", "Y", "Z"))
    parser.add_argument("--long", action="store_true", help="also the cells that take long")
    parser.add_argument("--job", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.grid) < 4 or any(side % 4 for side in args.grid):
        parser.error(f"the sides of --grid are whole multiples of 4, not {' '.join(map(str, args.grid))}")
    if args.job:
        for format, found in job(args.job, args):
            print(json.dumps({"format": format, "found": found}), flush=True)
        return

    clock = "CPU" if args.threads == 1 else "wall"
    settings = {"threads": args.threads, "clock": clock, "runs": args.runs, "grid": list(args.grid)}
    about: dict = {"hardware": hardware(), **settings, "packages": {}}
    about |= {"date": datetime.date.today().isoformat(), "load_before": os.getloadavg()[0], "cells": {}}
    for package in ("torch", "onnx", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            about["packages"][package] = metadata.version(package)
    if args.out and args.out.is_file():
        before = json.loads(args.out.read_text())
        if different := [key for key in ("hardware", *settings, "packages") if before.get(key) != about[key]]:
            sys.exit(f"{args.out} was made with other {' and '.join(different)}: give another --out")
        about = before
    for name in args.systems:
        cells = about["cells"].setdefault(name, {})
        waiting = []
        for format in args.formats:
            if why := without_a_run(name, format, args.long):
                cells.setdefault(format, {"skipped": why})
            elif not {"bytes", "refused"} & cells.get(format, {}).keys():
                waiting.append(format)
        for format, found in run(name, waiting, args):
            cells[format] = found
            said = next((found[key] for key in ("refused", "failed") if key in found), "exported")
            print(f"{name} {format}: {found.get('seconds', 0):.0f} s, {said}", file=sys.stderr, flush=True)
            write(about, args.out)
    write(about, args.out)

    print(f"{about['hardware']}; threads: {args.threads}", end="; ")
    print(", ".join(f"{package} {version}" for package, version in about["packages"].items()), end="; ")
    print(f"{about['date']}; load of the machine before: {about['load_before']:.1f}\n")
    print("32 bits: largest difference from torch, of probabilities and of depth in metres. 8 bits: what changes on")
    print("rendered rooms: share of labels or voxels, and depth (median of the relative change). Then the size of the")
    print(f"file, and how many times faster it is than torch ({about['clock']} time, medians of {about['runs']}).\n")
    print("\n".join(table(about)))


if __name__ == "__main__":
    main()
