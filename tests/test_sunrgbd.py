"""SUN RGB-D in its own layout: depth bits, both kinds of labels, splits, cameras, and what is said of broken trees."""

import pickle
import shutil

import cv2
import h5py
import numpy as np
import pytest
import scipy.io

from enfilade.data import Reader, open_dataset
from enfilade.data.sunrgbd import SUNRGBD, cut, metres, read_seg, read_splits
from enfilade.errors import UserError

IGNORE = 255
HEIGHT, WIDTH = 24, 32
TILT = 0.3  # radians: the camera looks down

TEST = ("kv1/b3dodata/img_0063", "realsense/sa/2014_10_21-15")
TRAIN = (
    "kv1/NYUdata/NYU0001",
    "kv2/kinect2data/000065_2014-resize",
    "xtion/sun3ddata/home_at/scan1/0000012-000000402192",
)

# seg37list.mat
SEG37 = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter"),
    *("blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor_mat", "clothes", "ceiling"),
    *("books", "fridge", "tv", "paper", "towel", "shower_curtain", "box", "whiteboard", "person", "night_stand"),
    *("toilet", "sink", "lamp", "bathtub", "bag"),
)


def cells(values, column=False):
    """A MATLAB cell array of strings."""
    array = np.array([*values, None], object)[:-1]  # the None keeps NumPy from making strings of equal length
    return array.reshape((-1, 1) if column else (1, -1))


def write_seg(path, names, stored, column=False):
    scipy.io.savemat(path, {"names": cells(names, column), "seglabel": stored}, do_compression=True)


def make_frame(folder, seed, size=(HEIGHT, WIDTH), one_line=False):
    """One frame without labels; returns the depth images as they are stored."""
    rng = np.random.default_rng(seed)
    height, width = size
    stored = {}
    for kind in ("image", "depth", "depth_bfx", "extrinsics", "fullres"):
        (folder / kind).mkdir(parents=True)
    picture = cv2.resize(rng.integers(40, 216, (4, 5, 3), np.uint8), (width, height))
    cv2.imwrite(str(folder / "image/0000123.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 98])
    cv2.imwrite(str(folder / "fullres/0000123.jpg"), np.zeros((2 * height, 2 * width, 3), np.uint8))
    for kind in ("depth", "depth_bfx"):
        stored[kind] = rng.integers(0, 65536, size).astype(np.uint16)
        stored[kind][0, 0] = 0
        cv2.imwrite(str(folder / kind / "0000099.png"), stored[kind])
    end = " " if one_line else "\n"
    (folder / "intrinsics.txt").write_text(end.join(["30.5 0 15.25", "0 31 11.75", "0 0 1"]) + end)
    np.savetxt(folder / "extrinsics/20140101.txt", np.eye(4)[:3])
    c, s = np.cos(TILT), np.sin(TILT)
    np.savetxt(folder / "extrinsics/20150101.txt", [[1, 0, 0, 0], [0, c, s, 0], [0, -s, c, 0]], fmt="%.6f")
    return stored


def make_tree(root, test=TEST, train=TRAIN, seg=True, lists=True):
    """SUNRGBD/ and, with `lists`, the toolbox's allsplit.mat; with `seg` frames have two named regions and void."""
    stored = {}
    for i, name in enumerate((*test, *train)):
        folder = root / "SUNRGBD" / name
        stored[name] = make_frame(folder, i, one_line=i % 2 == 0)
        if seg:
            regions = np.zeros((HEIGHT, WIDTH), np.uint8)
            regions[:, 4:8], regions[:, 8:] = 1, 2
            write_seg(folder / "seg.mat", ["sofa", "mystery"], regions, column=i % 2 == 0)
    if lists:
        write_allsplit(root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", test, train)
    return stored


def write_allsplit(path, test, train):
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = {True: "/", False: ""}  # as in the official file: some paths end in a slash
    lists = {
        key: cells(f"/n/fs/sun3d/data/SUNRGBD/{name}{ending['xtion' in name]}" for name in names)
        for key, names in (("alltrain", train), ("alltest", test))
    }
    scipy.io.savemat(path, lists)


def write_seg2d(path, maps, dtype=np.float64):
    """SUNRGBD2Dseg.mat: HDF5, axes reversed, a column of references for the field of a struct array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for field in ("seglabel", "seglabelall"):
            column = file.create_dataset(f"SUNRGBD2Dseg/{field}", (len(maps), 1), h5py.ref_dtype)
            for i, labels in enumerate(maps):
                values = labels if field == "seglabel" else np.full_like(labels, 6000)
                column[i, 0] = file.create_dataset(f"#refs#/{field}{i}", data=values.T.astype(dtype)).ref


def official(rng):
    return rng.integers(0, 38, (HEIGHT, WIDTH)).astype(np.uint16)


# --- depth ------------------------------------------------------------------------------------------------------------


def test_every_depth_value_is_rotated_by_three_bits():
    stored = np.arange(65536, dtype=np.uint16)
    bits = [f"{v:016b}" for v in range(65536)]
    expected = [min(int(b[-3:] + b[:-3], 2) / 1000, 8) for b in bits]
    result = metres(stored.reshape(256, 256))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.ravel(), expected, rtol=1e-6)
    assert (result == 0).sum() == 1  # nothing but 0 is missing


def test_samples_are_converted(tmp_path):
    stored = make_tree(tmp_path)
    for inpainted, kind in ((False, "depth"), (True, "depth_bfx")):
        reader = SUNRGBD(tmp_path, "test", inpainted=inpainted)
        assert isinstance(reader, Reader)
        assert reader.names == TEST
        for i, name in enumerate(TEST):
            sample = reader[i]
            assert sample.name == name
            np.testing.assert_array_equal(sample.depth, metres(stored[name][kind]))
            written = cv2.imread(str(tmp_path / "SUNRGBD" / name / "image/0000123.jpg"))
            np.testing.assert_allclose(sample.image, written[..., ::-1] / 255, atol=1e-6)
            assert sample.image.dtype == sample.depth.dtype == np.float32


# --- camera -----------------------------------------------------------------------------------------------------------


def test_camera_and_pose(tmp_path):
    make_tree(tmp_path)
    for i in range(len(TEST)):  # intrinsics on one line and on three
        camera = SUNRGBD(tmp_path, "test")[i].camera
        np.testing.assert_allclose(camera.matrix, [[30.5, 0, 15.25], [0, 31, 11.75], [0, 0, 1]])
        assert (camera.width, camera.height) == (WIDTH, HEIGHT)
        # a camera that looks down by TILT: two metres ahead is also lower, and its right stays level
        ahead, right = camera.to_world(np.array([[0, 0, 2.0], [1.0, 0, 0]]))
        np.testing.assert_allclose(ahead, [0, 2 * np.cos(TILT), -2 * np.sin(TILT)], atol=1e-5)
        np.testing.assert_allclose(right, [1, 0, 0], atol=1e-5)
        assert np.linalg.det(camera.pose) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("intrinsics.txt", "1 2 3", "3 numbers: expected a 3x3"),
        ("intrinsics.txt", "30 x 15 0 31 11 0 0 1", "no number"),
        ("intrinsics.txt", "30 15 0 0 31 11 0 0 1", "rows fx 0 cx"),
        ("intrinsics.txt", "-30 0 15 0 31 11 0 0 1", "positive focal"),
        ("intrinsics.txt", "nan 0 15 0 31 11 0 0 1", "positive focal"),
        ("extrinsics/20150101.txt", "1 0 0 0 1 0 0 0 1", "9 numbers: expected a 3x4"),
        ("extrinsics/20150101.txt", "2 0 0 0 0 2 0 0 0 0 2 0", "no rotation"),
        ("extrinsics/20150101.txt", "-1 0 0 0 0 1 0 0 0 0 1 0", "no rotation"),
        ("extrinsics/20150101.txt", "nan 0 0 0 0 1 0 0 0 0 1 0", "no rotation"),
    ],
)
def test_bad_cameras_are_named(tmp_path, name, text, message):
    make_tree(tmp_path)
    (tmp_path / "SUNRGBD" / TEST[0] / name).write_text(text)
    reader = SUNRGBD(tmp_path, "test")
    with pytest.raises(UserError, match=rf"img_0063.{name}.*{message}"):
        reader[0]
    assert reader[1].camera is not None


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [False, True])
def test_names_of_seg_mat_become_classes(tmp_path, column):
    void = ["sofas", "floor mat", "night stand", "television", "refridgerator", "mystery", ""]
    names = [*SEG37, "shelf", " Chair ", *void]
    order = np.random.default_rng(0).permutation(len(names))
    stored = np.zeros((7, 8), np.uint8)  # 0 is void
    stored.flat[: len(names)] = 1 + np.arange(len(names))
    write_seg(tmp_path / "seg.mat", [names[i] for i in order], stored, column)
    expected = np.array([*range(37), 14, 4] + [IGNORE] * len(void))[order]
    labels = read_seg(tmp_path / "seg.mat")
    assert labels.dtype == np.uint8
    assert (labels.flat[: len(names)] == expected).all()
    assert (labels.flat[len(names) :] == IGNORE).all()


def test_a_single_name(tmp_path):
    write_seg(tmp_path / "seg.mat", ["bed"], np.eye(4, dtype=np.uint16))
    assert (read_seg(tmp_path / "seg.mat") == np.where(np.eye(4), 3, IGNORE)).all()


def test_labels_of_seg_mat(tmp_path):
    make_tree(tmp_path)
    reader = SUNRGBD(tmp_path, "test")
    expected = np.full((HEIGHT, WIDTH), IGNORE)
    expected[:, 4:8] = reader.space.index("sofa")
    for i in range(2):
        assert (reader[i].labels == expected).all()
    shutil.rmtree(tmp_path / "SUNRGBD" / TEST[0] / "image")
    assert (reader.labels(0) == expected).all()  # without a look at the picture


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_official_labels_go_before_seg_mat(tmp_path, dtype):
    make_tree(tmp_path)
    rng = np.random.default_rng(0)
    maps = {name: official(rng) for name in (*TEST, *TRAIN)}  # in the file's order: test, then training
    write_seg2d(tmp_path / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat", [*maps.values()], dtype)
    for split in ("test", "trainval", "all"):
        reader = SUNRGBD(tmp_path, split)
        reader.labels(0)  # opens the file: a loader's workers, which get a pickled reader, cannot take the handle
        copies = [reader, pickle.loads(pickle.dumps(reader))]
        for i, name in enumerate(reader.names):
            expected = np.where(maps[name] == 0, IGNORE, maps[name].astype(int) - 1)
            for copy in copies:
                assert (copy[i].labels == expected).all()
                assert (copy.labels(i) == expected).all()
                assert copy.labels(i).dtype == np.uint8


def test_official_labels_need_the_list_that_orders_them(tmp_path):
    make_tree(tmp_path, lists=False)
    elsewhere = tmp_path / "elsewhere/SUNRGBD2Dseg.mat"
    write_seg2d(elsewhere, [official(np.random.default_rng(0)) for _ in range(5)])
    with pytest.raises(FileNotFoundError, match=r"no traintestSUNRGBD/allsplit\.mat for .*SUNRGBD2Dseg\.mat"):
        SUNRGBD(tmp_path, "all", seg2d=elsewhere)
    write_allsplit(tmp_path / "mine.mat", TEST, TRAIN)
    reader = SUNRGBD(tmp_path, "train", seg2d=elsewhere, splits=tmp_path / "mine.mat")
    with h5py.File(elsewhere) as file:
        third = file[file["SUNRGBD2Dseg/seglabel"][2, 0]][...].T
    assert (reader.labels(0) == np.where(third == 0, IGNORE, third - 1)).all()


def test_frames_without_labels(tmp_path):
    make_tree(tmp_path, seg=False)
    reader = SUNRGBD(tmp_path, "trainval")
    assert reader[0].labels is None
    with pytest.raises(UserError, match=r"NYU0001 has no labels: neither seg\.mat nor"):
        reader.labels(0)
    # labels of some frames would quietly be dropped from batches
    write_seg(tmp_path / "SUNRGBD" / TRAIN[1] / "seg.mat", ["bed"], np.ones((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"NYU0001.seg\.mat not found \(2 of the 3 frames of sunrgbd/trainval"):
        SUNRGBD(tmp_path, "trainval")
    everything = SUNRGBD(tmp_path, "all")
    assert [everything[i].labels is not None for i in range(5)] == [name == TRAIN[1] for name in everything.names]


def test_bad_seg_mat_is_named(tmp_path):
    make_tree(tmp_path)
    path = tmp_path / "SUNRGBD" / TEST[0] / "seg.mat"
    reader = SUNRGBD(tmp_path, "test")
    write_seg(path, ["bed", "wall"], np.full((HEIGHT, WIDTH), 3, np.uint8))
    with pytest.raises(
        UserError, match=r"seg\.mat should hold a map of 0 \(void\) and 1\.\.2, one for each name, not 3"
    ):
        reader[0]
    write_seg(path, ["bed", "wall"], np.ones((HEIGHT, WIDTH + 1), np.uint8))
    with pytest.raises(UserError, match=r"seg\.mat is 33x24 at frame kv1/b3dodata/img_0063, but 0000123\.jpg 32x24"):
        reader[0]
    scipy.io.savemat(path, {"names": cells(["bed"])})
    with pytest.raises(UserError, match=r"img_0063.seg\.mat is no readable seg\.mat.*seglabel"):
        reader[0]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"img_0063.seg\.mat is no readable seg\.mat"):
        reader.labels(0)
    assert reader[1].labels is not None


def test_bad_official_labels_are_named(tmp_path):
    make_tree(tmp_path)
    path = tmp_path / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat"
    maps = [official(np.random.default_rng(0)) for _ in range(5)]
    maps[1][3, 4] = 38
    write_seg2d(path, maps)
    with pytest.raises(UserError, match=r"1\.\.37 at frame realsense/sa/2014_10_21-15, not 0\.\.38"):
        SUNRGBD(tmp_path, "test")[1]
    write_seg2d(path, [maps[0].T, *maps[1:]])
    with pytest.raises(UserError, match=r"SUNRGBD2Dseg\.mat is 24x32 at frame kv1/b3dodata/img_0063, but"):
        SUNRGBD(tmp_path, "test")[0]
    write_seg2d(path, maps[:4])
    with pytest.raises(UserError, match=r"lacks SUNRGBD2Dseg\.seglabel for the 5 frames of allsplit\.mat"):
        SUNRGBD(tmp_path, "test")[0]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"SUNRGBD2Dseg\.mat is truncated or no MATLAB 7\.3 file"):
        SUNRGBD(tmp_path, "test")[0]


# --- splits -----------------------------------------------------------------------------------------------------------


def test_the_cut_takes_the_end_of_every_source():
    sources = {"kv1/NYUdata": 30, "kv1/b3dodata": 20, "xtion/sun3ddata/home/scan": 40, "realsense/sh": 4}
    names = [f"{source}/{i:03d}" for source, count in sources.items() for i in range(count)]
    train, val = cut(names, "train"), cut(names, "val")
    assert sorted((*train, *val)) == sorted(names)
    assert cut(names, "trainval") == tuple(names)
    for part in (train, val):  # in the order of the list
        assert list(part) == [name for name in names if name in part]
    for source, count in sources.items():
        last = [name for name in names if name.startswith(source)][count - count // 10 :]
        assert [name for name in val if name.startswith(source)] == last


def test_splits_come_from_the_official_list(tmp_path):
    train = tuple(f"kv1/NYUdata/NYU{i:04d}" for i in (9, 2, 7, 4, 1, 8, 3, 6, 5, 10))
    make_tree(tmp_path, train=train)
    assert SUNRGBD(tmp_path, "trainval").names == train  # the list's order, not the folder's
    assert SUNRGBD(tmp_path, "train").names == train[:9]
    assert SUNRGBD(tmp_path, "val").names == train[9:]
    assert SUNRGBD(tmp_path, "test").names == TEST
    assert SUNRGBD(tmp_path, "all").names == tuple(sorted((*train, *TEST)))
    inner = SUNRGBD(tmp_path / "SUNRGBD", "test")  # the toolbox is beside it
    assert inner.names == TEST
    assert inner.name == "sunrgbd/test"
    assert open_dataset("sunrgbd", tmp_path, "val")[0].name == train[9]


def test_paths_with_slashes_at_their_end(tmp_path):
    write_allsplit(tmp_path / "allsplit.mat", TEST, TRAIN)
    raw = scipy.io.loadmat(tmp_path / "allsplit.mat", squeeze_me=True)["alltrain"]
    assert any(path.endswith("/") for path in raw)
    assert read_splits(tmp_path / "allsplit.mat") == (TRAIN, TEST)


def test_splits_that_are_not_there(tmp_path):
    make_tree(tmp_path, lists=False)
    assert len(SUNRGBD(tmp_path, "all")) == 5
    with pytest.raises(FileNotFoundError, match=r"allsplit\.mat in .*lists the frames of split 'test'.*split 'all'"):
        SUNRGBD(tmp_path, "test")
    with pytest.raises(UserError, match="no sunrgbd split 'trian'; did you mean 'train'"):
        SUNRGBD(tmp_path, "trian")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        SUNRGBD(tmp_path / "nowhere", "all")
    with pytest.raises(FileNotFoundError, match=r"mine\.mat not found: it should be the toolbox's traintestSUNRGBD"):
        SUNRGBD(tmp_path, "test", splits=tmp_path / "mine.mat")
    (tmp_path / "mine.mat").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"mine\.mat is no readable allsplit\.mat"):
        SUNRGBD(tmp_path, "test", splits=tmp_path / "mine.mat")
    scipy.io.savemat(tmp_path / "mine.mat", {"alltrain": cells(TRAIN)})
    with pytest.raises(UserError, match=r"mine\.mat is no readable allsplit\.mat.*alltest"):
        SUNRGBD(tmp_path, "test", splits=tmp_path / "mine.mat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="split 'all' has no frames"):
        SUNRGBD(tmp_path / "empty", "all")


# --- missing files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "depth", "extrinsics", "intrinsics.txt", ""])
def test_missing_files_are_named_at_once(tmp_path, kind):
    make_tree(tmp_path)
    for name in TRAIN[1:]:
        path = tmp_path / "SUNRGBD" / name / kind
        path.unlink() if path.is_file() else shutil.rmtree(path)
    first = rf"kinect2data.000065_2014-resize.{kind or 'image'}"
    with pytest.raises(FileNotFoundError, match=rf"{first}.* not found \(2 of the 3 frames of sunrgbd/trainval are"):
        SUNRGBD(tmp_path, "trainval")
    assert len(SUNRGBD(tmp_path, "test")) == 2
    if kind == "depth":
        assert len(SUNRGBD(tmp_path, "trainval", inpainted=True)) == 3


def test_leftovers_of_file_systems_are_passed_over(tmp_path):
    stored = make_tree(tmp_path)
    folder = tmp_path / "SUNRGBD" / TEST[0]
    for path in ("image/._0000123.jpg", "depth/._0000099.png", "extrinsics/._20150101.txt", "depth/Thumbs.db"):
        (folder / path).write_bytes(b"leftover")
    np.testing.assert_array_equal(SUNRGBD(tmp_path, "test")[0].depth, metres(stored[TEST[0]]["depth"]))


def test_files_of_one_frame_have_one_size(tmp_path):
    make_tree(tmp_path)
    path = tmp_path / "SUNRGBD" / TEST[0] / "depth/0000099.png"
    cv2.imwrite(str(path), np.ones((HEIGHT, WIDTH - 2), np.uint16))
    with pytest.raises(UserError, match=r"0000099\.png is 30x24 at frame .*img_0063, but 0000123\.jpg 32x24"):
        SUNRGBD(tmp_path, "test")[0]
    cv2.imwrite(str(path), np.ones((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(UserError, match=r"0000099\.png has uint8 depth: expected a PNG of 16 bits"):
        SUNRGBD(tmp_path, "test")[0]


# --- the real frames --------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_frames(shared_data):
    reader = SUNRGBD(shared_data / "sunrgbd", "all")
    assert len(reader) == 2
    painted = SUNRGBD(shared_data / "sunrgbd", "all", inpainted=True)
    for i in range(2):
        raw, full = reader[i], painted[i]
        assert raw.labels is None
        seen = raw.depth > 0
        assert 0.5 < seen.mean() < 1
        assert (full.depth > 0).all()
        # painting fills holes and smooths a little. With the bits in another order the two would not agree.
        assert np.median(np.abs(raw.depth - full.depth)[seen]) < 0.02
        assert 0.3 < np.median(full.depth) < 5
        assert raw.camera.fov_degrees == pytest.approx(62, abs=10)  # a Kinect's, cropped


@pytest.mark.shared
def test_the_pose_lays_the_floor_level(shared_data):
    """The carpet in front of the desks: a plane that the camera sees at an angle is level in the world."""
    reader = SUNRGBD(shared_data / "sunrgbd", "all", inpainted=True)
    sample = next(s for s in (reader[i] for i in range(2)) if s.name.startswith("2014-12-18"))
    points = sample.camera.unproject(sample.depth)[400:500, 250:600].reshape(-1, 3)

    def normal(points):
        return np.linalg.svd((points - points.mean(0))[::7], full_matrices=False)[2][2]

    world = sample.camera.to_world(points)
    assert abs(normal(points)[1]) < np.cos(np.radians(15))  # tilted in the camera's frame
    assert abs(normal(world)[2]) > np.cos(np.radians(2))
    assert -2 < world[:, 2].mean() < -0.8  # below a camera held by a person
    assert world[:, 2].std() < 0.02
