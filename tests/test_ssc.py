"""SSCNet's files: round trips, a file written by hand, what is said of broken ones, and the real frame."""

import struct

import cv2
import numpy as np
import pytest

from enfilade.camera import Camera
from enfilade.data import Reader, ssc
from enfilade.errors import UserError
from enfilade.labels import SPACES, mapping
from enfilade.types import LabelVolume, Sample

POSE = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.25], [0, 0, 0, 1]])
ORIGIN = np.array([-2.5, 0.5, -0.05])


def volume(seed=0, most=12):
    """Runs of all lengths: boxes of classes in unknown space."""
    rng = np.random.default_rng(seed)
    labels = np.full(ssc.SHAPE, 255, np.uint8)
    labels[20:220, 3:120, 10:230] = 0
    for label in range(most):
        low = rng.integers(0, [200, 110, 200])
        high = low + rng.integers(1, 40, 3)
        labels[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = label
    labels[0, 0, :7] = 3
    labels[-1, -1, -1] = 5
    return LabelVolume(labels, ORIGIN)


def handmade(path, runs, header=None):
    """A .bin by the letter of the format."""
    header = header or struct.pack("<3f", *ORIGIN) + struct.pack("<16f", *POSE.reshape(-1))
    path.write_bytes(header + b"".join(struct.pack("<II", *run) for run in runs))
    return path


FULL = 240 * 144 * 240


def test_bin_by_hand(tmp_path):
    """index = x * 144 * 240 + y * 240 + z, the last axis fastest."""
    path = handmade(tmp_path / "a.bin", [(255, 1), (0, 238), (36, 2), (9, 240 * 144 - 241), (2, FULL - 240 * 144)])
    found, pose = ssc.read_bin(path, raw=True)
    assert found.labels[0, 0, 0] == 255
    assert (found.labels[0, 0, 1:239] == 0).all()
    assert (found.labels[0, 0, 239], found.labels[0, 1, 0]) == (36, 36)
    assert (found.labels[0, 1, 1:] == 9).all()
    assert (found.labels[1:] == 2).all()
    np.testing.assert_allclose(found.origin, ORIGIN, atol=1e-7)  # float32
    np.testing.assert_array_equal(pose, POSE)
    names = SPACES["ssc12"].names
    assert names[ssc.read_bin(path)[0].labels[0, 1, 5]] == "table"  # SUNCG's 9 is table
    assert names[ssc.read_bin(path)[0].labels[0, 0, 239]] == "objects"


def test_bin_round_trip(tmp_path):
    for raw, most in ((False, 12), (True, 37)):
        given = volume(most=most)
        ssc.write_bin(tmp_path / "a.bin", given, POSE, raw=raw)
        found, pose = ssc.read_bin(tmp_path / "a.bin", raw=raw)
        np.testing.assert_array_equal(found.labels, given.labels)
        np.testing.assert_allclose(found.origin, ORIGIN, atol=1e-7)
        np.testing.assert_array_equal(pose, POSE)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_classes_map_as_pixels_do():
    """The two ways from NYU's names to ssc12, over SUNCG's classes and in one step, agree on names that both have."""
    direct, nyu40 = mapping("nyu40", "ssc12"), SPACES["nyu40"]
    suncg = {"bathtub": 28, "night stand": 27, "toilet": 31, "door": 5, "bookshelf": 11, "desk": 17, "pillow": 22}
    for name, number in suncg.items():
        assert ssc._TO_SSC12[number] == direct[nyu40.index(name)], name


@pytest.mark.shared
def test_classes_are_those_of_the_official_file(shared_data):
    import scipy.io

    content = scipy.io.loadmat(shared_data / "nyu_ssc/meta/ClassMapping.mat", squeeze_me=True)
    renamed = {"objs": "objects", "furn": "furniture"}
    assert [renamed.get(name, name) for name in content["map36to11"].tolist()] == list(ssc.SUNCG36)
    assert [renamed.get(name, name) for name in content["elevenClass"].tolist()] == list(SPACES["ssc12"].names[1:])


@pytest.mark.parametrize(
    ("runs", "header", "sentence"),
    [
        ([], None, "has 76 bytes, not 76 and a multiple of 8: it is cut off"),
        ([(0, FULL - 1)], None, "holds 8294399 voxels, expected 8294400"),
        ([(0, 2**32 - 1), (0, 2**32 - 1)], None, "holds 8589934590 voxels, expected 8294400"),
        ([(37, FULL)], None, r"holds label 37: expected 0\.\.36 and 255"),
        ([(0, FULL)], bytes(76), "its header holds no camera-to-world pose"),
        ([(0, FULL)], struct.pack("<19f", *[np.nan] * 19), "its header holds no camera-to-world pose"),
    ],
)
def test_damaged_bins_are_told(tmp_path, runs, header, sentence):
    path = handmade(tmp_path / "NYU0001_0000.bin", runs, header)
    with pytest.raises(UserError, match=sentence) as caught:
        ssc.read_bin(path)
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.bin not found"):
        ssc.read_bin(tmp_path / "none.bin")


def test_a_bin_cut_anywhere_is_told(tmp_path):
    ssc.write_bin(tmp_path / "a.bin", volume(), POSE)
    whole = (tmp_path / "a.bin").read_bytes()
    for length in (0, 10, 76, 80, 84, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.bin").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"b\.bin"):
            ssc.read_bin(tmp_path / "b.bin")


def test_volumes_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(UserError, match=r"holds 240x144x240 voxels of 0\.02 m, not 60x36x60 of 0\.08 m"):
        ssc.write_bin(tmp_path / "a.bin", LabelVolume(np.zeros((60, 36, 60), np.uint8), ORIGIN, 0.08), POSE)
    with pytest.raises(UserError, match=r"holds label 12: expected 0\.\.11 and 255"):
        ssc.write_bin(tmp_path / "a.bin", volume(most=13), POSE)


def test_depth_bits(tmp_path):
    """Three bits from the low end come back from the high end: 8 mm is stored as 64, 0x2001 mm as 0x0009."""
    cv2.imwrite(str(tmp_path / "d.png"), np.array([[64, 0x0009, 0]], np.uint16))
    np.testing.assert_allclose(ssc.read_depth(tmp_path / "d.png"), [[0.008, 8.193, 0]], atol=1e-6)
    depth = np.random.default_rng(0).integers(0, 65536, (30, 40)) / 1000
    depth[0, 0] = np.nan
    ssc.write_depth(tmp_path / "e.png", depth)
    depth[0, 0] = 0
    np.testing.assert_allclose(ssc.read_depth(tmp_path / "e.png"), depth, atol=1e-5)
    with pytest.raises(UserError, match="does not fit into a PNG of 16 bits: give metres"):
        ssc.write_depth(tmp_path / "f.png", 1000 * depth)
    cv2.imwrite(str(tmp_path / "g.png"), np.zeros((3, 4), np.uint8))
    with pytest.raises(UserError, match=r"g\.png has uint8 depth: expected a PNG of 16 bits"):
        ssc.read_depth(tmp_path / "g.png")


# ---------------------------------------------------------------------------------------------------------- .npz


def encoded(seed=0, shape=ssc.COARSE):
    rng = np.random.default_rng(seed)
    return ssc.Encoded(
        tsdf=rng.uniform(-1, 1, shape).astype(np.float32),
        labels=rng.choice([*range(12), 255], ssc.COARSE).astype(np.uint8),
        weights=rng.random(ssc.COARSE) < 0.3,
        pixels=rng.integers(-1, 307200, ssc.COARSE).astype(np.int32),
    )


def test_npz_round_trips(tmp_path):
    given = encoded()
    ssc.write_npz(tmp_path / "a.npz", given)
    found = ssc.read_npz(tmp_path / "a.npz")
    for key in ("tsdf", "labels", "weights"):
        np.testing.assert_array_equal(getattr(found, key), getattr(given, key))
    ssc.write_torchssc(tmp_path, "0003", given)
    found = ssc.read_torchssc(tmp_path, "0003")
    for key in ("tsdf", "labels", "weights", "pixels"):
        np.testing.assert_array_equal(getattr(found, key), getattr(given, key))
    with np.load(tmp_path / "Mapping/0003.npz") as file:  # what others expect of it
        assert file["arr_0"].shape == (129600,)
        assert file["arr_0"].max() == 307200
    ssc.write_npz(tmp_path / "b.npz", ssc.Encoded(tsdf=given.tsdf))
    assert ssc.read_npz(tmp_path / "b.npz").labels is None


def test_broken_npz_are_told(tmp_path):
    given = encoded()
    with pytest.raises(UserError, match="a frame without a TSDF has no such file"):
        ssc.write_npz(tmp_path / "a.npz", ssc.Encoded())
    with pytest.raises(UserError, match="it needs tsdf, labels, weights and pixels"):
        ssc.write_torchssc(tmp_path, "1", ssc.Encoded(tsdf=given.tsdf))
    (tmp_path / "b.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"b\.npz is no readable \.npz"):
        ssc.read_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", lbl=given.labels)
    with pytest.raises(UserError, match=r"c\.npz lacks 'tsdf': it holds lbl"):
        ssc.read_npz(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", tsdf=given.tsdf, lbl=np.full(ssc.COARSE, 40))
    with pytest.raises(UserError, match=r"d\.npz: lbl holds label 40, expected 0\.\.11 and 255"):
        ssc.read_npz(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", tsdf=given.tsdf.transpose(0, 2, 1))
    with pytest.raises(UserError, match=r"tsdf is float32 \[60, 60, 36\], expected numbers of 240x144x240 or 60x36x60"):
        ssc.read_npz(tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", tsdf=np.array([{}], object))
    with pytest.raises(UserError, match=r"f\.npz is no readable \.npz"):
        ssc.read_npz(tmp_path / "f.npz")


# ------------------------------------------------------------------------------------------------------- the reader


def make_tree(root, source="NYU", train=6, colour=True):
    """Tiny pictures of a resized camera; one volume serves all frames."""
    ssc.write_bin(root / "master", volume(), POSE)
    for part, ids in (("train", range(1, train + 1)), ("test", range(101, 103))):
        folder = root / "depthbin" / f"{source}{part}"
        folder.mkdir(parents=True)
        for i in ids:
            stem = f"NYU{i:04d}_0000"
            (folder / f"{stem}.bin").hardlink_to(root / "master")
            ssc.write_depth(folder / f"{stem}.png", np.full((24, 32), i / 100))
            if colour:
                cv2.imwrite(str(folder / f"{stem}_colors.png"), np.full((24, 32, 3), i, np.uint8))


def test_reader(tmp_path):
    make_tree(tmp_path)
    reader = ssc.SSC(tmp_path, "trainval")
    assert isinstance(reader, Reader)
    assert reader.names == tuple(f"NYU{i:04d}_0000" for i in range(1, 7))
    sample = reader[2]
    np.testing.assert_allclose(sample.depth, np.full((24, 32), 0.03), atol=1e-6)
    np.testing.assert_allclose(sample.image, np.full((24, 32, 3), 3 / 255), atol=1e-6)
    np.testing.assert_array_equal(sample.voxels.labels, volume().labels)
    np.testing.assert_array_equal(sample.camera.pose, POSE)
    assert sample.camera.fx == pytest.approx(518.8579 / 20)
    assert sample.camera.width == 32
    train, val = ssc.SSC(tmp_path, "train"), ssc.SSC(tmp_path, "val")
    assert train.names + val.names == reader.names
    assert ssc.SSC(tmp_path / "depthbin", "test").names == ("NYU0101_0000", "NYU0102_0000")
    assert len(ssc.SSC(tmp_path, "all")) == 8


def test_colour_from_elsewhere_or_not_at_all(tmp_path):
    make_tree(tmp_path, "NYUCAD", train=1, colour=False)
    with pytest.raises(
        FileNotFoundError, match=r"colour is not among SSCNet's files, so give NYUv2's rgb folder as rgb"
    ):
        ssc.SSC(tmp_path, "trainval", source="nyucad")
    dark = ssc.SSC(tmp_path, "trainval", source="nyucad", depth_only=True)[0]
    assert dark.image.shape == (24, 32, 3)
    assert not dark.image.any()
    (tmp_path / "rgb").mkdir()
    cv2.imwrite(str(tmp_path / "rgb/0001.png"), np.full((24, 32, 3), 200, np.uint8))
    given = ssc.SSC(tmp_path, "trainval", source="nyucad", rgb=tmp_path / "rgb")[0]
    np.testing.assert_allclose(given.image, np.full((24, 32, 3), 200 / 255), atol=1e-6)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no folder NYUtrain or NYUtest"):
        ssc.SSC(tmp_path)
    make_tree(tmp_path, train=2)
    with pytest.raises(UserError, match="no ssc split 'tset'; did you mean 'test'"):
        ssc.SSC(tmp_path, "tset")
    with pytest.raises(UserError, match="no ssc source 'nyucda'; did you mean 'nyucad'"):
        ssc.SSC(tmp_path, source="nyucda")
    with pytest.raises(FileNotFoundError, match="holds no folder NYUCADtrain"):
        ssc.SSC(tmp_path, source="nyucad")
    with pytest.raises(FileNotFoundError, match="for the 2 frames of this folder itself take split 'all'"):
        ssc.SSC(tmp_path / "depthbin/NYUtest", "test")
    (tmp_path / "depthbin/NYUtest/NYU0102_0000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"NYU0102_0000\.png not found \(1 of the files of nyu-ssc/test"):
        ssc.SSC(tmp_path, "test")


def test_one_bad_file_is_told_when_it_is_read(tmp_path):
    make_tree(tmp_path, train=2)
    bad = tmp_path / "depthbin/NYUtrain/NYU0002_0000.bin"
    bad.unlink()
    bad.write_bytes(b"short")
    reader = ssc.SSC(tmp_path, "trainval")
    assert reader[0].voxels is not None
    with pytest.raises(UserError, match=r"NYU0002_0000\.bin has 5 bytes"):
        reader[1]


def test_a_sample_becomes_a_frame(tmp_path):
    camera = Camera(ssc.CAMERA.fx / 20, ssc.CAMERA.fy / 20, 15.525, 11.525, 32, 24, POSE)
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3)) / 255
    depth = np.random.default_rng(1).integers(500, 8000, (24, 32)) / 1000
    sample = Sample(image.astype(np.float32), "room7", None, depth.astype(np.float32), camera, voxels=volume())
    ssc.write_frame(tmp_path / "out", sample)
    (again,) = ssc.SSC(tmp_path / "out", "all")
    np.testing.assert_allclose(again.image, sample.image, atol=1e-6)
    np.testing.assert_allclose(again.depth, sample.depth, atol=1e-6)
    np.testing.assert_array_equal(again.voxels.labels, sample.voxels.labels)
    assert again.camera.fx == pytest.approx(camera.fx)
    assert again.camera.cx == pytest.approx(camera.cx)
    with pytest.raises(UserError, match="room7 cannot be written as a frame of SSCNet: it needs depth, voxels"):
        ssc.write_frame(tmp_path, sample.replace(voxels=None))


@pytest.mark.shared
def test_real_frame(shared_data, tmp_path):
    folder = shared_data / "nyu_ssc"
    for source, holes in (("nyu", 0.1), ("nyucad", 0.15)):
        (sample,) = ssc.SSC(folder, "all", source=source, depth_only=True)
        assert sample.name == "NYU0003_0000"
        assert (sample.depth == 0).mean() < holes
        assert 0.5 < np.median(sample.depth[sample.depth > 0]) < 4
    # The rendered depth lies on the volume's surfaces: most of its points are in or beside a voxel that is full.
    from enfilade.ops.voxels import VoxelGrid as Grid
    from enfilade.ops.voxels import pixel_voxels

    index = pixel_voxels(sample.depth, sample.camera, Grid(sample.voxels.origin, sample.camera.pose))
    full = (sample.voxels.labels > 0) & (sample.voxels.labels < 255)
    for axis in range(3):
        full = full | np.roll(full, 1, axis) | np.roll(full, -1, axis)
    assert full.reshape(-1)[index[index >= 0]].mean() > 0.9
    # Written again the file is the same, byte by byte.
    given, pose = ssc.read_bin(folder / "NYU0003_0000.bin", raw=True)
    ssc.write_bin(tmp_path / "a.bin", given, pose, raw=True)
    assert (tmp_path / "a.bin").read_bytes() == (folder / "NYU0003_0000.bin").read_bytes()
    stored = ssc.read_npz(folder / "NYU0003_0000_TSDF.npz")
    assert stored.tsdf.shape == ssc.SHAPE
    assert stored.labels.shape == stored.weights.shape == ssc.COARSE
