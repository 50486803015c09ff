"""Whatever is done to an image, its camera must go on seeing the same points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enfilade.camera import Camera

sizes = st.integers(1, 40)
cameras = st.builds(
    Camera,
    fx=st.floats(5, 900),
    fy=st.floats(5, 900),
    cx=st.floats(-20, 60),
    cy=st.floats(-20, 60),
    width=sizes,
    height=sizes,
)


def posed(camera: Camera, seed: int) -> Camera:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = q * np.sign(np.linalg.det(q)), rng.normal(size=3)
    return Camera(camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height, pose)


def grid(camera: Camera) -> np.ndarray:
    """(u, v) of every pixel."""
    return np.stack(np.meshgrid(np.arange(camera.width), np.arange(camera.height)), -1).astype(np.float64)


def world_line(camera: Camera, uv: np.ndarray, depth: float) -> np.ndarray:
    """World points at `depth` behind pixel positions, which need not be whole: the definition, spelled out."""
    x = (uv[..., 0] - camera.cx) / camera.fx * depth
    y = (uv[..., 1] - camera.cy) / camera.fy * depth
    return camera.to_world(np.stack([x, y, np.full_like(x, depth)], -1))


@given(cameras, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_project_undoes_unproject(camera, seed):
    depth = np.random.default_rng(seed).uniform(0.3, 9, (camera.height, camera.width)).astype(np.float32)
    uv, z = camera.project(camera.unproject(depth))
    np.testing.assert_allclose(z, depth, rtol=1e-6)
    # points are fp32: 6e-8 of |u - cx| + |cx| pixels, some thousand at the most
    np.testing.assert_allclose(uv, grid(camera), atol=2e-3)


@given(cameras, st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_world_and_camera_frames_are_inverse(camera, seed):
    camera = posed(camera, seed)
    points = np.random.default_rng(seed).normal(size=(7, 3))
    np.testing.assert_allclose(camera.to_camera(camera.to_world(points)), points, atol=1e-10)
    # camera-to-world: the camera's own origin is the translation of its pose
    np.testing.assert_allclose(camera.to_world(np.zeros((1, 3)))[0], camera.pose[:3, 3])


@given(cameras, sizes, sizes, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_resize_keeps_rays(camera, width, height, seed):
    camera = posed(camera, seed)
    small = camera.resized(width, height)
    assert (small.width, small.height) == (width, height)
    uv = grid(small)
    source = (uv + 0.5) * [camera.width / width, camera.height / height] - 0.5  # centres, as OpenCV and PyTorch map
    np.testing.assert_allclose(world_line(small, uv, 2.5), world_line(camera, source, 2.5), atol=1e-8)


@given(cameras, st.integers(-9, 9), st.integers(-9, 9), sizes, sizes)
@settings(max_examples=40, deadline=None)
def test_crop_keeps_rays(camera, left, top, width, height):
    camera = posed(camera, 1)
    part = camera.cropped(left, top, width, height)
    uv = grid(part)
    np.testing.assert_allclose(
        world_line(part, uv, 2.5), world_line(camera, uv + np.array([left, top]), 2.5), atol=1e-8
    )


@given(cameras, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_flip_keeps_world_points_and_undoes_itself(camera, seed):
    camera = posed(camera, seed)
    depth = np.random.default_rng(seed).uniform(0.3, 9, (camera.height, camera.width)).astype(np.float32)
    mirror = camera.flipped()
    points = camera.to_world(camera.unproject(depth))
    mirrored = mirror.to_world(mirror.unproject(np.ascontiguousarray(depth[:, ::-1])))
    np.testing.assert_allclose(mirrored[:, ::-1], points, atol=1e-3, rtol=1e-5)  # fp32 points, up to a km wide
    assert mirror.fx > 0
    assert np.linalg.det(mirror.pose[:3, :3]) == pytest.approx(-1)  # left-handed, as the docstring says
    twice = mirror.flipped()
    np.testing.assert_allclose(twice.matrix, camera.matrix, atol=1e-10)
    np.testing.assert_array_equal(twice.pose, camera.pose)


def test_warp_is_composition():
    camera = posed(Camera(300.0, 310.0, 35.0, 22.0, 64, 48), 4)
    step = camera.resized(32, 24).flipped().cropped(3, 2, 20, 10)
    # u -> 0.5 u - 0.25 -> 31 - that -> minus 3
    affine = np.array([[-0.5, 0, 31 + 0.25 - 3], [0, 0.5, -0.25 - 2]])
    once = camera.warped(affine, 20, 10)
    np.testing.assert_allclose(once.matrix, step.matrix)
    np.testing.assert_array_equal(once.pose, step.pose)


def test_field_of_view():
    camera = Camera.from_fov(640, 480, 60.0)
    assert camera.fov_degrees == pytest.approx(60)
    assert (camera.cx, camera.cy) == (319.5, 239.5)  # the centre of pixels counted from 0 at their centres
    edge = (camera.width - 0.5 - camera.cx) / camera.fx  # the image ends half a pixel beyond the last centre
    assert np.degrees(np.arctan(edge)) == pytest.approx(30)
    assert camera.resized(320, 240).fov_degrees == pytest.approx(60)


def test_behind_the_camera_is_nan():
    camera = Camera.from_fov(8, 6)
    with np.errstate(all="raise"):  # and without a warning
        uv, z = camera.project(np.array([[0.0, 0, -1], [0, 0, 0], [0, 0, 2]]))
    assert np.isnan(uv[:2]).all()
    np.testing.assert_array_equal(z, [-1, 0, 2])
    np.testing.assert_allclose(uv[2], [3.5, 2.5])


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="positive"):
        Camera(0.0, 1.0, 0.0, 0.0, 4, 4)
    with pytest.raises(ValueError, match="positive"):
        Camera(1.0, 1.0, 0.0, 0.0, 4, 0)
    camera = Camera.from_fov(8, 6)
    with pytest.raises(ValueError, match=r"4x3.*8x6"):
        camera.unproject(np.ones((3, 4), np.float32))
    for move in (camera.to_world, camera.to_camera):
        with pytest.raises(ValueError, match="no pose"):
            move(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="skew"):
        camera.warped(np.array([[1, 0.1, 0], [0, 1.0, 0]]), 8, 6)
