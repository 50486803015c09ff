"""The papers' tables: which recipes make which rows, and the papers' numbers beside ours.

A paper's number and ours never share a column. A table is trained row by row into its own run folders; an
interrupted table goes on where it stopped, and finished rows are not trained again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from enfilade import recipes
from enfilade.errors import UserError, unknown
from enfilade.stages import Recipe

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


def reproduce(
    table: str,
    *,
    data: str = "nyuv2",
    root: str | None = None,
    out: str | Path,
    encoder_weights: str | None = None,
    epochs: int | None = None,
    rows: tuple[str, ...] = (),
    limit: int | None = None,
    seed: int = 0,
    workers: int = 1,
    quiet: bool = False,
    model: str | None = None,
    strips: int = 4,
) -> str:
    """Train and score the rows of a paper's table; returns it as Markdown and writes it to `out`/<table>.md and .json.

    Args:
        data, root: the reader and its folder; its train and val splits are used.
        encoder_weights: file of pretrained encoder weights, "timm", or None for random ones (said in the table).
        epochs: passes per stage instead of the recipe's own.
        rows: recipe names or labels; all by default. A row whose input the data lacks is left out, and said so.
        model: score this trained model in every row instead of training (the label maps of one model, LRN Table 4).
        strips: images in the picture of a table of label maps, or of an RSN's iterations (<table>.png).
        limit: use only the first so many samples of each split (said in the table).
    """
    from enfilade.checkpoint import resolve
    from enfilade.data import open_dataset
    from enfilade.evaluate import score
    from enfilade.images import write_atomic
    from enfilade.predict import load
    from enfilade.report import write_report
    from enfilade.train import finished, train

    chosen = get(table)
    wanted = [r for r in chosen.rows if not rows or r.recipe in rows or r.label in rows]
    for name in set(rows) - {r.recipe for r in chosen.rows} - {r.label for r in chosen.rows}:
        raise unknown(f"row of {table}", name, [r.recipe for r in chosen.rows])
    out = Path(out)

    def recipe_of(row: Row) -> Recipe:
        recipe = recipes.get(row.recipe, encoder_weights).replace(seed=seed)
        return recipe if epochs is None else recipe.with_stages(epochs=epochs)

    results: list[dict[str, Any]] = []
    # Rows that are not asked for now may have been trained before: others go on from their stages
    others = [(recipe_of(row), out / row.recipe) for row in chosen.rows if row not in wanted]
    trained = [(recipe, folder / "final.safetensors") for recipe, folder in others if finished(folder, recipe)]
    val_data: Any = None
    text = ""
    left_out: list[str] = []
    for row in wanted:
        recipe = recipe_of(row)
        if recipe.model == "peer" and find_spec("segmentation_models_pytorch") is None:
            left_out.append(f"{row.label}: needs segmentation_models_pytorch (pip install 'enfilade[peers]')")
            continue
        options = {"hha": True} if recipe.arguments.get("hha") else {}
        try:
            train_data = open_dataset(data, root, "train", **options)
            val_data = open_dataset(data, root, "val", **options)
        except (UserError, FileNotFoundError, TypeError) as error:
            if not options:
                raise
            left_out.append(f"{row.label}: {error}")
            continue
        if limit is not None:
            train_data, val_data = First(train_data, limit), First(val_data, limit)
        if not quiet:
            print(f"\n{row.label} ({row.recipe})", flush=True)
        folder = out / row.recipe
        run: dict[str, Any] = {}
        if model is None:
            init, passed = shared(recipe, trained)
            run = train(recipe, train_data, None, out=folder, init=init, passed=passed, workers=workers, quiet=quiet)
            weights = folder / "final.safetensors"
            trained.append((recipe, weights))
        else:
            weights = resolve(model)
        which = f"-s{row.stage}" if row.stage else "".join(f"-{name}" for name in row.given)
        which += f"-t{row.iterations}" if row.iterations else ""
        file = folder / f"report{which}.json"
        report = scored(file, weights, len(val_data))
        if report is None and recipe.volumes:
            from enfilade.checkpoint import load as load_model
            from enfilade.complete import score as score_completion

            loaded = load_model(weights)
            report = score_completion(loaded.network, loaded.meta, val_data, iterations=row.iterations, quiet=quiet)
            write_report(report, file)
        elif report is None:
            predictor = load(weights, flip=False, guidance="truth")
            if row.stage:
                predictor = at_stage(predictor, row.stage)
            report = score(predictor, val_data, given=row.given, quiet=quiet)
            write_report(report, file)
        ours = {where: value(report, where) for where in chosen.columns.values()}
        ours["rmse"] = report.get("depth", {}).get("rmse")
        results.append({"label": row.label, "recipe": row.recipe, "paper": row.paper, "ours": ours, "run": run})
        setting = ours_setting(recipe, encoder_weights, len(train_data), report["protocol"], limit, model)
        text = markdown(chosen, results, setting, left_out)
        write_atomic(out / f"{table}.md", text.encode())
        write_report({"table": table, "rows": results, "left_out": left_out}, out / f"{table}.json")
    if not results:
        raise UserError(f"no row of {table} could be run: " + "; ".join(left_out))
    with_crf = [w for r, w in trained if r.arguments.get("crf", "none") != "none"]
    if with_crf:
        from enfilade.checkpoint import load as load_model
        from enfilade.heat_maps import crf_pictures

        learned = crf_pictures(load_model(with_crf[-1]).network.crf, val_data.space.names, out / f"{table}.png")
        text += f"\nThe CRF of the last row that has one, as learned ({table}.png, Figure 4):\n\n{learned}"
        write_atomic(out / f"{table}.md", text.encode())
    if strips and any(row.stage for row in wanted):
        weights = resolve(model) if model is not None else out / wanted[0].recipe / "final.safetensors"
        stage_strips(load(weights, flip=False), val_data, out / f"{table}.png", strips)
    both = [w for r, w in trained if r.model == "rsn" and {"generation", "refinement"}.isdisjoint(r.arguments)]
    if strips and both:
        step_strips(load(both[-1], flip=False, guidance="truth"), val_data, out / f"{table}.png", strips)
    return text


def shared(recipe: Recipe, trained: Sequence[tuple[Recipe, Path]]) -> tuple[Path | None, int]:
    """The model among those trained that went through the most of the recipe's first stages, and how many: the recipe
    goes on from there. All else must be the same, but for parts that the earlier model lacks: they start as their
    constructor makes them."""
    best: tuple[Path | None, int] = None, 0
    for earlier, weights in trained:
        count = len(earlier.stages)
        alike = earlier.replace(name=recipe.name, arguments=recipe.arguments, stages=recipe.stages) == recipe
        parts = [(k, v) for k, v in earlier.arguments.items() if v is not False]
        if (
            alike
            and all(recipe.arguments.get(k) == v for k, v in parts)
            and best[1] < count < len(recipe.stages)
            and recipe.stages[:count] == earlier.stages
        ):
            best = weights, count
    return best


def value(report: dict[str, Any], where: str) -> float | None:
    """A score of a report: a key of its segmentation, "accuracy of CLASS", or "depth KEY"."""
    for part in ("depth", "completion"):
        if where.startswith(f"{part} "):
            return report.get(part, {}).get(where.removeprefix(f"{part} "))
    if "segmentation" not in report:
        return None
    if name := where.removeprefix("accuracy of ") * where.startswith("accuracy of "):
        return {row["name"]: row["accuracy"] for row in report["segmentation"]["per_class"]}.get(name)
    return report["segmentation"][where]


def at_stage(predictor, stage: int):
    """A predictor that answers with the `stage`-th label map of its network, up-sampled (LRN Section 5.5)."""
    from enfilade.models.label_refinement import Stage
    from enfilade.predict import Predictor

    return Predictor(
        Stage(predictor.network, stage - 1), predictor.meta, device=predictor.device, flip=predictor.augmentation.flip
    )


def stage_strips(predictor, reader, path: str | Path, count: int) -> None:
    """Write a picture of `count` images of a reader, evenly spread: photo, the label maps from the coarsest to the
    finest, and the truth (LRN Figure 5)."""
    from enfilade.images import write_png
    from enfilade.viz import strips

    stages = [at_stage(predictor, k) for k in range(1, 7)]
    rows = []
    for i in range(count):
        sample = reader[(2 * i + 1) * len(reader) // (2 * count)]
        answers = {f"s{k}": p.predict(sample.image).labels for k, p in enumerate(stages, 1)}
        rows.append((sample.image, answers | {"truth": sample.labels}))
    write_png(Path(path), strips(rows, reader.space))


def step_strips(predictor, reader, path: str | Path, count: int) -> None:
    """Write a picture of `count` images of a reader, evenly spread: photo, true region support, the generated one, the
    refinement's depths, and the truth (RSN Figure 3)."""
    from enfilade.evaluate import true_map
    from enfilade.images import write_png
    from enfilade.models.region_support import Step
    from enfilade.predict import Predictor
    from enfilade.viz import depth_strips

    network = predictor.network
    titles = ["generated", *(f"iteration {k}" for k in range(1, network.iterations + 1))]
    steps = {t: Predictor(Step(network, k), predictor.meta, flip=False) for k, t in enumerate(titles)}
    rows = []
    for i in range(count):
        sample = reader[(2 * i + 1) * len(reader) // (2 * count)]
        given = {name: true_map(sample, name) for name in network.uses}
        answers = {t: p.predict(sample.image, camera=sample.camera, **given).depth for t, p in steps.items()}
        rows.append((sample.image, {"region support": true_map(sample, "support"), **answers, "truth": sample.depth}))
    write_png(Path(path), depth_strips(rows))


def scored(file: Path, weights: Path, frames: int) -> dict[str, Any] | None:
    """The report of a finished row, if it is newer than the weights and covers as many frames."""
    if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
        return None
    saved = json.loads(file.read_text())
    return saved if saved["protocol"]["frames"] == frames else None


class First:
    """The first `count` samples of a reader."""

    def __init__(self, reader, count: int):
        self.reader, self.count = reader, min(count, len(reader))
        self.names = reader.names[: self.count]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.reader[index]

    def __getattr__(self, name: str):
        return getattr(self.reader, name)


def ours_setting(recipe, encoder_weights, count: int, protocol: dict[str, Any], limit, model) -> str:
    """What was run, in two sentences."""
    stages = ", then ".join(f"{s.epochs} epochs of batch {s.batch} at {s.size[1]}x{s.size[0]}" for s in recipe.stages)
    how = f"trained already ({model})"
    if model is None:
        weights = "random encoder weights" if encoder_weights is None else "ImageNet encoder weights"
        encoder = recipe.arguments.get("encoder", "no encoder")
        how = f"{encoder} ({weights}), {count} training images, {stages}, seed {recipe.seed}"
    part = f" Not all of the data: only the first {limit} samples of each split." if limit else ""
    if "convention" in protocol:
        return (
            f"Ours: {how}; {protocol['frames']} frames of {protocol['data']}, voxels scored by the convention of "
            f"{protocol['convention']}.{part}"
        )
    return (
        f"Ours: {how}; {protocol['frames']} images of {protocol['data']}, {protocol['classes_scored']} classes,"
        f" crop {protocol['crop']}, no flip.{part}"
    )


def markdown(table: Table, results: list[dict[str, Any]], setting: str, left_out: list[str]) -> str:
    """Paper columns | our columns, and under them what was run."""

    def told(number: float | None) -> str:
        return "-" if number is None or number != number else f"{number:{digits}}"

    names = list(table.columns)
    papers = [dict(zip(names, r["paper"])) for r in results]
    depths = all(where.startswith("depth ") for where in table.columns.values())
    digits, scale = (".3f", 1) if depths else (".1f", 100)
    ours = []
    for r in results:
        scores = {name: r["ours"][where] for name, where in table.columns.items()}
        ours.append({name: None if score is None else scale * score for name, score in scores.items()})
    if table.across:
        known = [(r, paper) for r, paper in zip(results, papers) if paper]
        heads = ["", *(f"paper {r['label']}" for r, _ in known), *(f"ours {r['label']}" for r in results)]
        body = [
            [name, *(told(paper.get(name)) for _, paper in known), *(told(o[name]) for o in ours)] for name in names
        ]
    else:
        heads = ["row", *(f"paper {n}" for n in names), *(f"ours {n}" for n in names)]
        heads += ["ours depth RMSE (m)"] * table.depth
        body = []
        for r, paper, own in zip(results, papers, ours):
            cells = [r["label"], *(told(paper.get(n)) for n in names), *(told(own[n]) for n in names)]
            rmse = r["ours"]["rmse"]
            body.append(cells + ["-" if rmse is None else f"{rmse:.3f}"] * table.depth)
    lines = [f"### {table.title}", "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *body))]
    lines += ["", f"Paper: {table.paper} {setting}", *(f"Left out: {text}" for text in left_out)]
    return "\n".join(lines) + "\n"
