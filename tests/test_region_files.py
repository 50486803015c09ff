"""Region support as files: what is in them, what is skipped, and the sheet."""

import json

import numpy as np
import pytest
from PIL import Image

from enfilade import labels
from enfilade.cli import main
from enfilade.data.files import read_map
from enfilade.data.nyuv2 import NYUv2
from enfilade.data.region_files import show_region_support, write_region_support
from enfilade.errors import UserError
from enfilade.ops.regions import region_support_reference
from enfilade.types import Sample


class Listed:
    """A reader of given samples that counts how often it is asked; an exception in the list is raised."""

    name = "listed/train"
    score_crop = None

    def __init__(self, *samples, space="nyu13", ignored=()):
        self.samples, self.space, self.ignored = samples, labels.get(space), ignored
        self.names = tuple(f"s{i}" for i in range(len(samples)))
        self.asked = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.asked.append(index)
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


def sample(seed=0, height=24, width=32, **changes):
    rng = np.random.default_rng(seed)
    classes = np.kron(rng.integers(0, 13, (height // 4, width // 4)), np.ones((4, 4))).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.1] = 255
    fields = {
        "image": rng.random((height, width, 3), np.float32),
        "labels": classes,
        "depth": rng.uniform(1, 6, (height, width)).astype(np.float32),
    }
    return Sample(**{**fields, **changes})


def test_files_hold_the_support_in_millimetres(tmp_path):
    reader = Listed(*(sample(seed) for seed in range(3)))
    found = write_region_support(reader, tmp_path / "new" / "folder")
    assert (found.written, found.present, found.broken) == (3, 0, ())
    for i, s in enumerate(reader.samples):
        stored = read_map(tmp_path / "new" / "folder" / f"s{i}.png")
        assert stored.dtype == np.uint16
        np.testing.assert_allclose(stored / 1000, region_support_reference(s.labels, s.depth), atol=0.5001e-3)
        np.testing.assert_array_equal(stored == 0, s.labels == 255)
    assert not list(tmp_path.rglob("*.part"))


def test_a_labelled_pixel_does_not_round_to_void(tmp_path):
    near = sample(depth=np.full((24, 32), 2e-4, np.float32))
    write_region_support(Listed(near), tmp_path)
    np.testing.assert_array_equal(read_map(tmp_path / "s0.png"), np.where(near.labels == 255, 0, 1))


def test_a_second_run_writes_what_is_missing(tmp_path):
    samples = [sample(seed) for seed in range(4)]
    write_region_support(Listed(*samples[:2]), tmp_path)
    before = [(tmp_path / f"s{i}.png").read_bytes() for i in range(2)]
    (tmp_path / "s1.png").unlink()
    reader = Listed(*samples)
    found = write_region_support(reader, tmp_path)
    assert reader.asked == [1, 2, 3]
    assert (found.written, found.present) == (3, 1)
    assert [(tmp_path / f"s{i}.png").read_bytes() for i in range(2)] == before
    reader = Listed(*samples)
    assert write_region_support(reader, tmp_path).present == 4
    assert reader.asked == []


def test_bad_frames_are_named_and_passed_over(tmp_path):
    good = sample()
    uneven = sample()
    object.__setattr__(uneven, "depth", np.ones((6, 7), np.float32))  # past the shape checks that run in tests
    reader = Listed(
        UserError("depth/a.png is truncated"),
        good,
        RuntimeError("odd"),
        sample(depth=None),
        sample(labels=None),
        sample(labels=None, depth=None),
        uneven,
        sample(depth=np.zeros((24, 32), np.float32)),
        sample(labels=np.full((24, 32), 255, np.uint8)),
        sample(depth=np.full((24, 32), 70, np.float32)),
        good,
    )
    found = write_region_support(reader, tmp_path)
    assert found.written == 2
    assert [name for name, _ in found.broken] == ["s0", *(f"s{i}" for i in range(2, 10))]
    for (_, reason), expected in zip(
        found.broken,
        [
            "depth/a.png is truncated",
            "RuntimeError: odd",
            "has no depth",
            "has no labels",
            "has no labels and no depth",
            "depth of shape [6, 7] does not fit labels of [24, 32]",
            "not a pixel has depth",
            "not a pixel has a label",
            "its region support reaches 70.0 m, beyond the 65.534 m of a 16-bit image",
        ],
    ):
        assert reason == expected
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["s1.png", "s10.png"]
    # On the next run one that is good by now is written, and the others are named again, though the first has no depth.
    reader.samples = tuple(good if i == 0 else s for i, s in enumerate(reader.samples))
    found = write_region_support(reader, tmp_path)
    assert (found.written, found.present, len(found.broken)) == (1, 2, 8)
    reader.samples = (good, good, sample(depth=None), *reader.samples[3:])
    assert write_region_support(reader, tmp_path).broken[0] == ("s2", "has no depth")


def test_a_data_set_without_depth_is_refused_at_once(tmp_path):
    reader = Listed(UserError("broken"), *(sample(depth=None) for _ in range(50)))
    with pytest.raises(
        UserError, match=r"listed/train has no depth \(sample s1\): region support needs labels and depth"
    ):
        write_region_support(reader, tmp_path / "out")
    assert reader.asked == [0, 1]


def test_a_folder_of_other_labels_is_refused(tmp_path):
    write_region_support(Listed(sample()), tmp_path)
    assert json.loads((tmp_path / "region_support.json").read_text()) == {"unit": "mm", "space": "nyu13", "ignored": []}
    for other in (Listed(sample(), sample(), space="nyu40"), Listed(sample(), sample(), ignored=(6,))):
        with pytest.raises(UserError, match=r"region_support\.json tells of other labels than .*choose another folder"):
            write_region_support(other, tmp_path)
    (tmp_path / "region_support.json").write_text("{")
    with pytest.raises(UserError, match="tells of other labels"):
        write_region_support(Listed(sample()), tmp_path)
    (tmp_path / "region_support.json").unlink()
    with pytest.raises(UserError, match=r"holds images but no region_support\.json"):
        write_region_support(Listed(sample()), tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        write_region_support(Listed(sample()), tmp_path / "file")


def test_names_may_hold_folders(tmp_path):
    reader = Listed(sample(), sample(1))
    reader.names = ("kv1/a/0001", "kv2/b/0001")
    assert write_region_support(reader, tmp_path).written == 2
    assert (tmp_path / "kv2/b/0001.png").is_file()
    assert write_region_support(reader, tmp_path).present == 2


def test_sheet_shows_four_pictures_a_row(tmp_path):
    red = np.zeros((240, 320, 3), np.float32) + np.array([1, 0, 0], np.float32)
    depth = np.full((240, 320), 2, np.float32)
    depth[:, 160:] = 3
    # var is 0.1 m: the one region is cut in two parts, so that its support looks like its depth.
    one = sample(height=240, width=320, image=red, labels=np.full((240, 320), 4, np.uint8), depth=depth)
    sheet = show_region_support(Listed(one), tmp_path / "one.png")
    pixels = np.asarray(sheet)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png")), pixels)
    middle = pixels[pixels.shape[0] // 2]
    # Four tiles of 320, eight pixels apart.
    tiles = [middle[8 + i * 328 : 8 + i * 328 + 320] for i in range(4)]
    assert (tiles[0] == [255, 0, 0]).all()
    assert (tiles[1] == labels.get("nyu13").colours[4]).all()
    np.testing.assert_array_equal(tiles[2], tiles[3])
    assert (tiles[2][0] != tiles[2][-1]).any()
    assert pixels.shape[1] == 4 * 328 + 8
    assert not list(tmp_path.glob("*.part"))


def test_sheet_names_what_is_broken_and_goes_on(tmp_path):
    whole = show_region_support(Listed(*(sample(s) for s in range(3))), tmp_path / "whole.png")
    broken = Listed(sample(0), UserError("depth/a.png is truncated: its end is missing"), sample(2, depth=None))
    sheet = show_region_support(broken, tmp_path / "sheet.png")
    assert sheet.size == whole.size
    a, b = np.asarray(sheet), np.asarray(whole)
    third = a.shape[0] // 3
    np.testing.assert_array_equal(a[: third - 8], b[: third - 8])
    assert (a[third:] != b[third:]).any()


def test_sheet_is_drawn_by_its_seed(tmp_path):
    reader = Listed(*(sample(s) for s in range(20)))
    drawn = []
    for seed in (0, 0, 1):
        reader.asked.clear()
        show_region_support(reader, tmp_path / "a.png", count=3, seed=seed)
        drawn.append(list(reader.asked))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(d) == 3 for d in drawn)


def test_sheet_errors(tmp_path):
    with pytest.raises(UserError, match=r"nothing to show: listed/train has 0 samples, 6 were asked for"):
        show_region_support(Listed(), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"cannot write a\.png"):
        show_region_support(Listed(sample()), tmp_path / "nowhere" / "a.png")


def test_progress_is_shown_on_request(tmp_path, capsys):
    write_region_support(Listed(sample()), tmp_path, quiet=False)
    out, error = capsys.readouterr()
    assert out == ""
    assert "listed/train" in error


@pytest.mark.shared
def test_a_real_frame(shared_data, tmp_path, monkeypatch):
    reader = NYUv2(shared_data / "nyuv2", "val")
    monkeypatch.setattr(reader, "names", reader.names[:1])
    assert write_region_support(reader, tmp_path).written == 1
    frame = reader[0]
    assert frame.labels is not None
    assert frame.depth is not None
    stored = read_map(tmp_path / f"{frame.name}.png") / 1000
    np.testing.assert_allclose(stored, region_support_reference(frame.labels, frame.depth), atol=0.5001e-3)


def test_from_the_command_line(tmp_path, capsys):
    small = ["--option", "length=2", "--option", "width=64", "--option", "height=48"]
    words = ["data", "regions", "rooms", *small, "--out", str(tmp_path), "--show", "1"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("2 written, 0 there before, 0 broken")
    assert (tmp_path / "sheet.png").is_file()
    assert len(list(tmp_path.glob("room*.png"))) == 2
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("0 written, 2 there before, 0 broken")
