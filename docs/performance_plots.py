"""The plots of the performance page, from what the benchmarks wrote: docs/benchmarks/*.json to docs/images.

python benchmarks/inference.py --threads 1 --runs 9 --json docs/benchmarks/inference.json
python docs/performance_plots.py

Each plot says hardware and date as its file has them. The same files give the same picture, to the byte with the same
matplotlib.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
STYLE: dict[str, Any] = {
    "svg.hashsalt": "enfilade",
    "svg.fonttype": "none",  # text stays text: small, and searched by browsers
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#59626d",
    "axes.grid": True,
    "grid.color": "#dfe2e6",
    "axes.axisbelow": True,
    "figure.facecolor": "#fcfcfa",  # a ground of its own, also on a dark page
    "axes.facecolor": "#fcfcfa",
}
# Okabe and Ito's, which the colour-blind tell apart
COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#999999", "#444444")
NAMES = {
    "lrn-camvid": "LRN",
    "segnet-camvid": "SegNet",
    "gad-nyuv2": "GAD",
    "fpn-peer": "FPN (smp)",
    "unet-camvid": "U-Net (smp)",
}
MODES = {
    "eager": "eager",
    "channels-last": "channels last",
    "bf16": "bf16",
    "compile": "compiled",
    "compile-bf16": "compiled bf16",
    "onnx": "ONNX Runtime",
}


def inference(found: dict[str, Any]) -> plt.Figure:
    """Milliseconds of each network in each mode, and the least that its arithmetic takes."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    size = found["480x360"]
    gflop = {model["model"]: model["gflop"] for model in size["models"]}
    for k, (model, name) in enumerate(NAMES.items()):
        rows = {row["mode"]: row["ms"] for row in size["rows"] if row["model"] == model}
        places = [m + 0.16 * (k - 2) for m in range(len(MODES))]
        axes.bar(places, [rows[mode] for mode in MODES], 0.15, color=COLOURS[k], label=name)
        rate = size["matmul_gflop_per_s"]
        floors = [1000 * gflop[model] / rate["bf16" if "bf16" in mode else "fp32"] for mode in MODES]
        axes.scatter(places, floors, marker="_", s=40, color="#c00000", zorder=3, label="floor" if k == 4 else None)
    axes.set_xticks(range(len(MODES)), list(MODES.values()))
    axes.set_ylabel("ms, one image of 480x360")
    axes.grid(visible=False, axis="x")
    axes.legend(ncols=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.13), columnspacing=1.2)
    return sign(figure, found, f"{found['threads']} thread")


def crf(found: dict[str, Any]) -> plt.Figure:
    """The dense CRF beside the same work in torch operations, for both pairs of widths."""
    figure, both = plt.subplots(1, 2, figsize=(8, 2.6), sharex=True, sharey=True)
    rows = {
        "ours, 10 iterations": "fused",
        "lattice in torch": "peer: lattice in torch",
        "11x11 window in torch": "peer: window in torch",
        "ours, 5 forward and backward": "train",
        "the same, lattice in torch": "peer: lattice in torch, train",
    }
    for axes, theta in zip(both, found["threads_2"]["thetas"]):
        values = [theta["rows"][key]["ms"] for key in rows.values()]
        for place, (name, value) in enumerate(zip(rows, values)):
            axes.plot(value, place, "o", color=COLOURS[0] if "ours" in name else COLOURS[4])
            axes.annotate(f"{value:,.0f}", (value, place), (7, -3), textcoords="offset points", size=9)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xscale("log")
        axes.set_xlim(100, 500_000)
        xy, rgb = theta["theta"]
        axes.set_title(f"{xy:g} pixels, {rgb:g} levels", size=10)
        axes.set_xlabel("ms")
    both[0].set_ylim(-0.6, len(rows) - 0.4)
    both[0].invert_yaxis()
    return sign(figure, found, "2 threads, 640x480, 40 classes")


def sign(figure: plt.Figure, found: dict[str, Any], more: str) -> plt.Figure:
    figure.text(0.995, 0.01, f"{found['hardware']}; {more}; {found['date']}", size=8, color="#59626d", ha="right")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


PLOTS = {"inference": inference, "crf": crf}


def main(*names: str) -> None:
    plt.rcParams.update(STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
    for name in names or PLOTS:
        source = FOLDER / "benchmarks" / f"{name}.json"
        figure = PLOTS[name](json.loads(source.read_text()))
        figure.savefig(FOLDER / "images" / f"performance-{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
