"""The demonstration: all its files, for the room and for a photo, and a truth that is one."""

import cv2
import numpy as np
import pytest
import torch

from enfilade import checkpoint
from enfilade.cli import main
from enfilade.data.rooms import room
from enfilade.demo import agreement, demo, truth_of
from enfilade.errors import UserError

ENDINGS = ("labels.png", "depth.png", "colour.png", "overlay.png", "panel.png", "npz", "ply")
SIZE = (96, 72)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    arguments = {"classes": 40, "encoder": "test_resnet", "weights": None}
    arguments |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    meta = {"model": "gad", "arguments": arguments, "space": "nyu40", "size": [48, 64], "focal": 50.0}
    checkpoint.save_model(path, checkpoint.build("gad", arguments), meta)
    return str(path)


@pytest.fixture(scope="module")
def sample():
    return room(3, width=SIZE[0], height=SIZE[1])


def test_the_room_alone(model, sample, tmp_path):
    told: list[str] = []
    written = demo(out=tmp_path / "demo", seed=3, model=model, size=SIZE, say=told.append)
    expected = {*(f"room.{ending}" for ending in ENDINGS), "room.truth.png"}
    assert {p.name for p in (tmp_path / "demo").iterdir()} == expected
    assert {str(tmp_path / "demo" / name) for name in expected} == set(written)
    assert all(any(path in line for line in told) for path in written)
    arrays = np.load(tmp_path / "demo/room.npz")
    assert arrays["labels"].shape == SIZE[::-1]
    np.testing.assert_allclose(arrays["intrinsics"], sample.camera.matrix)  # the room's own camera, not a guess
    assert str(arrays["camera_source"]) == "rendered"
    panel, both = (cv2.imread(str(tmp_path / f"demo/room.{kind}.png")) for kind in ("panel", "truth"))
    assert both.shape[0] > 1.5 * panel.shape[0]  # two panels, one above the other


def test_a_photo_beside_it(capsys, model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    photo = tmp_path / "room.png"  # bears the name of the rendered room's files
    cv2.imwrite(str(photo), pixels)
    written = demo(photo, out=tmp_path / "demo", seed=3, model=model, size=SIZE)
    text = capsys.readouterr().out
    assert "camera assumed" in text
    assert str(photo) in text
    names = [f"{stem}.{ending}" for stem in ("room", "photo") for ending in ENDINGS]
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {*names, "room.truth.png"}
    assert len(set(written)) == len(written)
    assert np.load(tmp_path / "demo/photo.npz")["labels"].shape == (40, 60)
    assert np.load(tmp_path / "demo/room.npz")["labels"].shape == SIZE[::-1]


def test_bad_input_stops_before_the_room_is_rendered(capsys, model, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        demo(tmp_path / "none.jpg", out=tmp_path / "demo", model=model, say=pytest.fail)
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert main(["demo", str(tmp_path / "empty.jpg"), "--out", str(tmp_path / "demo"), "--model", model]) == 2
    assert "0 bytes" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean"):
        demo(out=tmp_path / "demo", model="gad-nyu", say=pytest.fail)


def test_the_truth_agrees_with_itself_and_not_with_another(sample):
    truth = truth_of(sample, "nyu40")
    assert agreement(truth, truth) == (
        "100% of the pixels have the true label, half of the depths are off by less than 0%"
    )
    farther = truth_of(sample.replace(depth=sample.depth * 1.25, labels=(sample.labels + 1) % 40), "nyu40")
    assert (
        agreement(farther, truth) == "0% of the pixels have the true label, half of the depths are off by less than 25%"
    )


def test_the_truth_follows_the_models_label_space(sample):
    coarse = truth_of(sample, "nyu13")
    assert coarse.space == "nyu13"
    assert coarse.labels.max(initial=0, where=coarse.labels != 255) < 13
    # Nothing is split: pixels of one fine class share their coarse one
    for label in np.unique(sample.labels):
        assert len(np.unique(coarse.labels[sample.labels == label])) == 1
