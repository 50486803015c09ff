"""CamVid in both of its layouts, on trees whose contents are known."""

import cv2
import numpy as np
import pytest

from enfilade.data import Reader, open_dataset
from enfilade.data.camvid import COLOURS, CamVid
from enfilade.errors import UserError
from enfilade.labels import SPACES

IGNORE = 255
SPACE = SPACES["camvid11"]


def write(path, array):
    """RGB or grey, as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def segnet(root, size=(12, 16), ending="png", **stems):
    """SegNet's folders with these stems by split; returns {stem: (rgb, labels as stored)}."""
    rng = np.random.default_rng(0)
    content = {}
    for split, names in stems.items():
        for name in names:
            rgb = rng.integers(0, 256, (*size, 3), np.uint8)
            labels = rng.integers(0, 12, size).astype(np.uint8)
            write(root / split / f"{name}.{ending}", rgb)
            write(root / f"{split}annot" / f"{name}.png", labels)
            content[name] = rgb, labels
    return content


def original(root, names, size=(12, 16)):
    """The original's folders; returns {stem: (rgb, index of the colour in COLOURS)}."""
    rng = np.random.default_rng(1)
    palette = np.array([colour for colour, _ in COLOURS.values()], np.uint8)
    content = {}
    for name in names:
        rgb = rng.integers(0, 256, (*size, 3), np.uint8)
        which = rng.integers(0, len(palette), size)
        write(root / "701_StillsRaw_full" / f"{name}.png", rgb)
        write(root / "LabeledApproved_full" / f"{name}_L.png", palette[which])
        content[name] = rgb, which
    return content


# --- SegNet's layout --------------------------------------------------------------------------------------------------


def test_samples_are_converted(tmp_path):
    content = segnet(tmp_path, train=["b", "a"], val=["c"])
    reader = open_dataset("camvid", tmp_path, "train")
    assert isinstance(reader, Reader)
    assert (reader.name, reader.space, reader.names) == ("camvid/train", SPACE, ("a", "b"))
    assert (reader.ignored, reader.score_crop) == ((), None)
    for i, name in enumerate(reader.names):
        sample = reader[i]
        rgb, stored = content[name]
        np.testing.assert_allclose(sample.image, rgb / 255, atol=1e-6)
        assert sample.labels.dtype == np.uint8
        for label in range(12):
            assert (sample.labels[stored == label] == (label if label < 11 else IGNORE)).all()
        assert sample.name == name
        assert sample.depth is None
        assert sample.camera is None


def test_jpeg_images_are_found(tmp_path):
    content = segnet(tmp_path, ending="jpg", train=["a"])
    sample = CamVid(tmp_path)[0]
    assert sample.image.shape == (12, 16, 3)
    assert (sample.labels[content["a"][1] < 11] == content["a"][1][content["a"][1] < 11]).all()


def test_splits(tmp_path):
    segnet(tmp_path, train=["a", "d"], val=["b"], test=["c"])
    (tmp_path / "train" / "._a.png").write_bytes(b"left by a file system")
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n")
    names = {split: CamVid(tmp_path, split).names for split in ("train", "val", "test", "trainval")}
    assert names == {"train": ("a", "d"), "val": ("b",), "test": ("c",), "trainval": ("a", "d", "b")}
    with pytest.raises(UserError, match="did you mean 'val'"):
        CamVid(tmp_path, "vall")
    with pytest.raises(UserError, match="SegNet's layout, which has the splits"):
        CamVid(tmp_path, "all")


def test_labels_are_read_without_the_image(tmp_path):
    segnet(tmp_path, train=["a"])
    reader = CamVid(tmp_path)
    expected = reader[0].labels
    (tmp_path / "train/a.png").write_bytes(b"")
    np.testing.assert_array_equal(reader.labels(0), expected)
    with pytest.raises(UserError, match=r"a\.png is empty"):
        reader[0]


def test_missing_files_are_named_and_counted(tmp_path):
    segnet(tmp_path, train=["a", "b", "c"], val=["d"])
    (tmp_path / "trainannot/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainannot/b\.png not found \(1 of the 6 files of camvid/train"):
        CamVid(tmp_path)
    (tmp_path / "train/c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 6 files"):
        CamVid(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2 of the 8 files of camvid/trainval"):
        CamVid(tmp_path, "trainval")
    assert len(CamVid(tmp_path, "val")) == 1
    with pytest.raises(FileNotFoundError, match=r"/test not found"):
        CamVid(tmp_path, "test")
    (tmp_path / "valannot/d.png").unlink()
    (tmp_path / "valannot").rmdir()
    with pytest.raises(FileNotFoundError, match=r"valannot not found"):
        CamVid(tmp_path, "val")


def test_folders_that_are_not_camvid(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        CamVid(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="neither SegNet's folders"):
        CamVid(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(UserError, match="'train' has no frames"):
        CamVid(tmp_path)


def test_bad_frames_are_named(tmp_path):
    segnet(tmp_path, train=["a", "b", "c"])
    write(tmp_path / "trainannot/a.png", np.zeros((12, 15), np.uint8))
    write(tmp_path / "trainannot/b.png", np.full((12, 16), 12, np.uint8))
    write(tmp_path / "trainannot/c.png", np.zeros((12, 16), np.uint16))
    reader = CamVid(tmp_path)
    with pytest.raises(UserError, match=r"trainannot/a\.png is 15x12, but a\.png 16x12"):
        reader[0]
    for read in (reader.labels, reader.__getitem__):
        with pytest.raises(UserError, match=r"trainannot/b\.png holds label 12: expected 8 bits, 0\.\.10 and 11"):
            read(1)
    with pytest.raises(UserError, match=r"trainannot/c\.png .* expected 8 bits"):
        reader[2]
    write(tmp_path / "train/a.jpg", np.zeros((12, 16, 3), np.uint8))
    with pytest.raises(UserError, match="one frame twice"):
        CamVid(tmp_path)


# --- the original -----------------------------------------------------------------------------------------------------


def test_the_table_is_whole():
    colours = [colour for colour, _ in COLOURS.values()]
    assert len(set(colours)) == len(COLOURS) == 32
    assert {channel for colour in colours for channel in colour} == {0, 64, 128, 192}  # what the look-up relies on
    assert {target for _, target in COLOURS.values()} == {*SPACE.names, None}
    assert [name for name, (_, target) in COLOURS.items() if target is None] == ["Void"]
    # Ten of SegNet's classes are drawn in the original's colour of that name; only its pavement has another.
    same = {"Sky": "sky", "Building": "building", "Column_Pole": "pole", "Road": "road", "Tree": "tree"}
    same |= {"SignSymbol": "sign", "Fence": "fence", "Car": "car", "Pedestrian": "pedestrian", "Bicyclist": "cyclist"}
    for name, target in same.items():
        assert COLOURS[name] == (tuple(SPACE.colours[SPACE.index(target)].tolist()), target)


def test_colours_become_classes(tmp_path):
    content = original(tmp_path, ["0001TP_1", "0006R0_f2"])
    reader = CamVid(tmp_path, "all")
    assert reader.names == ("0001TP_1", "0006R0_f2")
    targets = [target for _, target in COLOURS.values()]
    for i, name in enumerate(reader.names):
        sample = reader[i]
        rgb, which = content[name]
        np.testing.assert_allclose(sample.image, rgb / 255, atol=1e-6)
        for row, column in np.ndindex(which.shape):
            target = targets[which[row, column]]
            assert sample.labels[row, column] == (IGNORE if target is None else SPACE.names.index(target))
        np.testing.assert_array_equal(reader.labels(i), sample.labels)


def test_lists_make_splits(tmp_path):
    original(tmp_path, ["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match=r"train\.txt not found.*'all' only"):
        CamVid(tmp_path)
    (tmp_path / "train.txt").write_text("c\na.png\n\n")
    (tmp_path / "val.txt").write_text("b")
    assert CamVid(tmp_path).names == ("c", "a")
    assert CamVid(tmp_path, "trainval").names == ("c", "a", "b")
    assert CamVid(tmp_path, "all").names == ("a", "b", "c")
    (tmp_path / "LabeledApproved_full/a_L.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a_L\.png not found \(1 of the 4 files"):
        CamVid(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a_L\.png not found \(1 of the 6 files"):
        CamVid(tmp_path, "all")
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(UserError, match="'val' has no frames"):
        CamVid(tmp_path, "val")


def test_stray_colours_are_void_and_many_are_an_error(tmp_path):
    original(tmp_path, ["a"], size=(20, 20))
    path = tmp_path / "LabeledApproved_full/a_L.png"
    sky = np.full((20, 20, 3), 128, np.uint8)
    # near the sky's colour, a multiple of 64 that is no name's, and beyond the largest channel
    sky[0, :3] = (129, 128, 128), (0, 192, 192), (255, 255, 255)
    write(path, sky)
    reader = CamVid(tmp_path, "all")
    labels = reader.labels(0)
    assert (labels[0, :3] == IGNORE).all()
    assert (labels == SPACE.index("sky")).sum() == 397
    sky[1] = (129, 128, 128)
    write(path, sky)
    with pytest.raises(UserError, match=r"a_L\.png: 6% of the pixels .* \[129, 128, 128\]"):
        reader[0]


def test_half_of_the_original_is_named(tmp_path):
    (tmp_path / "701_StillsRaw_full").mkdir()
    with pytest.raises(FileNotFoundError, match="LabeledApproved_full not found"):
        CamVid(tmp_path, "all")


# --- the real frames --------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_frames_open(shared_data):
    root = shared_data / "camvid"
    train, val, both = (CamVid(root, split) for split in ("train", "val", "trainval"))
    assert (len(train), len(val)) == (367, 101)  # SegNet's split
    assert train.names + val.names == both.names
    assert len(set(both.names)) == 468
    for sample in (train[0], train[366], val[50]):
        assert sample.image.shape == (360, 480, 3)
        assert set(np.unique(sample.labels)) <= {*range(11), IGNORE}
    # the road is below the sky in a driving car's view, so the maps are upright and the classes in order
    rows = np.arange(360)[:, None].repeat(480, 1)
    labels = train.labels(100)
    assert rows[labels == SPACE.index("sky")].mean() + 100 < rows[labels == SPACE.index("road")].mean()
