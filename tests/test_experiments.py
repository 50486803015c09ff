"""Reproducing a table: rows are trained, scored and set beside the paper's, which ours never touch."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from enfilade import experiments, recipes, tables
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
    for table in tables.TABLES.values():
        for row in table.rows:
            assert recipes.get(row.recipe).name == row.recipe
            assert len(row.paper) in (0, len(table.columns) - ("pixel accuracy" in table.columns))
    with pytest.raises(UserError, match="did you mean 'gad-table4'"):
        tables.get("gad-tabel4")


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


@pytest.fixture
def street(tmp_path):
    """A folder as CamVid has it, of a few small images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "camvid"
    for split, count in (("train", 4), ("val", 2)):
        (folder / split).mkdir(parents=True)
        (folder / f"{split}annot").mkdir()
        for i in range(count):
            cv2.imwrite(str(folder / split / f"{i}.png"), rng.integers(0, 256, (40, 56, 3), np.uint8))
            labels = np.repeat(rng.integers(0, 3, (5, 7), np.uint8), 8, 0).repeat(8, 1)
            cv2.imwrite(str(folder / f"{split}annot" / f"{i}.png"), labels)
    return folder


def tiny_street(name, weights=None):
    recipe = recipes.RECIPES[name](weights)
    arguments = recipe.arguments | {"encoder": "mobilenetv2_035"}
    return recipe.replace(arguments=arguments, source=(40, 56)).with_stages(size=(32, 32), batch=2)


def test_classes_go_down_where_a_table_has_many(street, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.recipes, "get", tiny_street)
    options = {"data": "camvid", "root": str(street), "out": tmp_path / "out", "epochs": 1, "workers": 0, "quiet": True}
    text = experiments.reproduce("lrn-table2", rows=("SegNet", "LRN", "LRN, majority"), **options)
    heads, _, *body = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    assert [h.strip() for h in heads[1:]] == [
        *("paper SegNet", "paper LRN", "ours SegNet", "ours LRN", "ours LRN, majority"),
    ]
    cells = {row[0].strip(): [c.strip() for c in row[1:]] for row in body}
    assert cells["mIoU"][:2] == ["50.2", "61.7"]  # the paper's
    assert cells["sign"][:2] == ["29.5", "61.2"]
    assert cells["cyclist"][2:] == ["-"] * 3  # not in this folder
    saved = json.loads((tmp_path / "out/lrn-table2.json").read_text())
    assert cells["mIoU"][2:] == [f"{100 * r['ours']['miou']:.1f}" for r in saved["rows"]]
    report = json.loads((tmp_path / "out/lrn-camvid-plain/report.json").read_text())
    per_class = {r["name"]: r["accuracy"] for r in report["segmentation"]["per_class"]}
    assert cells["building"][3] == f"{100 * per_class['building']:.1f}"


def test_label_maps_of_one_model_are_scored_without_training_again(street, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.recipes, "get", tiny_street)
    options = {"data": "camvid", "root": str(street), "out": tmp_path / "out", "workers": 0, "quiet": True}
    text = experiments.reproduce("lrn-table4", epochs=1, rows=("s1", "s6"), strips=2, **options)
    model = tmp_path / "out/lrn-camvid/final.safetensors"
    assert [r["label"] for r in json.loads((tmp_path / "out/lrn-table4.json").read_text())["rows"]] == ["s1", "s6"]
    assert "| s1 | 50.9 |" in text
    strip = cv2.imread(str(tmp_path / "out/lrn-table4.png"))
    assert strip.shape[1] > 8 * 240  # photo, six maps, truth

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("enfilade.train.train", never)
    other = options | {"out": tmp_path / "scored"}
    again = experiments.reproduce("lrn-table4", rows=("s6",), model=str(model), strips=0, **other)
    row = next(line for line in text.splitlines() if line.startswith("| s6 |"))
    assert row in again
    assert not (tmp_path / "scored/lrn-table4.png").exists()


def test_the_finest_stage_is_the_models_own_answer(street):
    from enfilade.checkpoint import build
    from enfilade.data import open_dataset
    from enfilade.predict import Predictor

    recipe = tiny_street("lrn-camvid")
    predictor = Predictor(build("lrn", recipe.arguments), {"space": "camvid11", "size": [40, 56]}, flip=False)
    image = open_dataset("camvid", street, "val")[0].image
    whole = predictor.predict(image)
    np.testing.assert_array_equal(experiments.at_stage(predictor, 6).predict(image).labels, whole.labels)


def test_a_row_without_its_peer_library_is_left_out(street, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.recipes, "get", tiny_street)
    monkeypatch.setattr(experiments, "find_spec", lambda name: None)
    options = {"data": "camvid", "root": str(street), "out": tmp_path / "out", "workers": 0, "quiet": True}
    with pytest.raises(UserError, match=r"no row .* U-Net \(peer\): needs segmentation_models_pytorch"):
        experiments.reproduce("lrn-table2", rows=("unet-camvid",), **options)


def tiny_joint(name, weights=None):
    recipe = recipes.RECIPES[name](weights)
    small = {"encoder": "test_efficientnet", "widths": (4, 4, 4, 4, 4), "bins": 5}
    small |= {"theta": ((6, 13), (4, 0.2), (2,))} if "theta" in recipe.arguments else {}
    return recipe.replace(arguments=recipe.arguments | small).with_stages(size=(32, 32), batch=2)


def test_rows_go_on_from_the_stages_that_they_share(root, tmp_path, monkeypatch):
    """What comes out is what each row would have become alone."""
    from safetensors.torch import load_file

    from enfilade.data import open_dataset
    from enfilade.train import train

    monkeypatch.setattr(experiments.recipes, "get", tiny_joint)
    options = {"root": str(root), "out": tmp_path / "out", "epochs": 1, "workers": 0, "quiet": True}
    passed = []

    def watched(*arguments, **more):
        passed.append(more["passed"])
        return train(*arguments, **more)

    monkeypatch.setattr("enfilade.train.train", watched)
    experiments.reproduce("joint-table3", rows=("joint-sem", "joint-sem-depth"), **options)
    experiments.reproduce("joint-table3", rows=("joint-crf-depth",), **options)  # goes on from a row of an earlier call
    assert passed == [0, 1, 2]
    text = experiments.reproduce("joint-table3", rows=("joint-sem", "joint-sem-depth", "joint-crf-depth"), **options)
    saved = json.loads((tmp_path / "out/joint-table3.json").read_text())["rows"]
    assert [r["run"]["updates"] for r in saved] == [2, 4, 6]
    assert saved[0]["ours"]["rmse"] is None  # that row has no depth
    assert "| Sem-CRF+ | 39.2 | 52.3 | 68.6 |" in text
    assert "w of depth" in text  # what the CRF has learned
    assert cv2.imread(str(tmp_path / "out/joint-table3.png")) is not None

    data = open_dataset("nyuv2", str(root), "train")
    train(tiny_joint("joint-crf-depth").with_stages(epochs=1), data, out=tmp_path / "whole", workers=0, quiet=True)
    rows, whole = (
        load_file(folder / "final.safetensors") for folder in (tmp_path / "out/joint-crf-depth", tmp_path / "whole")
    )
    assert rows.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(rows[name], tensor, err_msg=name)

    again = experiments.reproduce("joint-table2", rows=("joint-crf-depth",), **options)  # trained already
    assert "| RMSE (m) | 0.816 |" in again


def test_what_rows_share():
    sem, both, crf, rgbd = (recipes.get(name) for name in recipes.JOINT_ROWS)
    a, b, c = Path("a"), Path("b"), Path("c")
    trained = [(sem, a), (both, b)]
    assert experiments.shared(crf, trained) == (b, 2)
    assert experiments.shared(rgbd, [*trained, (crf, c)]) == (b, 2)  # crf has as many stages, and another CRF
    assert experiments.shared(both, trained[:1]) == (a, 1)
    assert experiments.shared(both, [(sem.replace(seed=1), a)]) == (None, 0)
    other = sem.replace(arguments=sem.arguments | {"encoder": "resnet50"})
    assert experiments.shared(both, [(other, a)]) == (None, 0)
    assert experiments.shared(both, [(sem.with_stages(epochs=1), a)]) == (None, 0)
