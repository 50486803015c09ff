"""The papers' tables: which recipes make which rows, and the papers' numbers beside ours.

A paper's number and ours never share a column. A table is trained row by row into its own run folders; an
interrupted table goes on where it stopped, and finished rows are not trained again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enfilade import recipes
from enfilade.errors import UserError, unknown

SCORES = ("pixel_accuracy", "mean_accuracy", "miou")


@dataclass(frozen=True)
class Row:
    """A table's row: its label there, the recipe that makes it, and what the paper reports (percent)."""

    label: str
    recipe: str
    paper: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]


TABLES: dict[str, Table] = {
    "gad-table4": Table(
        "GAD Table 4, the ablation on NYUv2",
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
    ),
    "gad-table5": Table(
        "GAD Table 5, depth supervision for a share of the training samples",
        (
            Row("0 %", "gad-depth-0", (70.4, 50.3, 40.6)),
            Row("20 %", "gad-depth-20", (71.2, 51.0, 41.1)),
            Row("40 %", "gad-depth-40", (77.2, 58.3, 45.6)),
            Row("60 %", "gad-depth-60", (80.0, 68.2, 51.6)),
            Row("80 %", "gad-depth-80", (83.1, 70.3, 55.2)),
            Row("100 %", "gad-depth-100", (84.8, 68.7, 59.6)),
        ),
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
) -> str:
    """Train and score the rows of a paper's table; returns it as Markdown and writes it to `out`/<table>.md and .json.

    Args:
        data, root: the reader and its folder; its train and val splits are used.
        encoder_weights: file of pretrained encoder weights, "timm", or None for random ones (said in the table).
        epochs: passes per stage instead of the recipe's own.
        rows: recipe names or labels; all by default. A row whose input the data lacks is left out, and said so.
        limit: use only the first so many training samples (a smoke run; said in the table).
    """
    from enfilade.data import open_dataset
    from enfilade.evaluate import score
    from enfilade.images import write_atomic
    from enfilade.predict import load
    from enfilade.report import write_report
    from enfilade.train import train

    chosen = get(table)
    wanted = [r for r in chosen.rows if not rows or r.recipe in rows or r.label in rows]
    for name in set(rows) - {r.recipe for r in chosen.rows} - {r.label for r in chosen.rows}:
        raise unknown(f"row of {table}", name, [r.recipe for r in chosen.rows])
    out = Path(out)
    results: list[dict[str, Any]] = []
    text = ""
    left_out: list[str] = []
    for row in wanted:
        recipe = recipes.get(row.recipe, encoder_weights).replace(seed=seed)
        if epochs is not None:
            recipe = recipe.with_stages(epochs=epochs)
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
        run = train(recipe, train_data, None, out=folder, workers=workers, quiet=quiet)
        report = scored(folder, len(val_data))
        if report is None:
            report = score(load(folder / "final.safetensors", flip=False), val_data, quiet=quiet)
            write_report(report, folder / "report.json")
        ours = {k: report["segmentation"][k] for k in SCORES} | {"rmse": report.get("depth", {}).get("rmse")}
        results.append({"label": row.label, "recipe": row.recipe, "paper": row.paper, "ours": ours, "run": run})
        text = markdown(chosen, results, recipe, encoder_weights, len(train_data), report["protocol"], limit, left_out)
        write_atomic(out / f"{table}.md", text.encode())
        write_report({"table": table, "rows": results, "left_out": left_out}, out / f"{table}.json")
    if not results:
        raise UserError(f"no row of {table} could be run: " + "; ".join(left_out))
    return text


def scored(folder: Path, frames: int) -> dict[str, Any] | None:
    """The report of a finished row, if it is newer than the weights and covers as many frames."""
    report = folder / "report.json"
    if not report.is_file() or report.stat().st_mtime < (folder / "final.safetensors").stat().st_mtime:
        return None
    saved = json.loads(report.read_text())
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


def markdown(table: Table, results, recipe, encoder_weights, count, protocol, limit, left_out) -> str:
    """Paper columns | our columns, and under them what was run."""
    stage = recipe.stages[0]
    epochs = sum(s.epochs for s in recipe.stages)
    lines = [
        f"### {table.title}",
        "",
        "| row | paper PixAcc | paper mAcc | paper mIoU | ours PixAcc | ours mAcc | ours mIoU | ours depth RMSE (m) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ours = [100 * r["ours"][k] for k in SCORES]
        rmse = r["ours"]["rmse"]
        cells = [*(f"{v:.1f}" for v in r["paper"]), *(f"{v:.1f}" for v in ours), "-" if rmse is None else f"{rmse:.3f}"]
        lines.append(f"| {r['label']} | " + " | ".join(cells) + " |")
    weights = "random encoder weights" if encoder_weights is None else "ImageNet encoder weights"
    lines += [
        "",
        f"Paper: ResNet-50, 795 training and 654 test frames, 40 classes, 8 GPUs. Ours: {recipe.arguments['encoder']}"
        f" ({weights}), {count} training and {protocol['frames']} validation frames of {protocol['data']},"
        f" {protocol['classes_scored']} classes, {epochs} epochs of batch {stage.batch} at"
        f" {stage.size[1]}x{stage.size[0]}, seed {recipe.seed}, crop {protocol['crop']}, no flip."
        + (f" A smoke run: only the first {limit} samples." if limit else ""),
    ]
    lines += [f"Left out: {text}" for text in left_out]
    return "\n".join(lines) + "\n"
