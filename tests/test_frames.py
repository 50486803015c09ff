"""Own RGB-D folders: both layouts, every optional part, and what is said when a part is wrong."""

import json
import shutil
import struct
import zlib

import cv2
import numpy as np
import pytest

from enfilade.camera import Camera
from enfilade.data import Reader, open_dataset
from enfilade.data.frames import Frames
from enfilade.errors import UserError

HEIGHT, WIDTH = 24, 32
POSE = np.array([[0, 0, 1, 1.5], [-1, 0, 0, -2], [0, -1, 0, 1.2], [0, 0, 0, 1.0]])


def seven_scenes(root, count=4):
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    depths = []
    for i in range(count):
        depth = rng.integers(400, 5000, (HEIGHT, WIDTH)).astype(np.uint16)
        depth[0, :4] = 0, 65535, 1, 65534
        stem = root / f"frame-{i:06d}"
        cv2.imwrite(f"{stem}.color.png", rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
        cv2.imwrite(f"{stem}.depth.png", depth)
        np.savetxt(f"{stem}.pose.txt", POSE)
        depths.append(depth)
    np.savetxt(root / "camera-intrinsics.txt", [[30, 0, 16], [0, 31, 12], [0, 0, 1]])
    return depths


def folders(root, stems=("a1", "a2", "a10"), colour="rgb"):
    """A folder of one picture a stem."""
    rng = np.random.default_rng(0)
    (root / colour).mkdir(parents=True)
    for stem in stems:
        cv2.imwrite(str(root / colour / f"{stem}.png"), rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    return root


def put(root, name, array):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".txt":
        np.savetxt(path, array)
    else:
        assert cv2.imwrite(str(path), array)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_seven_scenes(tmp_path):
    depths = seven_scenes(tmp_path)
    reader = Frames(tmp_path)
    assert isinstance(reader, Reader)
    assert reader.names == tuple(f"frame-{i:06d}" for i in range(4))
    sample = reader[2]
    stored = cv2.imread(str(tmp_path / "frame-000002.color.png"))
    np.testing.assert_allclose(sample.image, stored[..., ::-1] / 255, atol=1e-6)
    np.testing.assert_allclose(sample.depth[1:], depths[2][1:] / 1000, rtol=1e-6)
    np.testing.assert_allclose(sample.depth[0, :4], [0, 0, 0.001, 65.534], rtol=1e-6)
    assert sample.camera.matrix.tolist() == [[30, 0, 16], [0, 31, 12], [0, 0, 1]]
    assert (sample.camera.width, sample.camera.height) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(sample.camera.pose, POSE)
    # the pose is camera-to-world: the point one metre ahead
    np.testing.assert_allclose(sample.camera.to_world(np.array([[0.0, 0, 1]])), [[2.5, -2, 1.2]])
    assert sample.labels is None


@pytest.mark.parametrize("colour", ["rgb", "color", "image"])
def test_bare_images(tmp_path, colour):
    reader = Frames(folders(tmp_path, colour=colour))
    assert reader.names == ("a1", "a2", "a10")  # as a person counts
    sample = reader[0]
    assert sample.depth is sample.camera is sample.labels is None


def test_folders_with_everything(tmp_path):
    folders(tmp_path)
    rng = np.random.default_rng(1)
    truth = {}
    for stem in ("a1", "a2", "a10"):
        depth, label = rng.integers(1, 5000, (HEIGHT, WIDTH)), rng.integers(0, 40, (HEIGHT, WIDTH))
        label[0, 0] = 255
        put(tmp_path, f"depth/{stem}.png", depth.astype(np.uint16))
        put(tmp_path, f"labels/{stem}.png", label.astype(np.uint8))
        put(tmp_path, f"poses/{stem}.txt", POSE)
        truth[stem] = depth, label
    (tmp_path / "intrinsics.txt").write_text("30 31, 16 12\n")
    for i, stem in enumerate(("a1", "a2", "a10")):
        sample = open_dataset("frames", tmp_path, "all")[i]
        assert sample.name == stem
        np.testing.assert_allclose(sample.depth, truth[stem][0] / 1000, rtol=1e-6)
        assert (sample.labels == truth[stem][1]).all()
        assert sample.camera.matrix.tolist() == [[30, 0, 16], [0, 31, 12], [0, 0, 1]]
        np.testing.assert_allclose(sample.camera.pose, POSE)


def test_labels_that_count_from_one(tmp_path):
    folders(tmp_path, ["a"])
    label = np.random.default_rng(0).integers(0, 14, (HEIGHT, WIDTH))
    put(tmp_path, "labels/a.png", label.astype(np.uint8))
    reader = Frames(tmp_path, space="nyu13", label_offset=1)
    assert (reader[0].labels == np.where(label == 0, 255, label - 1)).all()
    assert reader.space.name == "nyu13"
    with pytest.raises(UserError, match=r"a\.png holds label 13, which is none of the 13 of nyu13"):
        Frames(tmp_path, space="nyu13")[0]
    with pytest.raises(UserError, match="did you mean 'nyu13'"):
        Frames(tmp_path, space="nyu31")


def test_splits(tmp_path):
    folders(tmp_path, [f"{i}" for i in range(50)])
    train, val = Frames(tmp_path, "train").names, Frames(tmp_path, "val").names
    assert train + val == Frames(tmp_path).names == tuple(str(i) for i in range(50))
    assert len(val) == 9
    with pytest.raises(FileNotFoundError, match=r"test\.txt"):
        Frames(tmp_path, "test")
    with pytest.raises(UserError, match="did you mean 'train'"):
        Frames(tmp_path, "trian")
    (tmp_path / "test.txt").write_text("7\n3\n")
    assert Frames(tmp_path, "test").names == ("7", "3")
    with pytest.raises(FileNotFoundError, match=r"val\.txt"):  # lists there are, so a guess would leak test frames
        Frames(tmp_path, "val")
    (tmp_path / "val.txt").write_text("7\nx\ny\n")
    with pytest.raises(FileNotFoundError, match=r"val\.txt lists 'x', which has no image \(2 such ids\)"):
        Frames(tmp_path, "val")


# --- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["npy", "tiff"])
def test_float_depth_is_metres(tmp_path, ending):
    folders(tmp_path, ["a"])
    depth = np.random.default_rng(0).uniform(0.5, 5, (HEIGHT, WIDTH)).astype(np.float32)
    expected = depth.copy()
    depth[0, :4] = np.nan, np.inf, -1, 0
    expected[0, :4] = 0
    put(tmp_path, f"depth/a.{ending}", depth)
    assert (Frames(tmp_path)[0].depth == expected).all()
    np.testing.assert_allclose(Frames(tmp_path, depth_unit="mm")[0].depth, expected / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    ("unit", "scale"), [(None, 0.001), ("mm", 0.001), ("m", 1), (1 / 5000, 1 / 5000), ("0.0002", 1 / 5000)]
)
def test_units_of_whole_numbers(tmp_path, unit, scale):
    folders(tmp_path, ["a"])
    depth = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    depth[0, :2] = 0, 65535
    put(tmp_path, "depth/a.png", depth)
    expected = np.where(depth == 65535, 0, depth.astype(float)) * scale
    np.testing.assert_allclose(Frames(tmp_path, depth_unit=unit)[0].depth, expected, rtol=1e-6)


def test_eight_bits_need_a_unit(tmp_path):
    folders(tmp_path, ["a"])
    depth = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    put(tmp_path, "depth/a.png", depth)
    with pytest.raises(UserError, match=r"a\.png has 8 bits.*depth_unit"):
        Frames(tmp_path)[0]
    np.testing.assert_allclose(Frames(tmp_path, depth_unit=0.04)[0].depth, depth * 0.04, rtol=1e-6)


@pytest.mark.parametrize("unit", ["cm", 0.0, "0", -1.0, float("nan"), float("inf")])
def test_bad_units(tmp_path, unit):
    with pytest.raises(UserError, match="depth_unit"):
        Frames(folders(tmp_path), depth_unit=unit)


@pytest.mark.parametrize("factor", [0.5, 2])
def test_other_depth_sizes_are_resized_to_the_nearest_pixel(tmp_path, factor):
    folders(tmp_path, ["a"])
    height, width = int(HEIGHT * factor), int(WIDTH * factor)
    depth = np.random.default_rng(0).integers(1, 60000, (height, width)).astype(np.uint16)
    put(tmp_path, "depth/a.png", depth)
    result = Frames(tmp_path)[0].depth
    assert result.shape == (HEIGHT, WIDTH)
    # nothing is mixed: each value is the stored one at the pixel's centre; at factor 2 centres fall between two pixels
    v, u = (np.arange(HEIGHT) + 0.5) * factor - 0.5, (np.arange(WIDTH) + 0.5) * factor - 0.5
    candidates = [np.rint] if factor == 0.5 else [np.floor, np.ceil]
    nearest = [depth[np.ix_(f(v).astype(int), f(u).astype(int))] / 1000 for f in candidates]
    assert any(np.allclose(result, values, rtol=1e-6) for values in nearest)


def test_depth_of_another_camera_is_refused(tmp_path):
    folders(tmp_path, ["a"])
    put(tmp_path, "depth/a.png", np.ones((HEIGHT, WIDTH + 4), np.uint16))
    with pytest.raises(UserError, match=r"a\.png is 36x24 and its colour image 32x24"):
        Frames(tmp_path)[0]


def test_bad_depth_files_are_named(tmp_path):
    folders(tmp_path, ["a", "b", "c", "d"])
    put(tmp_path, "depth/a.npy", np.ones((2, 3, 4)))
    (tmp_path / "depth/b.npy").write_bytes(b"nothing")
    np.save(tmp_path / "depth/c.npy", np.array([[object()]]), allow_pickle=True)
    put(tmp_path, "depth/d.npy", np.ones((HEIGHT, WIDTH), complex))
    reader = Frames(tmp_path)
    for i, message in enumerate(
        [r"a\.npy has shape \(2, 3, 4\)", r"b\.npy is no", r"c\.npy is no", r"d\.npy has complex"]
    ):
        with pytest.raises(UserError, match=message):
            reader[i]


def png(width, height, colour_type):
    """A PNG whose header promises a size that its data does not hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(768)) if colour_type == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour_type", [0, 3])
def test_bombs_are_named(tmp_path, colour_type):
    folders(tmp_path, ["a"])
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth/a.png").write_bytes(png(60000, 60000, colour_type))
    with pytest.raises(UserError, match=r"depth.a\.png is no readable image"):
        Frames(tmp_path)[0]


# --- what is missing or wrong -----------------------------------------------------------------------------------------


def test_a_kind_that_is_there_is_there_for_all(tmp_path):
    seven_scenes(tmp_path)
    (tmp_path / "frame-000002.depth.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"'frame-000002' has no depth file \(1 of 4 frames"):
        Frames(tmp_path)
    for path in tmp_path.glob("*.depth.png"):
        path.unlink()
    assert Frames(tmp_path)[0].depth is None
    (tmp_path / "frame-000001.pose.txt").unlink()
    with pytest.raises(FileNotFoundError, match="'frame-000001' has no pose file"):
        Frames(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        Frames(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither a folder of images"):
        Frames(tmp_path)
    (tmp_path / "rgb").mkdir()
    with pytest.raises(FileNotFoundError, match="rgb holds no images"):
        Frames(tmp_path)
    put(tmp_path, "rgb/a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "depth").mkdir()
    with pytest.raises(FileNotFoundError, match="depth holds no depth files"):
        Frames(tmp_path)
    put(tmp_path, "rgb/a.jpg", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.jpg and a\.png are one frame twice"):
        Frames(tmp_path)


def test_label_size_must_fit(tmp_path):
    folders(tmp_path, ["a"])
    put(tmp_path, "labels/a.png", np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8))
    with pytest.raises(UserError, match=r"a\.png is 16x12, but its colour image 32x24"):
        Frames(tmp_path)[0]
    put(tmp_path, "labels/a.png", np.zeros((HEIGHT, WIDTH), np.uint16))
    with pytest.raises(UserError, match=r"a\.png has uint16 labels"):
        Frames(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0\n0 1 0 0\n0 0 1 0", "12 numbers"),
        ("1 0 0 x", "no number"),
        ("2 0 0 0\n0 2 0 0\n0 0 2 0\n0 0 0 1", "no rotation"),
        ("-1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1", "no rotation"),
        ("1 0 0 0\n0 1 0 0\n0 0 1 0\n1 2 3 1", "transposed"),
    ],
)
def test_bad_poses_are_named(tmp_path, text, message):
    seven_scenes(tmp_path, 1)
    (tmp_path / "frame-000000.pose.txt").write_text(text)
    with pytest.raises(UserError, match=rf"frame-000000\.pose\.txt.*{message}"):
        Frames(tmp_path)[0]


def test_lost_tracking_is_a_camera_without_pose(tmp_path):
    seven_scenes(tmp_path, 1)
    np.savetxt(tmp_path / "frame-000000.pose.txt", np.full((4, 4), -np.inf))
    camera = Frames(tmp_path)[0].camera
    assert camera.pose is None
    assert camera.fx == 30


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("intrinsics.txt", "1 2 3", "3 numbers"),
        ("intrinsics.txt", "30 0 16 0 31 12 0 1 0", "rows fx 0 cx"),
        ("intrinsics.txt", "30 16 0 0 31 12 0 0 1", "rows fx 0 cx"),
        ("intrinsics.txt", "0 31 16 12", "must be positive"),
        ("intrinsics.txt", "nan 31 16 12", "must be positive"),
        ("camera.json", "{", "expected JSON"),
        ("camera.json", '{"fx": 30}', "expected JSON.*fy"),
        ("camera.json", '{"fx": 30, "fy": 30, "cx": 1, "cy": 1, "width": 32}', "height"),
    ],
)
def test_bad_intrinsics_are_named(tmp_path, name, text, message):
    folders(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        Frames(tmp_path)


def test_intrinsics_of_another_size_are_scaled(tmp_path):
    folders(tmp_path)
    content = {"fx": 60, "fy": 62, "cx": 31.5, "cy": 23.5, "width": 2 * WIDTH, "height": 2 * HEIGHT}
    (tmp_path / "camera.json").write_text(json.dumps(content))
    camera = Frames(tmp_path)[0].camera
    assert camera == Camera(30.0, 31.0, 15.5, 11.5, WIDTH, HEIGHT)  # a centred camera stays centred


# --- the real frames --------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_seven_scenes_frames_see_one_room(shared_data):
    """Points of one frame, moved through the world into a neighbour, fall on the neighbour's own depth. With the pose
    inverted, or depth in other units, they would not."""
    reader = Frames(shared_data / "7scenes_office")
    assert len(reader) == 40
    assert reader[0].camera.fx == 585
    errors = []
    for i in (0, 12, 25):
        first, second = reader[i], reader[i + 1]
        points = first.camera.unproject(first.depth)[first.depth > 0]
        uv, z = second.camera.project(second.camera.to_camera(first.camera.to_world(points)))
        seen = (z > 0) & (uv[:, 0] > -0.5) & (uv[:, 0] < 639.5) & (uv[:, 1] > -0.5) & (uv[:, 1] < 479.5)
        assert seen.mean() > 0.5
        u, v = np.rint(uv[seen]).astype(int).T
        there = second.depth[v, u]
        errors.append(np.median(np.abs(there - z[seen])[there > 0]))
        # the same without moving between the cameras: the poses must be what makes the frames agree
        both = (first.depth > 0) & (second.depth > 0)
        still = np.median(np.abs(first.depth - second.depth)[both])
        assert errors[-1] < still
    assert max(errors) < 0.05


@pytest.mark.shared
def test_seven_scenes_missing_depth_is_named(shared_data, tmp_path):
    for path in sorted((shared_data / "7scenes_office").iterdir())[:7]:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "frame-000020.depth.png").unlink()
    with pytest.raises(FileNotFoundError, match="'frame-000020' has no depth file"):
        Frames(tmp_path)
