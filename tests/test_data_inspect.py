"""Counting and showing a data set: against counts made by hand, and with broken samples in between."""

import json

import numpy as np
import pytest
from PIL import Image

from enfilade import labels
from enfilade.camera import Camera
from enfilade.data.frames import Frames
from enfilade.data.inspect import check, show
from enfilade.data.nyuv2 import NYUv2
from enfilade.errors import UserError
from enfilade.types import Sample


class Listed:
    """A reader of given samples; an exception in the list is raised."""

    name = "listed"
    space = labels.get("nyu13")
    ignored = (6,)
    score_crop = None

    def __init__(self, *samples):
        self.samples = samples
        self.names = tuple(f"s{i}" for i in range(len(samples)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


def sample(height=6, width=8, seed=0, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "image": rng.random((height, width, 3), np.float32),
        "labels": rng.integers(0, 13, (height, width)).astype(np.uint8),
        "depth": rng.uniform(1, 4, (height, width)).astype(np.float32),
        "camera": Camera(10.0, 10.0, 3.5, 2.5, width, height),
    }
    return Sample(**{**fields, **changes})


def test_counts_are_exact():
    a, b, c = sample(seed=1), sample(8, 10, seed=2, camera=None), sample(seed=3, labels=None, depth=None, camera=None)
    a.labels[0], a.depth[0] = 255, 0
    b.labels[:] = np.where(b.labels == 4, 5, b.labels)
    report = check(Listed(a, b, c))
    assert (report.samples, report.with_labels, report.with_depth) == (3, 2, 2)
    assert (report.with_camera, report.with_pose) == (1, 0)
    assert report.sizes == {"8x6": 2, "10x8": 1}
    for i, name in enumerate(labels.get("nyu13").names):
        assert report.label_pixels[name] == (a.labels == i).sum() + (b.labels == i).sum()
        assert report.label_samples[name] == sum((x.labels == i).any() for x in (a, b))
    assert report.ignored_pixels == 8
    assert report.ignored_classes == ("objects",)
    depths = np.concatenate([a.depth.ravel(), b.depth.ravel()])
    valid = depths[depths > 0]
    assert report.depth_range == (valid.min(), valid.max())
    assert report.depth_missing == pytest.approx((depths == 0).mean())
    assert report.depth_median == pytest.approx(np.median(valid), abs=0.03)  # centimetres, and neighbouring values
    assert report.broken == ()
    assert any("2 sizes" in hint for hint in report.hints)


def test_broken_samples_are_listed_and_passed_over():
    good = sample()
    nan, negative, blind = good.depth.copy(), good.depth.copy(), np.zeros_like(good.depth)
    nan[0, 0], negative[0, 0] = np.nan, -1
    uneven = sample()
    object.__setattr__(uneven, "depth", np.ones((6, 7), np.float32))  # past the shape checks that run in tests
    reader = Listed(
        good,
        UserError("a.png is truncated"),
        RuntimeError("odd"),
        sample(labels=np.full((6, 8), 13, np.uint8)),
        sample(labels=np.full((6, 8), 255, np.uint8)),
        sample(depth=nan),
        sample(depth=negative),
        sample(depth=blind),
        uneven,
        sample(image=good.image * 255),
        sample(camera=Camera(1.0, 1.0, 0.0, 0.0, 4, 4)),
        good,
    )
    report = check(reader)
    assert report.samples == 2
    assert [name for name, _ in report.broken] == [f"s{i}" for i in range(1, 11)]
    for (_, reason), expected in zip(
        report.broken,
        [
            "a.png is truncated",
            "RuntimeError: odd",
            "label 13 beyond the 13 classes",
            "not a pixel is labelled",
            "negative or not finite",
            "negative or not finite",
            "not a pixel has depth",
            "depth 7x6, image 8x6",
            "colours beyond 0..1",
            "camera of another size",
        ],
    ):
        assert expected in reason


def test_text_and_json_tell_the_same():
    report = check(Listed(sample(), UserError("a.png is truncated")))
    content = json.loads(report.json())
    assert content["samples"] == 1
    assert content["broken"] == [["s1", "a.png is truncated"]]
    assert content["label_pixels"] == report.label_pixels
    text = report.text()
    assert "1 samples, 1 broken" in text
    assert "s1: a.png is truncated" in text
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0] in report.label_pixels]
    assert len(rows) == 13
    assert sum(float(row[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2)  # two decimals each


def test_a_wrong_unit_is_hinted_at():
    report = check(Listed(sample(depth=np.full((6, 8), 0.0021, np.float32))))
    assert any("unit" in hint for hint in report.hints)
    assert check(Listed(sample())).hints == ()


def test_nothing_readable():
    report = check(Listed(ValueError("no")))
    assert report.samples == 0
    assert report.depth_range is report.depth_median is report.depth_missing is None
    assert "1 broken" in report.text()
    json.loads(report.json())


def test_sheet_shows_every_kind(tmp_path):
    size = {"height": 60, "width": 80}
    samples = [sample(**size, seed=i) for i in range(5)]
    red = np.zeros((60, 80, 3), np.float32) + np.array([1, 0, 0], np.float32)
    samples[0] = sample(**size, image=red, labels=np.full((60, 80), 4, np.uint8))
    reader = Listed(*samples[:1])
    sheet = show(reader, tmp_path / "one.png")
    assert (np.asarray(Image.open(tmp_path / "one.png")) == np.asarray(sheet)).all()
    pixels = np.asarray(sheet)
    assert (pixels[6 + 120, 6 + 160] == [255, 0, 0]).all()  # the middle of the first tile of 320x240
    assert (pixels[6 + 120, 6 + 326 + 160] == labels.get("nyu13").colours[4]).all()
    assert sheet.width > 3 * 320  # and depth
    # without depth and labels there is one tile
    bare = show(Listed(Sample(image=red)), tmp_path / "bare.png")
    assert 320 < bare.width < 2 * 320
    assert not list(tmp_path.glob("*.part"))


def test_sheet_is_drawn_by_its_seed(tmp_path):
    reader = Listed(*(sample(30, 40, seed=i) for i in range(20)))
    first, again, other = (show(reader, tmp_path / "a.png", 4, seed) for seed in (0, 0, 1))
    assert (np.asarray(first) == np.asarray(again)).all()
    assert first.size == other.size
    assert (np.asarray(first) != np.asarray(other)).any()


def test_sheet_says_what_is_broken_and_goes_on(tmp_path):
    reader = Listed(sample(60, 80), UserError("depth/a.png is truncated: its end is missing"), sample(60, 80))
    whole = show(Listed(sample(60, 80), sample(60, 80), sample(60, 80)), tmp_path / "whole.png")
    sheet = show(reader, tmp_path / "sheet.png")
    assert sheet.size == whole.size
    assert (np.asarray(sheet) != np.asarray(whole)).any()


def test_sheet_errors(tmp_path):
    with pytest.raises(UserError, match="nothing to show"):
        show(Listed(), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"cannot write a\.png"):
        show(Listed(sample()), tmp_path / "nowhere" / "a.png")


@pytest.mark.shared
def test_real_sets_are_whole(shared_data, tmp_path):
    report = check(Frames(shared_data / "7scenes_office"))
    assert (report.samples, report.with_pose, report.broken) == (40, 40, ())
    assert 0.2 < report.depth_range[0] < report.depth_range[1] < 10
    reader = NYUv2(shared_data / "nyuv2", "val")
    sheet = show(reader, tmp_path / "sheet.png", count=2)
    assert sheet.width > 3 * 320


@pytest.mark.shared
@pytest.mark.slow
def test_all_795_frames_are_whole(shared_data):
    reader = NYUv2(shared_data / "nyuv2", "trainval")
    report = check(reader)
    assert (report.samples, report.broken) == (795, ())
    assert report.sizes == {"640x480": 795}
    assert report.depth_missing == 0  # in-painted
    assert 0.4 < report.depth_range[0] < report.depth_range[1] < 10.1
    assert report.label_pixels["otherprop"] == 0
    assert all(report.label_samples[name] > 0 for name in report.label_pixels if name != "otherprop")
