"""One's own depth map as a file of voxels: what is read, what is written, what is said."""

import json

import cv2
import numpy as np
import pytest

from enfilade.camera import Camera
from enfilade.cli import main
from enfilade.data.voxel_files import describe_grid, frame, read_depth, read_pose, write_voxels
from enfilade.errors import UserError
from enfilade.ops.tsdf import tsdf_reference
from enfilade.ops.voxels import VoxelGrid, pixel_voxels_reference, voxel_pixels_reference

WIDTH, HEIGHT, F = 80, 60, 70.0
CAMERA = Camera(F, F, 39.5, 29.5, WIDTH, HEIGHT)


def room_depth(height=1.4, tilt=15.0, wall=3.0):
    """What a camera `height` above the floor, looking `tilt` degrees down, sees of a floor and a wall."""
    t = np.radians(tilt)
    rays = CAMERA.rays()
    down = rays[..., 1] * np.cos(t) + rays[..., 2] * np.sin(t)
    ahead = rays[..., 2] * np.cos(t) - rays[..., 1] * np.sin(t)
    floor = np.where(down > 1e-9, height / np.maximum(down, 1e-9), np.inf)
    return np.minimum(floor, wall / ahead).astype(np.float32)


GRAVITY = np.array([0, np.cos(np.radians(15)), np.sin(np.radians(15))])


@pytest.fixture
def files(tmp_path):
    """A depth map in millimetres, its camera, colours and pose."""
    cv2.imwrite(str(tmp_path / "d.png"), np.rint(1000 * room_depth()).astype(np.uint16))
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "c.png"), image)
    (tmp_path / "camera.json").write_text(json.dumps({"fx": F}))
    pose = np.eye(4)  # X right, Y forward, Z up, the camera turned 40 degrees to a side, somewhere
    t, turn = np.radians(15), np.radians(40)
    pose[:3, :3] = [[1, 0, 0], [0, -np.sin(t), np.cos(t)], [0, -np.cos(t), -np.sin(t)]]
    pose[:2, :3] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ pose[:2, :3]
    pose[:3, 3] = 5, 6, 7
    np.savetxt(tmp_path / "pose.txt", pose)
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- depth


def test_units_and_what_is_missing(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 1500, 65535, 2]], np.uint16))
    np.testing.assert_allclose(read_depth(tmp_path / "a.png"), [[0, 1.5, 0, 0.002]])
    np.testing.assert_allclose(read_depth(tmp_path / "a.png", unit=1 / 5000), [[0, 0.3, 0, 0.0004]], atol=1e-7)
    np.save(tmp_path / "b.npy", np.array([[np.nan, np.inf, -1.0, 2.5]]))
    np.testing.assert_array_equal(read_depth(tmp_path / "b.npy"), np.array([[0, 0, 0, 2.5]], np.float32))
    np.save(tmp_path / "c.npy", np.array([[7, -7]], np.int64))
    np.testing.assert_allclose(read_depth(tmp_path / "c.npy"), [[0.007, 0]])
    cv2.imwrite(str(tmp_path / "d.png"), np.array([[0, 255]], np.uint8))
    np.testing.assert_allclose(read_depth(tmp_path / "d.png", unit=0.02), [[0, 5.1]])


def test_depth_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png not found"):
        read_depth(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=r"none\.npy not found"):
        read_depth(tmp_path / "none.npy")
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"a\.npy is no readable NumPy array"):
        read_depth(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.ones((2, 3, 4)))
    with pytest.raises(UserError, match=r"b\.npy holds float64 \[2, 3, 4\]: a depth map is numbers in two dimensions"):
        read_depth(tmp_path / "b.npy")
    cv2.imwrite(str(tmp_path / "c.png"), np.ones((2, 3), np.uint8))
    with pytest.raises(UserError, match=r"c\.png has 8 bits, too few for millimetres: give the unit"):
        read_depth(tmp_path / "c.png")
    cv2.imwrite(str(tmp_path / "d.png"), np.zeros((2, 3), np.uint16))
    with pytest.raises(UserError, match=r"d\.png: not a pixel has depth"):
        read_depth(tmp_path / "d.png")
    with pytest.raises(UserError, match=r"unit is a positive number of metres, not -1\.0"):
        read_depth(tmp_path / "d.png", unit=-1.0)


def test_a_frame_has_the_size_of_its_depth(files):
    depth = room_depth()
    cv2.imwrite(str(files / "large.png"), np.full((2 * HEIGHT, 2 * WIDTH, 3), 51, np.uint8))
    large = Camera(2 * F, 2 * F, 2 * 39.5 + 0.5, 2 * 29.5 + 0.5, 2 * WIDTH, 2 * HEIGHT)
    found = frame(depth, large, rgb=files / "large.png")
    np.testing.assert_allclose(found.image, np.full((HEIGHT, WIDTH, 3), 0.2), atol=1e-6)
    np.testing.assert_allclose(found.camera.matrix, CAMERA.matrix)
    assert not frame(depth, CAMERA).image.any()
    with pytest.raises(UserError, match=r"the camera is of 80x80 pixels, but the depth map 80x60: they need the same"):
        frame(depth, Camera(F, F, 40.0, 40.0, 80, 80))
    cv2.imwrite(str(files / "wide.png"), np.zeros((40, 80, 3), np.uint8))
    with pytest.raises(UserError, match=r"wide\.png is of 80x40 pixels"):
        frame(depth, CAMERA, rgb=files / "wide.png")


def test_poses(tmp_path):
    (tmp_path / "a.txt").write_text("1,0,0,2\n0,1,0,3\n0,0,1,4\n0,0,0,1")
    np.testing.assert_array_equal(read_pose(tmp_path / "a.txt")[:3, 3], [2, 3, 4])
    for text, sentence in (
        ("1 0 0", r"holds 3 numbers: a pose is a finite 4x4 matrix"),
        ("x " * 16, "holds something that is no number"),
        ("nan " * 16, "a pose is a finite 4x4 matrix"),
        ("2 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "expected a rotation, a place and a last row of 0 0 0 1"),
        ("1 0 0 0 0 1 0 0 0 0 1 0 5 6 7 1", "expected a rotation, a place and a last row of 0 0 0 1"),
    ):
        (tmp_path / "b.txt").write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_pose(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt not found"):
        read_pose(tmp_path / "none.txt")


def test_what_is_not_encoded_is_not_written(tmp_path):
    with pytest.raises(UserError, match="mine cannot be written as voxels: encode it first"):
        write_voxels(tmp_path / "a.npz", frame(room_depth(), CAMERA, name="mine"), VoxelGrid(np.zeros(3), np.eye(4)))


# ------------------------------------------------------------------------------------------------ from the command line


def words(files, *more):
    given = ["data", "voxels", files / "d.png", "--camera", files / "camera.json", "--out", files / "new/v.npz", *more]
    return [str(word) for word in given]


def test_height_gravity_and_origin_are_found_and_told(files, capsys):
    assert main(words(files, "--rgb", files / "c.png")) == 0
    told = capsys.readouterr().out.strip().split("\n")
    assert len(told) == 4
    assert told[0].startswith("Camera height: the camera is 1.40 m above the floor (found in the depth map;")
    assert told[1].startswith("Gravity: things fall along (")
    assert "so the camera looks 15.0 degrees down (found in the depth map)" in told[1]
    assert told[2].startswith("Origin: the grid of 4.80 x 4.80 x 2.88 m begins at (-2.4")
    assert told[3] == str(files / "new/v.npz")
    with np.load(files / "new/v.npz") as stored:
        found = dict(stored)
    assert found["pose"][2, 3] == pytest.approx(1.4, abs=0.01)
    np.testing.assert_allclose(-found["pose"][2, :3], GRAVITY, atol=0.01)
    np.testing.assert_allclose(found["depth"], room_depth(), atol=0.501e-3)  # millimetres, rounded
    grid = VoxelGrid(found["origin"], found["pose"], float(found["size"]))
    # Rounded to float32 in other orders, signs of single voxels may differ.
    expected = tsdf_reference(found["depth"], CAMERA, grid)
    assert np.isclose(found["tsdf"], expected, atol=1e-6).mean() > 0.99999
    np.testing.assert_array_equal(found["voxels"], pixel_voxels_reference(found["depth"], CAMERA, grid.coarse()))
    np.testing.assert_array_equal(found["pixels"], voxel_pixels_reference(CAMERA, grid.coarse(), at=0.5)[0])
    np.testing.assert_array_equal(found["intrinsics"], CAMERA.matrix)
    np.testing.assert_array_equal(found["image"], cv2.imread(str(files / "c.png"))[..., ::-1])
    assert not list(files.rglob("*.part"))


def test_height_and_gravity_as_given(files, capsys):
    tilted = [str(float(g)) for g in 9.81 * GRAVITY]
    for more, told in ((("--gravity", *tilted), "as given"), (("--pose", files / "pose.txt"), "from ")):
        assert main(words(files, "--height", "1.1", "--no-walls", *more)) == 0
        out = capsys.readouterr().out
        assert "1.10 m above the floor (as given)" in out
        assert "15.0 degrees down (" + told in out
        assert main(words(files, "--height", "1.1", "--no-walls", "--json", *more)) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["height"] == 1.1
        np.testing.assert_allclose(found["gravity"], GRAVITY, atol=1e-6)
        assert found["origin"] == np.load(files / "new/v.npz")["origin"].tolist()
        assert found["out"] == str(files / "new/v.npz")
    # A camera held upside down is no more than another gravity.
    assert main(words(files, "--gravity", "0", "-1", "-0.5", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["gravity"][1] < -0.8


def test_bad_input_ends_with_a_line(files, capsys):
    cases = [
        (["data", "voxels", files / "d.png"], "a grid in metres needs the camera, once: give --camera or --fov"),
        (words(files, "--fov", "60"), "needs the camera, once"),
        (["data", "voxels", files / "d.png", "--fov", "200"], "lies between 1 and 170 degrees, not 200"),
        (words(files, "--gravity", "0", "1", "0", "--pose", files / "pose.txt"), "give gravity once"),
        (words(files, "--gravity", "0", "0", "0"), "gravity is a direction in the camera frame"),
        (words(files, "--height", "-1"), "height above the floor is a positive number of metres"),
        (words(files, "--pose", files / "none.txt"), "none.txt not found"),
        (["data", "voxels", files / "none.png", "--fov", "60"], "none.png not found"),
    ]
    for given, sentence in cases:
        assert main([str(word) for word in given]) == 2, given
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert sentence in error
    assert not (files / "new").exists()


def test_a_level_camera_is_described():
    pose = np.eye(4)
    pose[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    pose[2, 3] = 1.25
    told = describe_grid(VoxelGrid(np.array([-2.4, 0.0, -0.05]), pose), height="measured")
    assert "the camera is 1.25 m above the floor (measured)." in told
    assert "(0.000, 1.000, 0.000) in the camera frame" in told
    assert "looks 0.0 degrees down (found)." in told
    assert "begins at (-2.40, 0.00, -0.05) m" in told
