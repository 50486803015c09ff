"""The papers' tables as data: which recipe makes which row, and what the paper reports for it.

A paper's number and ours never share a column.
"""

from dataclasses import dataclass

from enfilade.errors import unknown

SCORES = {"PixAcc": "pixel_accuracy", "mAcc": "mean_accuracy", "mIoU": "miou"}
CAMVID_CLASSES = (  # in the order of LRN's Table 2
    *("building", "tree", "sky", "car", "sign", "road", "pedestrian", "fence", "pole", "pavement", "cyclist"),
)


@dataclass(frozen=True)
class Row:
    """A table's row: its label there, the recipe that makes it, and what the paper reports (percent), or nothing where
    the row is ours alone. `stage` counts the label maps of one model (LRN Table 4), the coarsest first. `given` is what
    the model is told of each frame when it is scored (RSN Table 3); `iterations` those of an IMENet (Figure 9)."""

    label: str
    recipe: str
    paper: tuple[float, ...] = ()
    stage: int | None = None
    given: tuple[str, ...] = ()
    iterations: int | None = None


@dataclass(frozen=True)
class Table:
    """A paper's table.

    `columns` are headings and where their score stands in a report: a key of its segmentation, "accuracy of CLASS",
    "depth KEY" or "completion KEY". `across` puts the scores below each other and the rows side by side, which many
    columns need. `depth` adds the RMSE. Scores are in percent, but for those of depth.
    """

    title: str
    paper: str  # the paper's setting, in a sentence
    rows: tuple[Row, ...]
    columns: dict[str, str]
    depth: bool = False
    across: bool = False


_GAD = "ResNet-50, 795 training and 654 test frames, 40 classes, 8 GPUs."
_JOINT = "five branches from VGG-16, 795 training (6 pictures of each) and 654 test frames, 40 classes, 180000 updates."
_RSN = "ResNet-34, 3264 training and 483 test frames of NYUv1 and v2, Table 1's layers at full resolution."
_IMENET = "ResNet-101 and SSCNet on NYUCAD, 795 training and 654 test frames."
_LRN = "VGG-16, 367 training and 233 test images of 480x360, about 80000 updates of batch 10."

TABLES: dict[str, Table] = {
    "gad-table4": Table(
        "GAD Table 4, the ablation on NYUv2",
        _GAD,
        (
            Row("sem-only", "gad-sem-only", (64.7, 44.1, 36.0)),
            Row("sem+Ls", "gad-Ls", (70.4, 50.3, 40.6)),
            Row("sem+Ls+HHA", "gad-Ls-hha", (72.0, 53.2, 42.4)),
            Row("sem+Ls+DepEm", "gad-depem", (75.6, 57.5, 44.7)),
            Row("sem+Ls+DepEm+FeatProp", "gad-featprop", (77.9, 60.0, 45.4)),
            Row("sem+Ls+DepEm+FeatProp+VanConv", "gad-vanconv", (81.6, 64.9, 55.1)),
            Row("sem+Ls+DepEm+FeatProp+GAP", "gad-gap", (83.4, 65.6, 56.0)),
            Row("sem+Ls+DepEm+FeatProp+GAP+SPF", "gad-spf", (84.8, 68.7, 59.6)),
        ),
        SCORES,
        depth=True,
    ),
    "gad-table5": Table(
        "GAD Table 5, depth supervision for a share of the training samples",
        _GAD,
        (
            Row("0 %", "gad-depth-0", (70.4, 50.3, 40.6)),
            Row("20 %", "gad-depth-20", (71.2, 51.0, 41.1)),
            Row("40 %", "gad-depth-40", (77.2, 58.3, 45.6)),
            Row("60 %", "gad-depth-60", (80.0, 68.2, 51.6)),
            Row("80 %", "gad-depth-80", (83.1, 70.3, 55.2)),
            Row("100 %", "gad-depth-100", (84.8, 68.7, 59.6)),
        ),
        SCORES,
        depth=True,
    ),
    "joint-table2": Table(
        "Mousavian et al. Table 2, depth on NYUv2",
        _JOINT,
        (Row("Sem-CRF+", "joint-crf-depth", (0.568, 0.856, 0.956, 0.2, 0.301, 0.816, 0.314, 0.061)),),
        {
            **{f"δ < 1.25{power}": f"depth delta{k}" for k, power in enumerate(("", "²", "³"), 1)},
            "abs rel": "depth abs_rel",
            "sqr rel": "depth sq_rel",
            "RMSE (m)": "depth rmse",
            "RMSE log": "depth rmse_log",
            "log scale-invariant": "depth log_si",
        },
        across=True,
    ),
    "joint-table3": Table(
        "Mousavian et al. Table 3, labels on NYUv2",
        _JOINT,
        (
            Row("Unary-Sem", "joint-sem", (36.0, 49.1, 66.0)),
            Row("Unary-Sem+Depth", "joint-sem-depth", (36.5, 49.2, 66.6)),
            Row("Sem-CRF", "joint-crf", (38.4, 51.2, 68.0)),
            Row("Sem-CRF+", "joint-crf-depth", (39.2, 52.3, 68.6)),
        ),
        {"mIoU": "miou", "mAcc": "mean_accuracy", "PixAcc": "pixel_accuracy"},
        depth=True,
    ),
    "rsn-table3": Table(
        "RSN Tables 2 and 3, depth on NYUv2",
        _RSN,
        (
            Row(
                "Baseline1: generation, for region support",
                "rsn-generation",
                (0.2334, 0.2852, 0.7737, 0.6111, 0.8769, 0.9648),
            ),
            Row("Generation, for depth", "rsn-depth", (0.2350, 0.2639, 0.7367, 0.6517, 0.8932, 0.9715)),
            Row("with linear loss", "rsn-linear", (0.2572, 0.2855, 0.7805, 0.6114, 0.8456, 0.9650)),
            Row("with L2 loss", "rsn-l2", (0.2503, 0.2784, 0.7681, 0.6217, 0.8682, 0.9663)),
            Row(
                "Baseline2: true region support as depth", "rsn-support", (0.5063, 0.4763, 1.29, 0.615, 0.9016, 0.9742)
            ),
            Row(
                "Baseline3: both modules as trained apart",
                "rsn-initialised",
                (0.2922, 0.3472, 0.8673, 0.4648, 0.7935, 0.9372),
            ),
            Row(
                "Refinement, true region support",
                "rsn-initialised",
                (0.0851, 0.1057, 0.2917, 0.9528, 0.9938, 0.9988),
                given=("support",),
            ),
            Row("Refinement, coarse depth as guidance", "rsn-coarse", (0.3471, 0.3764, 1.056, 0.4497, 0.7643, 0.9191)),
            Row("Refinement, labels as guidance", "rsn-semantic", (0.3345, 0.3235, 0.9806, 0.4847, 0.8005, 0.9345)),
            Row("Freeze refinement", "rsn-freeze-refinement", (0.2563, 0.2852, 0.7737, 0.6111, 0.8769, 0.9648)),
            Row("Freeze generation", "rsn-freeze-generation", (0.2692, 0.2993, 0.7922, 0.5725, 0.8596, 0.9601)),
            Row("End to end", "rsn-end-to-end", (0.196, 0.172, 0.681, 0.792, 0.961, 0.987)),
        ),
        {
            "rel": "depth abs_rel",
            "RMSE-log": "depth rmse_log",
            "RMSE (m)": "depth rmse",
            **{f"δ{k}": f"depth delta{k}" for k in (1, 2, 3)},
        },
    ),
    "imenet-table3": Table(
        "IMENet Table 3, the ablation; below it the baseline of Table 1 and the upper bounds",
        _IMENET,
        (
            Row("A", "imenet-a", (46.8, 40.3, 72.3)),
            Row("B: +IL", "imenet-b", (48.1, 42.5, 74.3)),
            Row("C: +IL +DCP", "imenet-c", (62.2, 42.8, 75.5)),
            Row("D: +IL +DDA", "imenet-d", (47.4, 44.8, 77.7)),
            Row("E: +IL +DCP +DDA", "imenet-e", (65.6, 47.5, 79.1)),
            Row("SSCNet (Table 1)", "imenet-sscnet", (float("nan"), 40.0, 73.2)),
            Row("IMENet-2DGT (Table 2, NYU)", "imenet-2dgt", (float("nan"), 52.0, 74.3)),
            Row("IMENet-3DGT (Table 4, NYU)", "imenet-3dgt", (80.3, float("nan"), float("nan"))),
        ),
        {"SS mIoU": "miou", "SSC mIoU": "completion ssc_miou", "SC IoU": "completion sc_iou"},
    ),
    "imenet-fig9": Table(
        "IMENet Figure 9, the score against the iterations T, of one model trained with T = 1",
        _IMENET + " The figure has curves and no numbers: rising to 3 and 4, then falling.",
        tuple(Row(f"T = {t}", "imenet-e", iterations=t) for t in range(1, 7)),
        {"SS mIoU": "miou", "SSC mIoU": "completion ssc_miou", "SC IoU": "completion sc_iou"},
    ),
    "lrn-table2": Table(
        "LRN Table 2, accuracy of each class on CamVid",
        _LRN,
        (
            Row(
                "SegNet",
                "segnet-camvid",
                (88.0, 87.3, 92.3, 80.0, 29.5, 97.6, 57.2, 49.4, 27.8, 84.8, 30.7, 65.9, 50.2),
            ),
            Row(
                "SegNet+DS",
                "segnet-ds-camvid",
                (87.0, 85.1, 77.1, 79.8, 56.3, 94.8, 71.1, 50.5, 39.7, 88.6, 50.6, 70.1, 53.7),
            ),
            Row(
                "LRN",
                "lrn-camvid-plain",
                (89.8, 88.1, 78.5, 86.3, 61.2, 96.8, 82.1, 59.0, 45.4, 92.6, 69.7, 77.2, 61.7),
            ),
            Row("LRN, majority", "lrn-camvid-majority"),
            Row("FCN-8s", "fcn8s-camvid"),
            Row("U-Net (peer)", "unet-camvid"),
        ),
        {
            **{name: f"accuracy of {name}" for name in CAMVID_CLASSES},
            "class average": "mean_accuracy",
            "mIoU": "miou",
            "pixel accuracy": "pixel_accuracy",
        },
        across=True,
    ),
    "lrn-table4": Table(
        "LRN Table 4 (b), the label maps of one model on CamVid",
        _LRN,
        tuple(
            Row(f"s{k}", "lrn-camvid", (miou,), stage=k)
            for k, miou in enumerate((50.9, 55.5, 59.1, 60.9, 61.4, 61.7), 1)
        ),
        {"mIoU": "miou"},
    ),
}


def get(name: str) -> Table:
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]
