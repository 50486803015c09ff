"""VOC 2012: the official lists, SBD's list in both spellings, and what is said of broken folders."""

import cv2
import numpy as np
import PIL.Image
import pytest

from enfilade.data import Reader, open_dataset
from enfilade.data.voc2012 import VOC2012
from enfilade.errors import UserError
from enfilade.labels import SPACES

IGNORE = 255
IDS = [f"2007_{i:06d}" for i in range(32, 40)]


def picture(rng, size):
    return cv2.resize(rng.integers(40, 216, (4, 5, 3), np.uint8), size[::-1])


def label_image(rng, size):
    labels = rng.integers(0, 21, size).astype(np.uint8)
    labels[0, :3] = IGNORE, 0, 20
    return labels


def write_labels(path, labels, palette=True):
    """VOC's own labels are palette images, SBD's are grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.fromarray(labels)
    if palette:
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
        assert image.mode == "P"
    image.save(path)


def make_folder(root, ids=IDS, **lists):
    """A folder of sizes that differ, as in VOC; returns the labels by id."""
    rng = np.random.default_rng(0)
    (root / "JPEGImages").mkdir(parents=True)
    content = {}
    for i, name in enumerate(ids):
        size = (20 + i, 30 - i)
        content[name] = label_image(rng, size)
        cv2.imwrite(str(root / f"JPEGImages/{name}.jpg"), picture(rng, size))
        write_labels(root / f"SegmentationClass/{name}.png", content[name])
    cv2.imwrite(str(root / "JPEGImages/2012_000001.jpg"), picture(rng, (20, 20)))  # most images have no labels
    for name, listed in lists.items():
        put_list(root, f"{name}.txt", listed)
    return content


def put_list(root, name, lines):
    path = root / "ImageSets/Segmentation" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def test_samples(tmp_path):
    content = make_folder(tmp_path)
    reader = VOC2012(tmp_path, "all")
    assert isinstance(reader, Reader)
    assert reader.names == tuple(IDS)
    assert reader.space is SPACES["voc21"]
    assert (reader.ignored, reader.score_crop) == ((), None)
    for i, name in enumerate(IDS):
        sample = reader[i]
        stored = cv2.imread(str(tmp_path / f"JPEGImages/{name}.jpg"))
        np.testing.assert_allclose(sample.image, stored[..., ::-1] / 255, atol=1e-6)
        assert sample.name == name
        assert sample.labels.dtype == np.uint8
        assert (sample.labels == content[name]).all()
        assert sample.depth is sample.camera is None


def test_labels_alone(tmp_path):
    content = make_folder(tmp_path)
    reader = VOC2012(tmp_path, "all")
    (tmp_path / f"JPEGImages/{IDS[2]}.jpg").unlink()
    assert (reader.labels(2) == content[IDS[2]]).all()


@pytest.mark.parametrize("inside", ["", "VOC2012"])
def test_official_splits_of_the_folder_or_its_parent(tmp_path, inside):
    order = [IDS[3], IDS[0], IDS[5]]
    make_folder(tmp_path / inside, train=order, val=IDS[6:], trainval=[*order, *IDS[6:]])
    assert VOC2012(tmp_path, "train").names == tuple(order)
    assert VOC2012(tmp_path, "val").names == tuple(IDS[6:])
    assert open_dataset("voc2012", tmp_path, "trainval").names == (*order, *IDS[6:])
    assert VOC2012(tmp_path, "all").names == tuple(IDS)


# --- the augmented list -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trainaug.txt", "train_aug.txt"])
def test_augmented_ids(tmp_path, name):
    content = make_folder(tmp_path, val=IDS[6:])
    more = label_image(np.random.default_rng(5), content[IDS[1]].shape)
    write_labels(tmp_path / f"SegmentationClassAug/{IDS[1]}.png", more, palette=False)
    put_list(tmp_path, name, IDS[:3])
    reader = VOC2012(tmp_path, "aug")
    assert reader.names == tuple(IDS[:3])
    assert (reader[1].labels == more).all()  # SBD's, where it has some
    for i in (0, 2):
        assert (reader[i].labels == content[IDS[i]]).all()


def test_augmented_pairs(tmp_path):
    content = make_folder(tmp_path / "VOC2012", val=IDS[6:])
    more = label_image(np.random.default_rng(5), content[IDS[1]].shape)
    write_labels(tmp_path / f"VOC2012/SegmentationClassAug/{IDS[1]}.png", more, palette=False)
    lines = [
        f"/JPEGImages/{IDS[1]}.jpg /SegmentationClassAug/{IDS[1]}.png",
        f"JPEGImages/{IDS[0]}.jpg SegmentationClass/{IDS[0]}.png",
    ]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    reader = VOC2012(tmp_path, "aug", aug_list=tmp_path / "mine.txt")
    assert reader.names == (IDS[1], IDS[0])
    assert (reader[0].labels == more).all()
    assert (reader[1].labels == content[IDS[0]]).all()
    (tmp_path / "mine.txt").write_text("a b c\n")
    with pytest.raises(UserError, match=r"mine\.txt: 'a b c' is neither an id nor the two paths"):
        VOC2012(tmp_path, "aug", aug_list=tmp_path / "mine.txt")


@pytest.mark.parametrize("form", ["{0}", "/JPEGImages/{0}.jpg /SegmentationClass/{0}.png"])
def test_validation_frames_in_the_augmented_list_are_refused(tmp_path, form):
    """SBD divides VOC's images otherwise: its own lists hold frames of VOC's validation set."""
    make_folder(tmp_path, val=IDS[6:], trainaug=[form.format(i) for i in IDS])
    with pytest.raises(UserError, match=rf"trainaug\.txt lists '{IDS[6]}', which is in val\.txt \(2 such ids\)"):
        VOC2012(tmp_path, "aug")


def test_aug_list_belongs_to_its_split(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(UserError, match="aug_list is the list of split 'aug', and does nothing for 'all'"):
        VOC2012(tmp_path, "all", aug_list=tmp_path / "mine.txt")
    with pytest.raises(FileNotFoundError, match=r"mine\.txt not found: it lists the frames of split 'aug'"):
        VOC2012(tmp_path, "aug", aug_list=tmp_path / "mine.txt")


# --- what is missing or wrong -----------------------------------------------------------------------------------------


def test_folders_and_lists_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"JPEGImages not found: give VOC2012, or the VOCdevkit"):
        VOC2012(tmp_path / "nowhere", "all")
    make_folder(tmp_path, val=[])
    with pytest.raises(FileNotFoundError, match=r"train\.txt not found.*split 'all' only"):
        VOC2012(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"trainaug\.txt not found.*it comes apart from VOC 2012"):
        VOC2012(tmp_path, "aug")
    with pytest.raises(UserError, match="split 'val' has no frames"):
        VOC2012(tmp_path, "val")
    with pytest.raises(UserError, match="no voc2012 split 'tain'; did you mean 'train'"):
        VOC2012(tmp_path, "tain")


def test_missing_files_are_named_at_once(tmp_path):
    make_folder(tmp_path, train=[*IDS, "2008_000001", "2012_000001"])
    (tmp_path / f"JPEGImages/{IDS[4]}.jpg").unlink()
    message = rf"{IDS[4]}\.jpg not found \(4 of the 20 files of voc2012/train are missing\)"
    with pytest.raises(FileNotFoundError, match=message):
        VOC2012(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{IDS[4]}\.jpg not found \(1 of the 16 files of voc2012/all are"):
        VOC2012(tmp_path, "all")


def test_bad_labels_are_named(tmp_path):
    content = make_folder(tmp_path)
    reader = VOC2012(tmp_path, "all")
    path = tmp_path / f"SegmentationClass/{IDS[0]}.png"
    labels = content[IDS[0]].copy()
    labels[5, 5] = 21
    write_labels(path, labels)
    with pytest.raises(UserError, match=rf"{IDS[0]}\.png holds label 21: expected 0\.\.20 and 255"):
        reader.labels(0)
    cv2.imwrite(str(path), np.zeros((20, 30), np.uint16))
    with pytest.raises(UserError, match=rf"{IDS[0]}\.png has uint16 labels"):
        reader[0]
    cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(UserError, match=rf"{IDS[0]}\.png has 3 channels"):
        reader[0]
    write_labels(path, content[IDS[0]][:-1])
    with pytest.raises(UserError, match=rf"{IDS[0]}\.png is 30x19, but {IDS[0]}\.jpg 30x20"):
        reader[0]
    assert (reader[1].labels == content[IDS[1]]).all()


# --- the real pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_labels_are_drawn_in_the_colours_of_their_own_palette(shared_data):
    folder = shared_data / "voc2012"
    reader = VOC2012(folder, "all")
    assert len(reader) == 9
    for i, name in enumerate(reader.names):
        sample = reader[i]
        with PIL.Image.open(folder / f"SegmentationClass/{name}.png") as image:
            colours = np.asarray(image.convert("RGB"))
        known = sample.labels != IGNORE
        assert (reader.space.colourise(sample.labels)[known] == colours[known]).all()
        assert 0 < (~known).mean() < 0.2  # the border of every object
        assert (sample.labels > 0)[known].any()
    with pytest.raises(FileNotFoundError, match=r"val\.txt not found"):
        VOC2012(folder, "val")
