"""Reproducing a table: rows are trained, scored and set beside the paper's, which ours never touch."""

import json

import cv2
import numpy as np
import pytest

from enfilade import experiments, recipes
from enfilade.errors import UserError


@pytest.fixture
def root(tmp_path):
    """A folder as NYUv2 has it, of six small frames."""
    rng = np.random.default_rng(0)
    for kind in ("rgb", "depth", "label40"):
        (tmp_path / kind).mkdir()
    ids = [f"{i:04d}" for i in range(6)]
    for i in ids:
        cv2.imwrite(str(tmp_path / f"rgb/{i}.jpg"), rng.integers(0, 256, (96, 128, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f"depth/{i}.png"), rng.integers(1000, 4000, (96, 128), np.uint16))
        cv2.imwrite(str(tmp_path / f"label40/{i}.png"), rng.integers(1, 5, (96, 128), np.uint8))
    (tmp_path / "train.txt").write_text("\n".join(ids[:4]))
    (tmp_path / "val.txt").write_text("\n".join(ids[4:]))
    return tmp_path


def test_every_row_has_a_recipe_and_a_row_of_the_paper():
    for table in experiments.TABLES.values():
        for row in table.rows:
            assert recipes.get(row.recipe).name == row.recipe
            assert len(row.paper) == len(experiments.SCORES)
    with pytest.raises(UserError, match="did you mean 'gad-table4'"):
        experiments.get("gad-tabel4")


def test_rows_are_trained_once_and_stand_beside_the_papers(root, tmp_path, monkeypatch):
    small = {"encoder": "mobilenetv2_035", "bottleneck": 8, "widths": (8, 8), "embedding": 8}

    def tiny(name, weights=None):
        recipe = recipes.RECIPES[name](weights)
        return recipe.replace(arguments=recipe.arguments | small).with_stages(size=(32, 32), batch=2)

    monkeypatch.setattr(experiments.recipes, "get", tiny)
    options = {"root": str(root), "out": tmp_path / "out", "epochs": 1, "workers": 0, "quiet": True}
    rows = ("gad-Ls", "gad-Ls-hha", "gad-spf")
    text = experiments.reproduce("gad-table4", rows=rows, **options)
    assert "| sem+Ls | 70.4 | 50.3 | 40.6 |" in text  # the paper's
    assert "random encoder weights" in text
    assert "Left out: sem+Ls+HHA" in text  # the folder has no hha/
    saved = json.loads((tmp_path / "out/gad-table4.json").read_text())
    assert [r["recipe"] for r in saved["rows"]] == ["gad-Ls", "gad-spf"]
    assert all(0 <= r["ours"]["miou"] <= 1 for r in saved["rows"])
    assert saved["rows"][0]["ours"]["rmse"] is None  # that row has no depth
    assert saved["rows"][1]["ours"]["rmse"] > 0

    weights = tmp_path / "out/gad-spf/final.safetensors"
    before = weights.read_bytes()
    assert experiments.reproduce("gad-table4", rows=rows, **options) == text
    assert weights.read_bytes() == before


def test_an_unknown_row_is_named(root, tmp_path):
    with pytest.raises(UserError, match="did you mean 'gad-vanconv'"):
        experiments.reproduce("gad-table4", root=str(root), out=tmp_path / "out", rows=("gad-vancov",))
