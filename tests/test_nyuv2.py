"""NYUv2 in both of its forms, and the way from one to the other."""

import json
import pickle

import cv2
import h5py
import numpy as np
import pytest
import scipy.io

from enfilade.data import Reader, open_dataset
from enfilade.data.nyuv2 import CAMERA, NYUv2, NYUv2Mat, read_mat, split_ids
from enfilade.data.prepare import prepare_hha, prepare_nyuv2
from enfilade.errors import UserError
from enfilade.ops.hha import hha

IGNORE = 255


def smooth(rng, height, width, channels):
    """A picture that JPEG keeps to within a few grey levels."""
    return cv2.resize(
        rng.integers(40, 216, (4, 5, channels), np.uint8), (width, height), interpolation=cv2.INTER_LINEAR
    )


def make_folder(root, ids, size=(48, 64), bits=16, endings="jpg", **lists):
    """A synthetic folder; returns what is in it: {id: (rgb, depth as stored, label as stored)}."""
    rng = np.random.default_rng(0)
    height, width = size
    content = {}
    for kind in ("rgb", "depth", "label40"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for i in ids:
        rgb = smooth(rng, height, width, 3)
        depth = rng.integers(0, 256 if bits == 8 else 9000, size).astype(np.uint8 if bits == 8 else np.uint16)
        label = rng.integers(0, 41, size).astype(np.uint8)
        cv2.imwrite(str(root / f"rgb/{i}.{endings}"), rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
        cv2.imwrite(str(root / f"depth/{i}.png"), depth)
        cv2.imwrite(str(root / f"label40/{i}.png"), label)
        content[i] = rgb, depth, label
    for name, listed in (lists or {"train": ids}).items():
        (root / f"{name}.txt").write_text("\n".join(listed) + "\n")
    return content


def assert_same_picture(a, b, ending):
    """JPEG with halved chroma moves these smooth pictures by two levels on average; swapped channels move them by
    some thirty."""
    assert np.abs(a - b).mean() < (4 / 255 if ending == "jpg" else 1e-6)


IDS = [f"{i:04d}" for i in range(3, 13)]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endings", ["jpg", "png"])
def test_samples_are_converted(tmp_path, endings):
    content = make_folder(tmp_path, IDS, endings=endings)
    reader = NYUv2(tmp_path, "trainval")
    assert isinstance(reader, Reader)
    assert reader.names == tuple(IDS)
    assert len(reader) == len(IDS)
    for i in (0, 7):
        sample = reader[i]
        rgb, depth, label = content[IDS[i]]
        assert sample.name == IDS[i]
        assert sample.image.dtype == np.float32
        assert_same_picture(sample.image, rgb / 255, endings)
        np.testing.assert_allclose(sample.depth, depth / 1000, atol=1e-6)
        expected = label.astype(int) - 1
        expected[(label == 0) | (label == 40)] = IGNORE
        assert (sample.labels == expected).all()
        assert sample.labels.dtype == np.uint8


def test_eight_bit_depth(tmp_path):
    content = make_folder(tmp_path, IDS[:2], bits=8)
    stored = content[IDS[0]][1]
    depth = NYUv2(tmp_path, "trainval")[0].depth
    assert (depth[stored == 0] == 0).all()
    np.testing.assert_allclose(depth[stored > 0], (stored[stored > 0] + 0.5) / 25.5, rtol=1e-6)
    assert depth.dtype == np.float32


def test_otherprop_is_ignored_only_where_it_cannot_be_told_from_void(tmp_path):
    content = make_folder(tmp_path, IDS, train=IDS[:8], test=IDS[8:])
    kept = (content[IDS[0]][2] == 40).sum()
    assert kept > 0
    assert NYUv2(tmp_path, "train").ignored == (39,)
    assert (NYUv2(tmp_path, "train")[0].labels == 39).sum() == 0
    assert NYUv2(tmp_path, "test").ignored == ()
    assert (NYUv2(tmp_path, "test")[0].labels == 39).sum() == (content[IDS[8]][2] == 40).sum()
    # said by the caller
    reader = NYUv2(tmp_path, "train", ignored=(0, 5))
    assert reader.ignored == (0, 5)
    assert not np.isin(reader[0].labels, (0, 5)).any()
    assert (reader[0].labels == 39).sum() == kept
    # said by the folder
    (tmp_path / "dataset.json").write_text('{"void": "exact"}')
    reader = NYUv2(tmp_path, "train")
    assert reader.ignored == ()
    assert (reader[0].labels == 39).sum() == kept
    with pytest.raises(UserError, match=r"ignored label 40"):
        NYUv2(tmp_path, ignored=(40,))


@pytest.mark.parametrize("text", ["{", "[]", '{"depth": "mm"}'])
def test_bad_dataset_json_is_named(tmp_path, text):
    make_folder(tmp_path, IDS)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        NYUv2(tmp_path)


@pytest.mark.parametrize(("count", "held_out"), [(795, 145), (794, 143), (100, 18), (2, 1)])
def test_the_cut_is_contiguous_and_complete(count, held_out):
    ids = [str(i) for i in range(count)]
    train, val = split_ids(ids, "train"), split_ids(ids, "val")
    assert len(val) == held_out
    assert train + val == split_ids(ids, "trainval") == tuple(ids)


def test_own_validation_list_wins(tmp_path):
    make_folder(tmp_path, IDS, train=IDS[:4], val=IDS[4:9])
    assert NYUv2(tmp_path, "train").names == tuple(IDS[:4])
    assert NYUv2(tmp_path, "val").names == tuple(IDS[4:9])
    assert NYUv2(tmp_path, "trainval").names == tuple(IDS[:9])


def test_splits_that_are_not_there(tmp_path):
    make_folder(tmp_path, IDS)
    with pytest.raises(FileNotFoundError, match=r"test\.txt"):
        NYUv2(tmp_path, "test")
    with pytest.raises(UserError, match="did you mean 'train'"):
        NYUv2(tmp_path, "trian")
    with pytest.raises(FileNotFoundError, match="no folder"):
        NYUv2(tmp_path / "nowhere")
    (tmp_path / "test.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no frames"):
        NYUv2(tmp_path, "test")
    (tmp_path / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt"):
        NYUv2(tmp_path)


def test_missing_files_are_named_at_once(tmp_path):
    make_folder(tmp_path, IDS)
    for name in ("depth/0005.png", "label40/0004.png", "rgb/0006.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"0004\.png.*3 of the 30"):
        NYUv2(tmp_path, "trainval")
    with pytest.raises(FileNotFoundError, match=r"hha.0011\.png"):
        NYUv2(tmp_path, "val", hha=True)


def test_mismatching_and_damaged_files_are_named_when_read(tmp_path):
    make_folder(tmp_path, IDS)
    cv2.imwrite(str(tmp_path / "depth/0003.png"), np.ones((48, 60), np.uint16))
    cv2.imwrite(str(tmp_path / "label40/0004.png"), np.full((48, 64), 41, np.uint8))
    (tmp_path / "rgb/0005.jpg").write_bytes((tmp_path / "rgb/0005.jpg").read_bytes()[:-200])
    (tmp_path / "label40/0006.png").write_bytes(b"")
    cv2.imwrite(str(tmp_path / "depth/0007.png"), np.ones((48, 64, 3), np.uint8))
    (tmp_path / "depth/0008.png").write_bytes(b"\x89PNG no more IEND")
    reader = NYUv2(tmp_path, "trainval")
    for i, message in enumerate(
        [
            r"depth.0003\.png is 60x48, but 0003\.jpg 64x48",
            r"label40.0004\.png holds label 41",
            r"rgb.0005\.jpg is truncated",
            r"label40.0006\.png is empty",
            r"depth.0007\.png has 3 channels",
            r"depth.0008\.png is no readable image",
        ]
    ):
        with pytest.raises(UserError, match=message):
            reader[i]
    assert reader[6].depth is not None


def test_camera_and_crop_belong_to_the_full_size(tmp_path):
    make_folder(tmp_path / "full", IDS[:2], size=(480, 640))
    reader = NYUv2(tmp_path / "full", "trainval")
    assert reader[0].camera == CAMERA
    rows, columns = reader.score_crop
    assert reader[0].depth[rows, columns].shape == (426, 560)
    make_folder(tmp_path / "half", IDS[:2], size=(240, 320))
    reader = NYUv2(tmp_path / "half", "trainval")
    assert reader.score_crop is None
    assert reader[0].camera == CAMERA.resized(320, 240)


def test_palette_labels_give_indices(tmp_path):
    from PIL import Image

    content = make_folder(tmp_path, IDS[:2])
    label = content[IDS[0]][2]
    image = Image.fromarray(label, "L").convert("P")
    image.putdata(label.reshape(-1).tolist())
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
    image.save(tmp_path / f"label40/{IDS[0]}.png")
    expected = np.where((label == 0) | (label == 40), IGNORE, label.astype(int) - 1)
    assert (NYUv2(tmp_path, "trainval")[0].labels == expected).all()


def test_hha_keeps_its_channel_order(tmp_path):
    make_folder(tmp_path, IDS[:2])
    (tmp_path / "hha").mkdir()
    hha = np.zeros((48, 64, 3), np.uint8) + np.array([10, 120, 230], np.uint8)
    for i in IDS[:2]:
        cv2.imwrite(str(tmp_path / f"hha/{i}.png"), hha[..., ::-1])
    np.testing.assert_allclose(NYUv2(tmp_path, "trainval", hha=True)[0].hha, hha / 255, atol=1e-6)
    assert NYUv2(tmp_path, "trainval")[0].hha is None


# --- the official .mat ------------------------------------------------------------------------------------------------

FRAMES = 6


@pytest.fixture
def mat(tmp_path):
    """A file of the structure of nyu_depth_v2_labeled.mat with its two companions, and what it holds."""
    rng = np.random.default_rng(0)
    height, width = 24, 32
    images = np.stack([smooth(rng, height, width, 3) for _ in range(FRAMES)])
    depths = rng.uniform(0.7, 9.9, (FRAMES, height, width)).astype(np.float32)
    raw_depths = np.where(rng.random(depths.shape) < 0.2, 0, depths).astype(np.float32)
    raw_labels = rng.integers(0, 895, depths.shape).astype(np.uint16)
    instances = rng.integers(0, 5, depths.shape).astype(np.uint8)
    path = tmp_path / "official" / "nyu_depth_v2_labeled.mat"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:  # MATLAB writes its axes reversed
        file["images"] = images.transpose(0, 3, 2, 1)
        for key, value in (("depths", depths), ("rawDepths", raw_depths), ("labels", raw_labels)):
            file[key] = value.transpose(0, 2, 1)
        file["instances"] = instances.transpose(0, 2, 1)
    train, test = np.array([[2], [3], [5], [6]], np.uint16), np.array([[1], [4]], np.uint16)
    scipy.io.savemat(path.with_name("splits.mat"), {"trainNdxs": train, "testNdxs": test})
    to40 = rng.integers(1, 41, 894).astype(np.uint8)
    scipy.io.savemat(path.with_name("classMapping40.mat"), {"mapClass": to40[None]})
    labels = np.where(raw_labels == 0, IGNORE, to40[np.maximum(raw_labels, 1).astype(int) - 1] - 1)
    return path, {
        "images": images,
        "depths": depths,
        "raw": raw_depths,
        "894": raw_labels,
        "40": labels,
        "instances": instances,
    }


def test_read_mat_puts_the_axes_right(mat):
    path, truth = mat
    frames = list(read_mat(path))
    assert [f.index for f in frames] == [1, 2, 3, 4, 5, 6]
    for i, frame in enumerate(frames):
        assert (frame.image == truth["images"][i]).all()
        assert (frame.depth == truth["depths"][i]).all()
        assert (frame.labels == truth["894"][i]).all()
        assert (frame.instances == truth["instances"][i]).all()
    (frame,) = read_mat(path, [4], raw=True)
    assert (frame.depth == truth["raw"][3]).all()


def test_mat_reader(mat):
    path, truth = mat
    reader = open_dataset("nyuv2", path, "test")
    assert isinstance(reader, NYUv2Mat)
    assert isinstance(reader, Reader)
    assert reader.names == ("0001", "0004")
    assert reader.ignored == ()
    sample = reader[1]
    np.testing.assert_allclose(sample.image, truth["images"][3] / 255, atol=1e-6)
    assert (sample.depth == truth["depths"][3]).all()
    assert (sample.labels == truth["40"][3]).all()
    assert sample.name == "0004"
    assert sample.camera == CAMERA.resized(32, 24)
    assert NYUv2Mat(path, "trainval").names == ("0002", "0003", "0005", "0006")
    assert NYUv2Mat(path, "train").names + NYUv2Mat(path, "val").names == NYUv2Mat(path, "trainval").names
    assert (NYUv2Mat(path, "val", raw=True)[0].depth == truth["raw"][5]).all()


def test_mat_reader_survives_pickling(mat):
    # a loader with spawned workers pickles the reader; an HDF5 handle cannot be
    reader = NYUv2Mat(mat[0], "train")
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy[0].depth == reader[0].depth).all()


@pytest.mark.parametrize("image", ["png", "jpg"])
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_prepared_folder_reads_like_the_mat(mat, tmp_path, split, image):
    path, _ = mat
    out = prepare_nyuv2(path, tmp_path / "out", image=image)
    direct, folder = NYUv2Mat(path, split), NYUv2(out, split)
    assert folder.names == direct.names
    assert folder.ignored == direct.ignored == ()
    for a, b in zip(direct, folder):
        assert_same_picture(a.image, b.image, image)
        assert np.abs(a.depth - b.depth).max() < 0.501e-3  # rounded to whole millimetres, and float32 at 10 m
        assert (a.labels == b.labels).all()
        assert a.camera == b.camera


def test_prepare_writes_the_sensors_depth(mat, tmp_path):
    path, truth = mat
    out = prepare_nyuv2(path, tmp_path / "out", raw_depth=True)
    depth = cv2.imread(str(out / "depth/0002.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16
    assert ((depth == 0) == (truth["raw"][1] == 0)).all()
    assert json.loads((out / "dataset.json").read_text())["depth_source"] == "raw"


def test_prepare_goes_on_where_it_stopped(mat, tmp_path, monkeypatch):
    import enfilade.data.prepare as prepare

    path, _ = mat
    out = tmp_path / "out"
    write, written = prepare._write, []

    def interrupted(frame, paths, to40):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(frame.index)
        write(frame, paths, to40)

    monkeypatch.setattr(prepare, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_nyuv2(path, out)
    with pytest.raises(FileNotFoundError, match=r"train\.txt.*run again"):
        NYUv2(out)
    with pytest.raises(UserError, match="other options"):
        prepare_nyuv2(path, out, raw_depth=True)
    before = {p: p.stat().st_mtime_ns for p in (out / "rgb").iterdir()}
    monkeypatch.setattr(prepare, "_write", write)
    prepare_nyuv2(path, out)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(NYUv2(out, "trainval")) + len(NYUv2(out, "test")) == FRAMES
    assert not [p for p in out.rglob("*") if p.suffix in (".part", ".started")]
    # and a finished folder is left as it is
    prepare_nyuv2(path, out)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_prepare_keeps_off_other_peoples_folders(mat, tmp_path):
    make_folder(tmp_path / "mine", IDS)
    with pytest.raises(UserError, match="not an empty folder"):
        prepare_nyuv2(mat[0], tmp_path / "mine")
    with pytest.raises(UserError, match="'jpg' or 'png'"):
        prepare_nyuv2(mat[0], tmp_path / "out", image="gif")


def test_bad_mat_files_are_named(mat, tmp_path):
    path, _ = mat
    with pytest.raises(FileNotFoundError, match=r"none\.mat"):
        next(read_mat(tmp_path / "none.mat"))
    cut = path.with_name("cut.mat")
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.mat is truncated"):
        prepare_nyuv2(cut, tmp_path / "out")
    (path.with_name("text.mat")).write_text("MATLAB 5.0")
    with pytest.raises(UserError, match=r"text\.mat"):
        NYUv2Mat(path.with_name("text.mat"))
    with h5py.File(path.with_name("other.mat"), "w") as file:
        file["images"] = np.zeros((1, 3, 4, 4), np.uint8)
    with pytest.raises(UserError, match=r"other\.mat lacks the variable 'depths'"):
        NYUv2Mat(path.with_name("other.mat"))
    with h5py.File(path, "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros((FRAMES, 32, 23), np.uint16)
    with pytest.raises(UserError, match="differ in size"):
        NYUv2Mat(path)


def test_companions_of_the_mat(mat, tmp_path):
    path, _ = mat
    other = tmp_path / "elsewhere.mat"
    path.with_name("splits.mat").rename(other)
    with pytest.raises(FileNotFoundError, match=r"splits\.mat"):
        NYUv2Mat(path)
    assert len(NYUv2Mat(path, "test", splits=other)) == 2
    scipy.io.savemat(other, {"trainNdxs": np.array([[1, 7]]), "testNdxs": np.array([[2]])})
    with pytest.raises(UserError, match="does not fit a file of 6 frames"):
        NYUv2Mat(path, splits=other)
    other.write_text("no")
    with pytest.raises(UserError, match=r"elsewhere\.mat"):
        NYUv2Mat(path, splits=other)


# --- open_dataset -----------------------------------------------------------------------------------------------------


def test_open_dataset(tmp_path):
    make_folder(tmp_path, IDS)
    reader = open_dataset("nyuv2", tmp_path, "val", ignored=())
    assert reader.name == "nyuv2/val"
    assert len(reader) == 2
    with pytest.raises(UserError, match="did you mean 'nyuv2'"):
        open_dataset("nyu2", tmp_path)
    with pytest.raises(UserError, match="needs the folder"):
        open_dataset("nyuv2")
    with pytest.raises(UserError, match="take no folder"):
        open_dataset("rooms", tmp_path)
    with pytest.raises(UserError, match="no split 'trainval'"):
        open_dataset("rooms", split="trainval")


# --- the real frames --------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_frames_open(shared_data):
    root = shared_data / "nyuv2"
    train, val, both = (NYUv2(root, split) for split in ("train", "val", "trainval"))
    assert (len(train), len(val), len(both)) == (650, 145, 795)
    assert train.names + val.names == both.names
    official = scipy.io.loadmat(root / "meta/splits.mat")["trainNdxs"].reshape(-1)
    assert [int(name) for name in both.names] == sorted(official.tolist())
    for sample in (both[0], both[794]):
        assert sample.image.shape == (480, 640, 3)
        assert 0.4 < sample.depth.min() < sample.depth.max() < 10.1  # a Kinect's range, in-painted
        assert set(np.unique(sample.labels)) <= {*range(39), IGNORE}


@pytest.mark.shared
def test_real_depth_of_8_and_16_bits_agree(shared_data):
    # 8 bits floor at steps of 1/25.5 m, of which the reader returns the middle. The millimetres come from another copy
    # of the data, which is up to 5 mm nearer. Without the half step the mean would be off by 20 mm.
    root = shared_data / "nyuv2"
    reader = NYUv2(root, "trainval")
    for path in sorted((root / "depth_mm").glob("*.png"))[:5]:
        millimetres = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        difference = reader[reader.names.index(path.stem)].depth - millimetres / 1000
        assert np.abs(difference).max() < 0.5 / 25.5 + 0.0055
        assert abs(difference.mean()) < 0.004


@pytest.mark.shared
def test_real_sixteen_bit_depth_reads(shared_data, tmp_path):
    # the same frame with its millimetre depth in place of the 8-bit one
    root = shared_data / "nyuv2"
    for kind, source in (("rgb", "rgb/0003.jpg"), ("depth", "depth_mm/0003.png"), ("label40", "label40/0003.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / source.rpartition("/")[2]).write_bytes((root / source).read_bytes())
    (tmp_path / "train.txt").write_text("0003\n")
    coarse, fine = NYUv2(root, "trainval")[0], NYUv2(tmp_path, "trainval")[0]
    assert np.abs(coarse.depth - fine.depth).max() < 0.5 / 25.5 + 0.0055
    assert (coarse.labels == fine.labels).all()


def test_prepared_hha_is_read_and_not_made_twice(tmp_path):
    make_folder(tmp_path, IDS[:2], size=(48, 64))
    assert prepare_hha(tmp_path) == 2
    sample = NYUv2(tmp_path, "trainval", hha=True)[0]
    levels = np.rint(sample.hha * 255)  # png is lossless
    np.testing.assert_array_equal(levels, hha(sample.depth, sample.camera))
    assert prepare_hha(tmp_path) == 0
