"""The papers' tables (`tables`), trained and scored: our numbers beside the papers'.

A table is trained row by row into its own run folders; an interrupted table goes on where it stopped, and finished rows
are not trained again.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from enfilade import recipes, tables
from enfilade.errors import UserError, unknown
from enfilade.stages import Recipe
from enfilade.tables import Row, Table


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

    chosen = tables.get(table)
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
