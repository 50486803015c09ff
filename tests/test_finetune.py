"""Fine-tuning on one's own labels: what a class knew it keeps, depth is kept, and the classes travel with the file."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import enfilade
from enfilade import checkpoint, labels
from enfilade.checkpoint import Loaded
from enfilade.copies import MARGIN, canonical_depth, prepare
from enfilade.data.folder import Folder
from enfilade.errors import UserError
from enfilade.finetune import carry, demand_teachable, finetune, recipe_for, told, training_size
from enfilade.predict import Predictor
from enfilade.types import Sample
from enfilade.verbs_finetune import Finetune

OLD = ("red", "green", "blue", "night stand")
NEW = ("grey", "Night_Stand", "green")  # of these the last two are known
PAINT = np.array([[120, 120, 120], [40, 40, 160], [40, 200, 40]], np.uint8)
TINY = {"encoder": "test_efficientnet", "weights": None}
NETWORKS = {
    "gad": {"bottleneck": 8, "widths": (8, 8), "embedding": 8},
    "lrn": {"widths": (8, 8, 8, 8, 8)},
    "joint": {"widths": (4, 4, 4, 4, 8)},
    "fcn8s": {"hidden": 0},
}
QUICK = {"epochs": 1, "batch": 2, "size": (32, 64), "workers": 0, "quiet": True, "precision": "fp32"}


def starting(kind="gad", names=OLD, seed=3, more=None) -> Loaded:
    """A network of random weights, as a model of `names`."""
    torch.manual_seed(seed)
    arguments = {"classes": len(names), **TINY, **NETWORKS[kind], **(more or {})}
    network = checkpoint.build(kind, arguments).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("trunk."):
                parameter.add_(0.1 * torch.randn_like(parameter))  # no zeros, no identities
    focal = 50.0 if kind in ("gad", "joint") else None
    meta = {"model": kind, "arguments": arguments, "recipe": "tiny", "focal": focal}
    return Loaded(network, meta | {"space": labels.own(names).name, "size": [32, 64], "scale": 1.0, "license": "mine"})


def taught(start: Loaded, names) -> torch.nn.Module:
    space = labels.own(names)
    network = checkpoint.build(start.meta["model"], start.meta["arguments"] | {"classes": len(names)})
    network.load_state_dict(carry(start, space))
    return network.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Boards whose label is their colour, of several sizes, one image in two with depth."""
    root = tmp_path_factory.mktemp("own") / "boards"
    for kind in ("images", "labels", "depth"):
        (root / kind).mkdir(parents=True)
    for i in range(6):
        rng = np.random.default_rng(i)
        found = np.kron(rng.integers(0, 3, (2, 4)), np.ones((24, 24))).astype(np.uint8)
        image = PAINT[found] + rng.integers(0, 20, (48, 96, 3)).astype(np.uint8)
        cv2.imwrite(str(root / f"images/{i}.png"), image[..., ::-1])
        found[:2] = 255
        cv2.imwrite(str(root / f"labels/{i}.png"), found)
        if i % 2:
            cv2.imwrite(str(root / f"depth/{i}.png"), np.full((48, 96), 2000, np.uint16))
    (root / "classes.txt").write_text("\n".join(NEW))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    start = starting()
    checkpoint.save_model(path, start.network, start.meta)
    return path


@pytest.fixture(scope="module")
def done(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, finetune(folder, out=out, model=model, **QUICK)


# --- rows of classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_same_classes_in_another_order_give_the_same_answers(kind):
    order = [2, 0, 3, 1]
    start = starting(kind)
    new = taught(start, [OLD[i] for i in order])
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before, after = start.network(image), new(image)
    # sums over classes in another order: float32 rounding only
    torch.testing.assert_close(after.logits, before.logits[:, order], rtol=1e-4, atol=1e-4)
    for a, b in zip(after.side_logits, before.side_logits):
        torch.testing.assert_close(a, b[:, order], rtol=1e-4, atol=1e-4)
    if before.depth is not None:
        torch.testing.assert_close(after.depth, before.depth)


def test_a_crf_keeps_its_pairs_of_classes():
    order = [2, 0, 3, 1]
    start = starting("joint", more={"crf": "rgb"})
    weights = start.network.state_dict()["crf.weights"]
    carried = carry(start, labels.own([OLD[i] for i in order]))["crf.weights"]
    assert (carried == weights[:, order][:, :, order]).all()


@pytest.mark.parametrize("names", [NEW, ("blue", "mug", "plate", "cup"), (*OLD, "mug", "plate")])
def test_classes_of_the_same_name_keep_what_they_learned(names):
    start = starting("gad")
    known = labels.counterparts(labels.own(OLD), labels.own(names))
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        before, after = start.network(image), taught(start, names)(image)
    torch.testing.assert_close(after.logits[:, list(known.values())], before.logits[:, list(known)])
    torch.testing.assert_close(after.depth, before.depth)  # and depth is what it was
    fresh = [i for i in range(len(names)) if i not in known.values()]
    for i in fresh:  # four classes again: none of the old rows may be left in place
        assert not any(torch.allclose(after.logits[:, i], before.logits[:, j]) for j in range(len(OLD)))


def test_no_class_in_common_starts_anew():
    start = starting("gad")
    carried = carry(start, labels.own(["mug", "plate", "cup", "jug"]))
    old = start.network.state_dict()
    changed = {k for k in old if not torch.equal(old[k], carried[k])}
    assert changed == {k for k in old if k.startswith("classifier.") or ".side." in k}
    state = torch.random.get_rng_state()
    carry(start, labels.own(["mug"]))
    assert torch.equal(state, torch.random.get_rng_state())


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_report_and_files(done, folder):
    out, found = done
    assert found["complete"]
    assert found["images"] == {"train": 5, "val": 1, "left out": 0}
    assert found["carried"] == ["Night_Stand", "green"]
    assert found["before"]["segmentation"]["miou"] is not None
    assert found["after"]["segmentation"]["pixels"] == (46 * 96)
    assert 0 < found["depth_change"] < 0.5
    written = json.loads((out / "report.json").read_text())
    assert written["after"]["segmentation"] == found["after"]["segmentation"]
    assert sum(map(sum, written["confusion"])) == 46 * 96
    text = (out / "report.txt").read_text()
    assert "scores over 1 val images are rough" in text
    rows = [line for line in text.splitlines() if line.startswith("grey")]
    assert "new" in rows[0]
    old = {row["name"]: row["iou"] for row in found["before"]["segmentation"]["per_class"]}
    assert found["before_known"] == pytest.approx((old["green"] + old["Night_Stand"]) / 2)
    for name in ("confusion.png", "comparison.png"):
        assert cv2.imread(str(out / name)) is not None


def test_the_classes_travel_with_the_file(done, folder, tmp_path):
    """Labels, legend, arrays and export's facts in a process that has never seen the folder."""
    out, _ = done
    code = """
import json, sys
import numpy as np, enfilade
from enfilade.outputs import describe, save
model, image, folder = sys.argv[1:]
predictor = enfilade.load(model)
p = predictor.predict(np.full((48, 96, 3), 120, np.uint8))
paths = save(p, folder, stem="p", files=("labels", "overlay", "panel", "arrays"))
names = np.load(paths[-1])["names"].tolist()
print(json.dumps({"space": p.space, "names": names, "classes": describe(p)["classes"], "depth": p.depth is not None,
    "license": predictor.meta["license"], "start": predictor.meta["start"], "scale": predictor.meta["scale"]}))
"""
    arguments = [sys.executable, "-c", code, str(out / "model.safetensors"), "x", str(tmp_path)]
    told = json.loads(subprocess.run(arguments, capture_output=True, check=True, text=True).stdout)
    assert told["names"] == list(NEW)
    assert told["space"] == labels.own(NEW).name
    assert set(told["classes"]) <= set(NEW)
    assert told["depth"]
    assert told["license"] == "mine"
    assert told["scale"] == pytest.approx(32 / 48)
    assert enfilade.load(out).space.names == NEW  # the run folder is a model too


def test_stopped_and_called_again_it_ends_as_if_never_stopped(done, folder, model, tmp_path):
    out, whole = done
    assert finetune(folder, out=tmp_path, model=model, **QUICK, stop_after=1) == {"complete": False}
    again = finetune(folder, out=tmp_path, model=model, **QUICK)
    assert again["after"] == whole["after"]
    one, two = (load_file(path / "final.safetensors") for path in (out, tmp_path))
    assert all(torch.equal(one[k], two[k]) for k in one)
    before = (tmp_path / "last.safetensors").stat().st_mtime_ns
    assert finetune(folder, out=tmp_path, model=model, **QUICK)["complete"]  # nothing left to train
    assert (tmp_path / "last.safetensors").stat().st_mtime_ns == before


def test_what_is_frozen_stays(folder, model, tmp_path):
    finetune(folder, out=tmp_path, model=model, **QUICK, freeze=("encoder",))
    old, new = load_file(model), load_file(tmp_path / "final.safetensors")
    assert all(torch.equal(old[k], new[k]) for k in old if k.startswith("trunk."))
    assert any(not torch.equal(old[k], new[k]) for k in old if k.startswith("semantic."))


def test_other_labels_are_another_training(folder, model, tmp_path):
    other = tmp_path / "boards"
    subprocess.run(["cp", "-r", str(folder), str(other)], check=True)
    assert finetune(other, out=tmp_path / "run", model=model, **QUICK, stop_after=1) == {"complete": False}
    cv2.imwrite(str(other / "labels/0.png"), np.ones((48, 96), np.uint8))
    with pytest.raises(UserError, match=r"holds a training on other images, labels, classes or sizes: choose another"):
        finetune(other, out=tmp_path / "run", model=model, **QUICK)
    result = finetune(other, out=tmp_path / "run", model=model, **QUICK, stop_after=1, resume=False)
    assert result == {"complete": False}
    assert len(list((tmp_path / "run" / "prepared").iterdir())) == 1


# --- copies and depth -------------------------------------------------------------------------------------------------


def recipe(start, count=6, **changes):
    usual = {"epochs": None, "batch": 8, "lr": 5e-4, "encoder_lr": 0.2, "freeze": (), "class_weighting": 0.5}
    space, size = labels.own(NEW), changes.pop("size", (32, 64))
    return recipe_for(start, space, size, count, **{**usual, "seed": 0, "precision": "fp32", **changes})


def test_copies_hold_labels_and_the_starting_depth(folder, model, tmp_path):
    start = demand_teachable(checkpoint.load(model), model)
    data = {"train": Folder(folder, "all")}
    copies = prepare(data, tmp_path, start, model, recipe(start), quiet=True)["train"]
    predictor = Predictor(start.network, start.meta, flip=False)
    for index in range(6):
        sample, source = copies[index], data["train"][index]
        assert sample.labels is not None
        assert source.labels is not None
        assert sample.depth is not None
        assert sample.image.shape[:2] == (round(32 * MARGIN), round(64 * MARGIN))
        assert (np.unique(sample.labels) == np.unique(source.labels)).all()
        assert np.abs(sample.image.mean((0, 1)) - source.image.mean((0, 1))).max() < 0.01
        if index % 2:
            assert (sample.depth == np.float32(2)).all()
        else:  # to the rounding to millimetres, half a one
            answer = predictor.predict(source.image).depth
            assert answer is not None
            nearest = cv2.resize(answer, (80, 40), interpolation=cv2.INTER_NEAREST_EXACT)
            assert np.abs(sample.depth - nearest).max() < 0.00051
            assert sample.depth.std() > 0


def test_the_size_of_the_new_network_does_not_change_the_depth_to_learn(folder, model, tmp_path):
    start = demand_teachable(checkpoint.load(model), model)
    data = {"train": Folder(folder, "all")}
    found = []
    for size in ((32, 64), (64, 128)):
        changed = recipe(start, size=size)
        found.append(prepare(data, tmp_path / str(size), start, model, changed, quiet=True)["train"][0].depth)
    small, large = found
    assert small is not None
    assert large is not None
    assert large.shape == (80, 160)
    # the same map, sampled twice as densely: quantiles agree but for which pixels are drawn
    assert np.quantile(large, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(small, [0.1, 0.5, 0.9]), rel=0.02)


def test_depth_of_a_known_camera_becomes_canonical():
    start = starting()
    predictor = Predictor(start.network, start.meta, flip=False)
    rgb = np.zeros((32, 64, 3), np.float32)
    metres = np.full((32, 64), 3, np.float32)
    for factor in (1.0, 2.0):  # twice the focal length: what is seen so large is twice as far away
        camera = enfilade.Camera(50.0 * factor, 50.0 * factor, 31.5, 15.5, 64, 32)
        found = canonical_depth(Sample(image=rgb, depth=metres, camera=camera), predictor)
        assert np.allclose(found, 3 / factor)
    # and what is learned so is predicted as it was
    assert predictor.zoom(camera, 32, 64) * 1.5 == pytest.approx(3)


def test_the_recipe_asks_for_what_the_network_makes():
    losses = {kind: recipe(starting(kind)).stages[0].losses for kind in NETWORKS}
    assert {kind: "depth_berhu" in terms for kind, terms in losses.items()} == {
        "gad": True,
        "joint": True,
        "lrn": False,
        "fcn8s": False,
    }
    assert "side_cross_entropy" in losses["lrn"]
    assert "side_cross_entropy" not in losses["fcn8s"]
    start = starting()
    passes = {n: n * recipe(start, n).stages[0].epochs for n in (20, 100, 500, 2000)}
    assert passes == {20: 1200, 100: 6000, 500: 6000, 2000: 12000}
    larger = recipe(start, size=(64, 128))
    assert larger.focal == pytest.approx(100)  # the same camera at twice the size
    assert np.allclose(np.array(larger.source) * larger.scale, (64, 128))
    assert recipe(start, count=3).stages[0].batch == 3


def test_the_shape_is_that_of_most_images(folder):
    reader = Folder(folder, "all")
    height, width = training_size(reader, {"size": [312, 416]})
    assert height % 32 == width % 32 == 0
    assert width / height == pytest.approx(2, rel=0.1)
    assert height * width == pytest.approx(312 * 416, rel=0.1)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_told(folder, model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"'trunkk' is no part that can be frozen: choose among encoder, semantic"):
        recipe(starting(), freeze=("trunkk",))
    with pytest.raises(UserError, match="at least 32 pixels high and wide, not 64x16"):
        recipe(starting(), size=(16, 64))
    with pytest.raises(UserError, match="imenet-rooms is of kind imenet and cannot be taught classes"):
        demand_teachable(Loaded(torch.nn.Identity(), {"model": "imenet"}), "imenet-rooms")
    with pytest.raises(UserError, match="epochs and batch are at least 1, not 0 and 8"):
        finetune(folder, out=tmp_path, model=model, epochs=0)
    with pytest.raises(UserError, match="--size is WIDTHxHEIGHT, for example 416x320, not '416'"):
        Finetune(str(folder), str(tmp_path), size="416").run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        finetune(folder, out=tmp_path, model=model)


def test_broken_labels_are_told_before_anything_is_trained(folder, model, tmp_path):
    other = tmp_path / "boards"
    subprocess.run(["cp", "-r", str(folder), str(other)], check=True)
    for name in ("0", "1", "2", "3"):
        cv2.imwrite(str(other / f"labels/{name}.png"), np.full((48, 96), 9, np.uint8))
    with pytest.raises(
        UserError, match=r"holds the value 9 in 4608 pixels, .*; [23] more are broken: enfilade data ch"
    ):
        finetune(other, out=tmp_path / "run", model=model, **QUICK)
    for path in (other / "labels").iterdir():
        cv2.imwrite(str(path), np.full((48, 96), 255, np.uint8))
    with pytest.raises(UserError, match=r"not a pixel has a class, all are void: is 255 a class in these labels"):
        finetune(other, out=tmp_path / "run", model=model, **QUICK)
    assert not (tmp_path / "run").exists()


def test_times_are_told_roughly():
    assert [told(s) for s in (3.0, 61.0, 100.0, 3000.0, 9000.0)] == [
        "10 seconds",
        "70 seconds",
        "2 minutes",
        "50 minutes",
        "2.5 hours",
    ]
