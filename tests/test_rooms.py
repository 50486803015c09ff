"""Procedural rooms: the maps agree with each other and with geometry worked out apart from the ray caster."""

import dataclasses

import numpy as np
import pytest

from enfilade import labels
from enfilade.data import room_layout, room_render, room_scene, room_voxels, rooms
from enfilade.data.room_materials import Materials
from enfilade.data.room_mesh import box, cylinder, ellipsoid, lathe, prism, sheet, tube

SEEDS = (3, 11, 42)
NYU40 = {name: i for i, name in enumerate(labels.get("nyu40").names)}


@pytest.fixture(scope="module")
def scenes():
    return {seed: room_scene.build(seed, 96, 72) for seed in SEEDS}


@pytest.fixture(scope="module")
def frames(scenes):
    return {seed: room_render.render(scene, np.random.default_rng(seed)) for seed, scene in scenes.items()}


def fields(sample):
    return {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}


def test_same_seed_same_bits_with_any_threads():
    a = rooms.room(7, width=96, height=72, voxels=True, noise=True)
    b = rooms.room(7, width=96, height=72, voxels=True, noise=True, threads=1)
    for name in ("image", "labels", "depth", "instances", "normals"):
        np.testing.assert_array_equal(fields(a)[name], fields(b)[name])
    np.testing.assert_array_equal(a.camera.pose, b.camera.pose)
    np.testing.assert_array_equal(a.voxels.labels, b.voxels.labels)
    assert (a.depth == 0).any()


def test_seeds_differ_and_size_keeps_the_room():
    a, b = rooms.room(1, width=48, height=36), rooms.room(2, width=48, height=36)
    assert not np.array_equal(a.labels, b.labels)
    large = rooms.room(1, width=96, height=72)
    np.testing.assert_array_equal(large.camera.pose, a.camera.pose)
    # Pixel centres differ by a quarter of a pixel, so only borders of objects may change.
    assert (large.labels[::2, ::2] == a.labels).mean() > 0.85


def test_data_set_follows_the_reader_interface():
    data = rooms.Rooms(3, seed=5, width=48, height=36, space="ssc12")
    assert len(data) == len(data.names) == 3
    assert data.space.name == "ssc12"
    sample = data[1]
    assert sample.name == data.names[1]
    plain = rooms.room(6, width=48, height=36)
    np.testing.assert_array_equal(sample.labels, labels.mapping("nyu40", "ssc12")[plain.labels])
    np.testing.assert_array_equal(data[-2].image, sample.image)
    assert sum(1 for _ in zip(range(9), iter_items(data))) == 3
    with pytest.raises(IndexError):
        data[3]


def iter_items(data):
    """Old-style iteration ends at the IndexError."""
    i = 0
    while True:
        try:
            yield data[i]
        except IndexError:
            return
        i += 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="seed"):
        rooms.room(-1)
    with pytest.raises(ValueError, match="8x8"):
        rooms.room(1, width=4, height=4)
    with pytest.raises(ValueError, match="length"):
        rooms.Rooms(0)
    with pytest.raises(ValueError):
        rooms.Rooms(1, space="nyu41")


@pytest.mark.parametrize("seed", SEEDS)
def test_pose_is_a_held_camera(scenes, seed):
    scene = scenes[seed]
    pose = scene.camera.pose
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
    assert pose[0, 3] == pose[1, 3] == 0
    assert 1.2 <= pose[2, 3] <= 1.75
    x, y, z = pose[:3, 2]
    assert abs(x) <= y * 1.001  # within 45 degrees of +Y
    assert np.radians(-26) < np.arcsin(z) < np.radians(6)
    assert -pose[2, 1] > np.cos(np.radians(30))  # the image's down points down


@pytest.mark.parametrize("seed", SEEDS)
def test_floor_and_ceiling_depth_is_that_of_a_plane(scenes, frames, seed):
    scene, frame = scenes[seed], frames[seed]
    pose = scene.camera.pose
    rise = (scene.camera.rays() @ pose[:3, :3].T)[..., 2]
    for name, level in (("floor", 0.0), ("ceiling", scene.height)):
        mask = frame.labels == NYU40[name]
        expected = (level - pose[2, 3]) / rise[mask]
        # embree traces in single precision: about 1e-6 of some metres, more where the ray grazes.
        np.testing.assert_allclose(frame.depth[mask], expected, rtol=2e-5)
    assert (frame.labels == NYU40["floor"]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_wall_points_lie_on_the_plan(scenes, frames, seed):
    scene, frame = scenes[seed], frames[seed]
    points = scene.camera.to_world(scene.camera.unproject(frame.depth))[frame.labels == NYU40["wall"]]
    a, b = scene.plan, np.roll(scene.plan, -1, 0)
    normal = np.stack([a[:, 1] - b[:, 1], b[:, 0] - a[:, 0]], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    distance = np.abs(((points[:, None, :2] - a) * normal).sum(-1)).min(1)
    assert distance.max() < 0.0141 + 1e-4  # skirting boards stand out by 14 mm
    assert np.median(distance) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_are_those_of_the_depth(scenes, frames, seed):
    scene, frame = scenes[seed], frames[seed]
    points = scene.camera.unproject(frame.depth).astype(float)
    normals = frame.normals
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    assert ((normals * scene.camera.rays()).sum(-1) <= 1e-6).all()
    for axis in (0, 1):
        first, second = [slice(None)] * 2, [slice(None)] * 2
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        first, second = tuple(first), tuple(second)
        step = points[second] - points[first]
        same = (frame.instances[first] == frame.instances[second]) & (frame.labels[first] == NYU40["floor"])
        same &= (normals[first] * normals[second]).sum(-1) > 1 - 1e-6
        assert same.any()
        assert np.abs((step * normals[first]).sum(-1))[same].max() < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_maps_are_valid_and_pictures_are_exposed(frames, seed):
    frame = frames[seed]
    assert frame.labels.dtype == np.uint8
    assert frame.labels.max() < 40
    assert frame.depth.dtype == np.float32
    assert np.isfinite(frame.depth).all()
    assert frame.depth.min() > 0.25
    assert frame.depth.max() < 15
    for instance in np.unique(frame.instances):
        assert len(np.unique(frame.labels[frame.instances == instance])) == 1
    assert frame.image.min() >= 0
    assert frame.image.max() <= 1
    assert 0.15 < frame.image.mean() < 0.85  # neither black nor burnt out
    assert frame.image.std() > 0.08


def test_many_kinds_of_objects_are_built():
    seen: set[int] = set()
    for seed in range(14):
        seen |= set(room_layout.arrange(np.random.default_rng(seed), room_layout.ROOMS[seed % 7]).world.labels)
    furniture = seen - {NYU40[name] for name in ("wall", "floor", "ceiling", "door", "window", "picture")}
    assert len(furniture) >= 30, sorted(set(NYU40.values()) - seen)


def watertight(solid) -> bool:
    """Each edge is used once in each direction."""
    edges = np.concatenate([solid.faces[:, [0, 1]], solid.faces[:, [1, 2]], solid.faces[:, [2, 0]]])
    n = len(solid.vertices)
    forth, back = np.sort(edges[:, 0] * n + edges[:, 1]), np.sort(edges[:, 1] * n + edges[:, 0])
    return len(np.unique(forth)) == len(forth) and np.array_equal(forth, back)


def volume(solid) -> float:
    a, b, c = (solid.vertices[solid.faces[:, k]] for k in range(3))
    return float((np.cross(a, b) * c).sum() / 6)


def test_solids_have_the_volumes_of_geometry():
    assert volume(box(0, 1, 0, 2, 0, 3)) == pytest.approx(6)
    bevelled = volume(box(0, 1, 0, 2, 0, 3, bevel=0.05))
    assert 5.9 < bevelled < 6
    # Inscribed polygons of n sides have the circle's area times sin(2 pi / n) / (2 pi / n).
    n = 40
    loss = np.sin(2 * np.pi / n) / (2 * np.pi / n)
    assert volume(cylinder(0, 0, 0, 2, 0.5, n=n)) == pytest.approx(2 * np.pi * 0.25 * loss)
    assert volume(tube([(0, 0, 0), (0, 3, 0)], 0.5, n)) == pytest.approx(3 * np.pi * 0.25 * loss)
    assert volume(ellipsoid(0, 0, 0, 1, 2, 3, n=80, rings=80)) == pytest.approx(4 / 3 * np.pi * 6, rel=0.01)
    ring = lathe([(0.5, 0), (1, 0), (1, 1), (0.5, 1)], n=n, closed=True)
    assert volume(ring) == pytest.approx(np.pi * 0.75 * loss)
    assert volume(prism([(0, 0), (1, 0), (0, 1)], 0, 2)) == pytest.approx(1)
    grid = np.stack([*np.meshgrid(np.linspace(1, 0, 5), np.linspace(0, 1, 4)), np.zeros((4, 5))], -1)
    assert volume(sheet(grid, 0.1)) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", room_layout.ROOMS)
def test_every_part_is_a_closed_surface_facing_out(kind):
    plan = room_layout.arrange(np.random.default_rng(1), kind)
    parts = [part for part in plan.world.parts if part.closed]
    assert len(parts) > 50
    assert all(watertight(part.solid) for part in parts)
    assert all(
        volume(part.solid._replace(vertices=part.solid.vertices - part.solid.vertices.mean(0))) > 0 for part in parts
    )


def test_furniture_does_not_share_space():
    for seed in range(2):
        plan = room_layout.arrange(np.random.default_rng(seed))
        thing = room_layout.seats.sofa(Materials(np.random.default_rng(0)))
        spot = plan.on_wall(thing)
        if spot is not None:
            low, high = plan.boxes[spot[2]]
            assert not plan.free(low, high)
            assert plan.free(low, high, ignore=spot[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_volume_agrees_with_the_picture(scenes, frames, seed):
    scene, frame = scenes[seed], frames[seed]
    grid = room_voxels.voxelise(scene)
    assert grid.labels.shape == (240, 144, 240)
    assert set(np.unique(grid.labels)) <= {*range(12), 255}
    points = scene.camera.to_world(scene.camera.unproject(frame.depth)).reshape(-1, 3)
    index = np.floor((points - grid.origin) / grid.size).astype(int)[:, [0, 2, 1]]
    expected = labels.mapping("nyu40", "ssc12")[frame.labels.ravel()]
    inner = ((index > 0) & (index < np.array(grid.labels.shape) - 1)).all(1)
    assert inner.mean() > 0.6  # the volume lies where the camera looks
    index, expected = index[inner], expected[inner]
    exact = grid.labels[tuple(index.T)] == expected
    near = np.zeros(len(index), bool)
    for offset in np.ndindex(3, 3, 3):
        near |= grid.labels[tuple((index + np.array(offset) - 1).T)] == expected
    # Where two things touch within a voxel, the later one has it.
    assert exact.mean() > 0.96
    assert near.mean() > 0.995
    # Between the camera and the surface all is empty: points at 20..90 % of the way, a hand's breadth clear of it.
    eye = scene.camera.pose[:3, 3]
    free = eye + (points - eye) * np.random.default_rng(0).uniform(0.2, 0.9, (len(points), 1))
    clear = np.linalg.norm(free - points, axis=1) > 0.1
    index = np.floor((free - grid.origin) / grid.size).astype(int)[:, [0, 2, 1]]
    inside = clear & ((index >= 0) & (index < grid.labels.shape)).all(1)
    assert (grid.labels[tuple(index[inside].T)] == 0).mean() > 0.98


def test_volume_of_a_box_is_filled():
    """A closed cube holds the voxels whose centres it holds: 50 a side."""
    solid = box(-0.493, 0.493, 1.007, 1.993, 0.013, 1.007)  # between the voxel centres
    vertices, faces = (solid.vertices - [-2.4, 0, -0.05]) / 0.02, solid.faces.astype(np.int32)
    grid = np.zeros((240, 144, 240), np.uint8)
    room_voxels._fill(vertices, faces, 0, 12, 10, grid, np.empty((240, 240, 24)), np.zeros((240, 240), np.int64))
    assert (grid == 10).sum() == 50**3


def test_intrinsics_scale_and_crop():
    full = room_scene.intrinsics(640, 480)
    assert (full.fx, full.cy) == (pytest.approx(518.8579), pytest.approx(253.7362))
    half = room_scene.intrinsics(320, 240)
    assert half.fx == pytest.approx(full.fx / 2)
    assert half.cx == pytest.approx((full.cx + 0.5) / 2 - 0.5)
    wide = room_scene.intrinsics(640, 360)
    assert wide.fx == pytest.approx(full.fx)
    assert wide.cy == pytest.approx(full.cy - 60)


# The Kinect's noise


def flat(z, width=640, height=32):
    camera = room_scene.intrinsics(640, 480)
    camera = dataclasses.replace(camera, width=width, height=height, cy=(height - 1) / 2)
    normals = np.zeros((height, width, 3), np.float32)
    normals[..., 2] = -1
    return np.broadcast_to(np.float32(z), (height, width)).copy(), camera, normals


def test_depth_steps_grow_with_the_square_of_depth():
    gaps = []
    for z in (1.0, 2.0, 4.0):
        slope = np.linspace(z * 0.95, z * 1.05, 640, dtype=np.float32)
        depth, camera, normals = flat(slope)
        seen = rooms.kinect_noise(depth, camera, normals, np.random.default_rng(0))
        levels = np.unique(seen[seen > 0])
        gaps.append(np.median(np.diff(levels)))
        expected = z**2 / (camera.fx * rooms.BASELINE) * rooms.STEP
        # The step at the middle of a ramp of +-5 %, where a step changes by about 10 %.
        assert gaps[-1] == pytest.approx(expected, rel=0.12)
    assert gaps[1] / gaps[0] == pytest.approx(4, rel=0.15)
    assert gaps[2] / gaps[1] == pytest.approx(4, rel=0.15)


def test_noise_is_unbiased_on_a_plane():
    depth, camera, normals = flat(2.0)
    seen = rooms.kinect_noise(depth, camera, normals, np.random.default_rng(1))
    step = 4 / (camera.fx * rooms.BASELINE) * rooms.STEP
    assert np.abs(seen[seen > 0] - 2).max() < 1.5 * step
    assert (seen == 0).mean() < 0.08


def test_shadow_is_as_wide_as_the_baseline_says():
    depth, camera, _ = flat(3.0)
    depth[:, 300:400] = 1.0
    shadow = rooms.projector_shadow(depth, camera)
    columns = np.flatnonzero(shadow[0])
    width = camera.fx * rooms.BASELINE * (1 / 1.0 - 1 / 3.0)
    assert columns.max() == 299  # it ends at the near thing's left edge
    assert len(columns) == pytest.approx(width, abs=1.5)


def test_holes_at_edges_grazing_angles_and_out_of_range():
    depth, camera, normals = flat(3.0)
    depth[:, 300:400] = 1.0
    seen = rooms.kinect_noise(depth, camera, normals, np.random.default_rng(2))
    assert (seen[:, 275:300] == 0).mean() > 5 * (seen[:, 40:200] == 0).mean() + 0.3
    for z in (0.4, 9.0):
        depth, camera, normals = flat(z)
        assert (rooms.kinect_noise(depth, camera, normals, np.random.default_rng(3)) == 0).mean() > 0.99
    depth, camera, normals = flat(2.0)
    normals[:] = [0, -np.cos(np.radians(4)), -np.sin(np.radians(4))]
    assert (rooms.kinect_noise(depth, camera, normals, np.random.default_rng(4)) == 0).mean() > 0.9
