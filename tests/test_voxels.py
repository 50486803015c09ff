"""Voxel grids, TSDF and projections: against plain references, closed forms, and SSCNet's own files."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.ops import projection, voxels
from enfilade.ops.tsdf import tsdf, tsdf_reference, visibility
from enfilade.ops.voxels import VoxelGrid, downsample_labels, pixel_voxels, place_grid, score_masks, voxel_pixels

CAMERA = Camera(70.0, 72.0, 39.0, 31.5, 80, 60)
# World axes X, Y, Z of a level camera that looks along Y.
LEVEL = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def level_grid(shape=(40, 24, 40), size=0.05, angles=(0, 0, 0), origin=(-1.0, 0.3, -0.05), height=0.6):
    pose = np.eye(4)
    pose[:3, :3] = LEVEL @ Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    pose[2, 3] = height
    return VoxelGrid(np.array(origin), pose, size, shape)


def bumpy_depth(seed=0, camera=CAMERA):
    """A wavy wall with boxes before it, and holes of every kind."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[: camera.height, : camera.width]
    depth = 1.6 + 0.3 * np.sin(u / 9) + 0.2 * np.cos(v / 7)
    for _ in range(4):
        top, left = rng.integers(0, camera.height - 15), rng.integers(0, camera.width - 20)
        depth[top : top + 15, left : left + 20] = rng.uniform(0.6, 1.4)
    depth[rng.random(depth.shape) < 0.05] = 0
    depth[3, 5], depth[4, 5], depth[5, 5], depth[6, 5] = np.nan, np.inf, 0.3, 9.0
    return depth.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- the grid


def test_a_voxel_lies_where_the_conventions_say():
    """Right is x, up is y, ahead is z, and a point is in the voxel that its coordinates floor to."""
    grid = level_grid(origin=(0.0, 0.0, 0.0), height=0.0)
    camera = Camera(50.0, 50.0, 0.0, 0.0, 40, 30)
    depth = np.zeros((30, 40))
    depth[0, 10] = 1.0  # 0.2 m to the right, level, 1 m ahead
    index = pixel_voxels(depth, camera, grid)
    assert np.unravel_index(index[0, 10], grid.shape) == (4, 0, 20)
    assert (index[depth == 0] == -1).all()
    above = level_grid(origin=(0.0, 0.0, -0.42), height=0.0)
    assert np.unravel_index(pixel_voxels(depth, camera, above)[0, 10], grid.shape) == (4, 8, 20)


@pytest.mark.parametrize("angles", [(0, 0, 0), (-20, 15, 5), (60, 100, 170)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixels_and_voxels_find_each_other_as_in_the_references(angles, dtype):
    grid, depth = level_grid(angles=angles), bumpy_depth().astype(dtype)
    for threads in (1, 2):
        found = pixel_voxels(depth, CAMERA, grid, threads=threads)
        np.testing.assert_array_equal(found, voxels.pixel_voxels_reference(depth, CAMERA, grid))
        for at in (0.0, 0.5):
            seen = voxel_pixels(CAMERA, grid, at=at, threads=threads)
            np.testing.assert_array_equal(seen, voxels.voxel_pixels_reference(CAMERA, grid, at=at)[0])


def test_voxels_project_through_the_camera_class():
    """The same pixels by `Camera.project`, which knows nothing of grids."""
    grid = level_grid(angles=(-15, 20, 3))
    i, j, k = np.indices(grid.shape)
    points = grid.origin + grid.size * (np.stack([i, k, j], -1) + 0.5)
    posed = Camera(70.0, 72.0, 39.0, 31.5, 80, 60, grid.pose)
    uv, _ = posed.project(posed.to_camera(points))
    with np.errstate(invalid="ignore"):
        u, v = np.floor(uv + 0.5).transpose(3, 0, 1, 2)
        inside = (u >= 0) & (u < 80) & (v >= 0) & (v < 60)
    expected = np.where(inside, np.nan_to_num(v) * 80 + np.nan_to_num(u), -1)
    # Rounding differs in the last digit, so a point on the border of two pixels may go to either.
    assert (voxel_pixels(CAMERA, grid, at=0.5) != expected).mean() < 1e-4
    assert inside.mean() > 0.2


def test_a_pixel_point_projects_back_to_its_pixel():
    """In voxels of a tenth of a millimetre the voxel that a pixel's point lies in falls on that pixel."""
    grid = level_grid(shape=(100, 100, 100), size=1e-4, origin=(-0.005, 0.995, 0.595))
    camera = Camera(3000.0, 3000.0, 20.0, 15.0, 41, 31)
    depth = np.full((31, 41), 1.0)
    index = pixel_voxels(depth, camera, grid)
    pixels = voxel_pixels(camera, grid, at=0.5).reshape(-1)
    known = index >= 0
    assert known.sum() > 500
    np.testing.assert_array_equal(pixels[index[known]], np.flatnonzero(known))


def test_the_coarse_grid_holds_the_fine_one():
    grid, depth = level_grid(angles=(-20, 10, 0)), bumpy_depth()
    fine, coarse = pixel_voxels(depth, CAMERA, grid), pixel_voxels(depth, CAMERA, grid.coarse())
    known = fine >= 0
    np.testing.assert_array_equal(known, coarse >= 0)
    parents = np.array(np.unravel_index(fine[known], grid.shape)) // 4
    np.testing.assert_array_equal(np.ravel_multi_index(parents, grid.coarse().shape), coarse[known])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"origin": np.array([0.0, np.nan, 0.0])}, "a grid's origin is three numbers in metres"),
        ({"pose": np.zeros((4, 4))}, "a grid's pose is an invertible 4x4 matrix"),
        ({"size": 0.0}, "voxels of positive size"),
    ],
)
def test_grids_that_cannot_be(change, sentence):
    with pytest.raises(UserError, match=sentence):
        VoxelGrid(**{"origin": np.zeros(3), "pose": np.eye(4)} | change)


def test_sizes_that_do_not_fit_are_told():
    grid = level_grid()
    with pytest.raises(UserError, match="depth is 40x30, its camera 80x60: resize one"):
        tsdf(np.ones((30, 40)), CAMERA, grid)
    with pytest.raises(UserError, match=r"a grid of \(40, 24, 40\) voxels cannot be divided by 7"):
        grid.coarse(7)
    with pytest.raises(UserError, match=r"a truncation of 0\.01 m is 0 voxels of 0\.05 m: choose one of 1 to 255"):
        tsdf(np.ones((60, 80)), CAMERA, grid, truncation=0.01)


# ---------------------------------------------------------------------------------------------------------- the TSDF


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("angles", [(0, 0, 0), (-25, 20, 5), (10, 150, 0), (90, 0, 0)])
def test_tsdf_is_the_reference(angles, flipped):
    """To the last bit: distances are whole numbers of squared steps, and both divide and round alike."""
    for seed, shape in enumerate([(40, 24, 40), (7, 31, 13), (1, 1, 5)]):
        grid, depth = level_grid(shape=shape, angles=angles), bumpy_depth(seed)
        expected = tsdf_reference(depth, CAMERA, grid, flipped=flipped)
        for threads in (1, 2):
            np.testing.assert_array_equal(tsdf(depth, CAMERA, grid, flipped=flipped, threads=threads), expected)
    np.testing.assert_array_equal(
        tsdf(depth.astype(np.float64), CAMERA, grid, flipped=flipped, truncation=0.6),
        tsdf_reference(depth.astype(np.float64), CAMERA, grid, flipped=flipped, truncation=0.6),
    )


def test_tsdf_of_a_wall_in_closed_form():
    """A wall 1.02 m ahead: value and sign follow from the steps to its layer of voxels."""
    grid = level_grid(shape=(10, 10, 40), size=0.05, origin=(-0.25, 0.0, 0.35))
    plain = tsdf(np.full((60, 80), 1.02, np.float32), CAMERA, grid, flipped=False, truncation=0.25)
    steps = 20 - np.arange(40)
    # Pixels see 2.6 times the breadth of the block at the wall; before 0.5 m parts of it are out of view.
    expected = np.sign(steps) * np.minimum(np.abs(steps) / 5, 1)
    np.testing.assert_allclose(plain[2:8, 2:8, 12:], np.broadcast_to(expected[12:], (6, 6, 28)), atol=1e-6)
    flipped = tsdf(np.full((60, 80), 1.02, np.float32), CAMERA, grid, truncation=0.25)
    sign = np.where(steps < 0, -1, 1)
    expected = sign * np.maximum(0.001, 1 - np.abs(expected))
    np.testing.assert_allclose(flipped[2:8, 2:8, 12:], np.broadcast_to(expected[12:], (6, 6, 28)), atol=1e-6)


def test_distance_against_a_plain_search():
    """Not by SciPy: all pairs of voxels."""
    grid = level_grid(shape=(12, 10, 12), size=0.1, angles=(-20, 10, 0), origin=(-0.6, 0.6, 0.0))
    depth = bumpy_depth(3)
    plain = tsdf(depth, CAMERA, grid, flipped=False, truncation=0.4)
    index = pixel_voxels(depth, CAMERA, grid)
    surface = np.stack(np.unravel_index(np.unique(index[index >= 0]), grid.shape), -1)
    every = np.stack(np.indices(grid.shape), -1).reshape(-1, 1, 3)
    distance = np.sqrt(((every - surface) ** 2).sum(-1).min(-1)).reshape(grid.shape)
    states = visibility(depth, CAMERA, grid)
    in_view = states != voxels.OUTSIDE
    np.testing.assert_allclose(np.abs(plain[in_view]), np.minimum(distance[in_view] / 4, 1), atol=1e-6)
    assert (plain[states == voxels.OUTSIDE] == 1).all()
    assert (plain[states == voxels.SURFACE] == 0).all()
    assert (plain[states == voxels.FREE] > 0).all()
    assert (plain[states == voxels.OCCLUDED] < 0).all()
    assert all((states == state).any() for state in range(4))


def test_tsdf_without_depth_is_unknown_everywhere():
    for missing in (0.0, np.nan, 0.2):  # 0.2 m is nearer than a camera can be trusted with, and before the grid
        out = tsdf(np.full((60, 80), missing), CAMERA, level_grid())
        np.testing.assert_array_equal(out, np.full(out.shape, np.float32(0.001)))


@pytest.mark.shared
def test_tsdf_of_the_real_frame(shared_data):
    depth, camera, grid, _, stored = real_frame(shared_data)
    found = tsdf(depth, camera, grid)
    error = np.abs(found - stored["tsdf"][..., 0])
    print(f"mean error {error.mean():.2g}, largest {error.max():.2g}")
    # Both are float32 of magnitude 1: nothing but the last digit may differ, in any of 8.3 million voxels.
    assert error.max() < 1e-6


# ------------------------------------------------------------------------------------------------------ label volumes


def plain_downsample(labels, factor=4):
    """As in SSCNet's layer, block by block."""
    out = np.zeros([n // factor for n in labels.shape], np.uint8)
    for i, j, k in np.ndindex(out.shape):
        block = labels[tuple(slice(factor * n, factor * n + factor) for n in (i, j, k))].reshape(-1).tolist()
        empty, unknown = block.count(0), block.count(255)
        if empty + unknown > 0.95 * len(block):
            out[i, j, k] = 0 if empty > unknown else 255
        else:
            classes = [label for label in block if label not in (0, 255)]
            out[i, j, k] = min(set(classes), key=lambda label: (-classes.count(label), label))
    return out


def patchy_labels(shape, seed=0):
    """Blocks of every mixture: all empty, nearly empty around the threshold of 95 %, ties, and all classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.5] = 255
    coarse = [n // 4 for n in shape]
    share = rng.choice([0, 0.9, 0.93, 0.95, 0.97, 1], coarse).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    fill = rng.choice([0, 255], coarse).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    return np.where(rng.random(shape) < share, fill, labels).astype(np.uint8)


def test_downsampling_is_the_plain_loop():
    labels = patchy_labels((48, 36, 28))
    expected = plain_downsample(labels)
    for threads in (1, 2):
        np.testing.assert_array_equal(downsample_labels(labels, threads=threads), expected)
    np.testing.assert_array_equal(voxels.downsample_labels_reference(labels), expected)
    np.testing.assert_array_equal(downsample_labels(labels, 2), plain_downsample(labels, 2))
    assert set(np.unique(expected)) == {*range(12), 255}


def test_labels_that_cannot_be_divided_are_told():
    with pytest.raises(UserError, match=r"a label volume of \(6, 4, 4\) voxels cannot be divided by 4"):
        downsample_labels(np.zeros((6, 4, 4), np.uint8))


def test_masks_follow_their_definitions():
    grid, depth = level_grid(angles=(-20, 10, 0)), bumpy_depth()
    states = visibility(depth, CAMERA, grid)
    labels = downsample_labels(patchy_labels(grid.shape))
    masks = score_masks(labels, states)
    for i, j, k in np.ndindex(labels.shape):
        block = states[4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4]
        occluded, in_view = (block == 3).sum() > 32, (block != 0).sum() >= 32
        assert masks.occluded[i, j, k] == occluded
        assert masks.surface[i, j, k] == (block == 2).any()
        full_or_hidden = 0 < labels[i, j, k] < 255 or (labels[i, j, k] == 0 and occluded)
        assert masks.scored[i, j, k] == (full_or_hidden and in_view)
    touched = np.zeros(labels.shape, bool)
    coarse = pixel_voxels(depth, CAMERA, grid.coarse())
    touched.reshape(-1)[coarse[coarse >= 0]] = True
    np.testing.assert_array_equal(masks.surface, touched)
    np.testing.assert_array_equal(masks.completion, masks.scored & ~touched)
    assert not (masks.free & masks.occluded).any()
    assert masks.free.any()
    assert masks.completion.any()
    np.testing.assert_array_equal(score_masks(labels, np.full(labels.shape, 3, np.uint8)).scored, labels != 255)
    with pytest.raises(UserError, match="does not divide into labels"):
        score_masks(labels, states[:, :-1])


@pytest.mark.shared
def test_labels_and_masks_of_the_real_frame(shared_data):
    depth, camera, grid, labels, stored = real_frame(shared_data)
    coarse = downsample_labels(labels)
    known = coarse != 255
    # The stored labels have 0 where ours have 255.
    np.testing.assert_array_equal(np.where(known, coarse, 0), stored["lbl"][..., 0])
    found, expected = score_masks(coarse, visibility(depth, camera, grid)).scored, (stored["weights"] > 0) & known
    iou = (found & expected).sum() / (found | expected).sum()
    print(f"IoU of scored voxels {iou:.3f}")
    assert iou > 0.98  # the rule behind the stored mask is not published


# -------------------------------------------------------------------------------------------------------- projections

REDUCE = ("mean", "max")


def small_case(seed=0, b=2, c=3, h=5, w=6, shape=(3, 2, 4), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(b, c, h, w, generator=g, dtype=dtype)
    index = torch.randint(-1, 3 * 2 * 4 - 2, (b, h, w), generator=g, dtype=torch.int32)  # the last voxel stays empty
    volume = torch.randn(b, c, *shape, generator=g, dtype=dtype)
    return features, index, volume


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduce", REDUCE)
def test_to_voxels_is_the_plain_loop(reduce, dtype):
    features, index, _ = small_case(dtype=dtype)
    out = projection.to_voxels(features, index, (3, 2, 4), reduce=reduce)
    for b, c, cell in np.ndindex(2, 3, 24):
        inside = features[b, c][index[b] == cell]
        expected = 0.0 if len(inside) == 0 else float(inside.mean() if reduce == "mean" else inside.max())
        assert out[b, c].reshape(-1)[cell].item() == pytest.approx(expected, abs=1e-6)
    assert (out.flatten(2)[..., -1] == 0).all()
    spread = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(projection.to_voxels(spread, index.long(), (3, 2, 4), reduce=reduce), out)


def test_to_pixels_and_along_rays_are_plain_loops():
    features, index, volume = small_case()
    seen = projection.to_pixels(volume, index)
    for b, v, u in np.ndindex(*index.shape):
        cell = index[b, v, u]
        expected = torch.zeros(3, dtype=torch.float64) if cell < 0 else volume[b].flatten(1)[:, cell]
        torch.testing.assert_close(seen[b, :, v, u], expected)
    pixels = torch.randint(-1, 30, (2, 3, 2, 4), generator=torch.Generator().manual_seed(1))
    cast = projection.along_rays(features, pixels)
    for b, i, j, k in np.ndindex(*pixels.shape):
        pixel = pixels[b, i, j, k]
        expected = torch.zeros(3, dtype=torch.float64) if pixel < 0 else features[b].flatten(1)[:, pixel]
        torch.testing.assert_close(cast[b, :, i, j, k], expected)


def test_a_visible_voxel_returns_what_was_put_there():
    """Constants per voxel survive the way there and back, by mean and by maximum."""
    _, index, volume = small_case()
    image = projection.to_pixels(volume, index)
    for reduce in REDUCE:
        again = projection.to_pixels(projection.to_voxels(image, index, (3, 2, 4), reduce=reduce), index)
        torch.testing.assert_close(again, image)


@pytest.mark.parametrize("reduce", REDUCE)
def test_gradients_to_voxels(reduce):
    features, index, _ = small_case(h=4, w=4)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: projection.to_voxels(f, index, (3, 2, 4), reduce=reduce), features)


def test_gradients_to_pixels_and_along_rays():
    features, index, volume = small_case(h=4, w=4)
    assert torch.autograd.gradcheck(lambda x: projection.to_pixels(x, index), volume.requires_grad_())
    pixels = torch.randint(-1, 16, (2, 3, 2, 4), generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: projection.along_rays(x, pixels), features.requires_grad_())


@pytest.mark.parametrize("reduce", REDUCE)
def test_compiled_loops_agree_with_torch_operations(reduce):
    """Also where pixels tie for the maximum, as zeros after a ReLU do."""
    features, index, volume = small_case(seed=4, h=20, w=30)
    given = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    flat, where = features.relu().flatten(2), index.flatten(1)
    results = []
    for function in (projection._ToVoxels.apply, projection._to_voxels_torch):
        x = flat.clone().requires_grad_()
        out = function(x, where, 24, reduce == "max")
        out.backward(given)
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(*(r[0] for r in results))
    torch.testing.assert_close(*(r[1] for r in results))
    torch.testing.assert_close(
        projection._Gather.apply(volume.flatten(2), where), projection._gather_torch(volume.flatten(2), where)
    )


def test_other_types_run_torch_operations():
    features, index, volume = small_case()
    half = projection.to_voxels(features.bfloat16(), index, (3, 2, 4), reduce="max")
    assert half.dtype == torch.bfloat16
    single = projection.to_voxels(features.bfloat16().float(), index, (3, 2, 4), reduce="max")
    torch.testing.assert_close(half.float(), single)  # a maximum rounds nothing
    assert projection.to_pixels(volume.bfloat16(), index).dtype == torch.bfloat16


def test_projections_tell_what_does_not_fit():
    features, index, volume = small_case()
    with pytest.raises(UserError, match=r"features are \(2, 3, 5, 6\), but the voxels of their pixels \(2, 4, 6\)"):
        projection.to_voxels(features, index[:, 1:], (3, 2, 4))
    with pytest.raises(UserError, match=r"voxel \d+ is outside a volume of 8 voxels: is it of another size"):
        projection.to_voxels(features, index, (2, 2, 2))
    with pytest.raises(UserError, match="a batch of 1 volumes cannot be seen in a batch of 2 images"):
        projection.to_pixels(volume[:1], index)
    with pytest.raises(UserError, match="pixel 99 is outside an image of 30 pixels"):
        projection.along_rays(features, torch.full((2, 1, 1, 1), 99))


# -------------------------------------------------------------------------------------------------- one's own camera


def box_room(rotation, height, camera, size=(1.8, 2.1, 3.5, 1.3)):
    """Depth in a box-shaped room, `height` m above its floor; `rotation` takes the room's axes to the camera's."""
    right, left, front, above = size
    faces = [((0, 1, 0), height), ((0, -1, 0), above), ((1, 0, 0), right), ((-1, 0, 0), left), ((0, 0, 1), front)]
    depths = []
    for normal, distance in faces:
        slope = camera.rays() @ rotation.apply(normal)
        depths.append(np.where(slope > 1e-6, distance / np.where(slope > 1e-6, slope, 1), np.inf))
    return np.min(depths, 0)


def apart(a, b):
    """The angle between two unit vectors in degrees, exact where it is small."""
    return np.degrees(2 * np.arcsin(min(1, np.linalg.norm(a - b) / 2)))


WIDE = Camera(65.0, 65.0, 79.5, 59.5, 160, 120)


@pytest.mark.parametrize("tilt", [(0, 0, 0), (-14, 25, 6), (12, -35, -8)])
@pytest.mark.parametrize("given", [True, False])
def test_place_grid_in_a_tilted_room(tilt, given):
    """Gravity, height and the walls' direction are recovered, and the room stands straight in its grid."""
    rotation = Rotation.from_euler("xyz", tilt, degrees=True)
    depth = box_room(rotation, 1.42, WIDE)
    grid = place_grid(depth, WIDE, rotation.apply([0, 9.81, 0]) if given else None)
    up, forward = grid.pose[2, :3], grid.pose[1, :3]
    assert apart(up, -rotation.apply([0, 1, 0])) < (1e-3 if given else 1)
    assert grid.pose[2, 3] == pytest.approx(1.42, abs=0.02)
    np.testing.assert_allclose(grid.pose[:3, :3] @ grid.pose[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(grid.pose) == pytest.approx(1)
    # The wall ahead (within 45 degrees) is across Y.
    assert apart(forward, rotation.apply([0, 0, 1])) < 1
    points = WIDE.unproject(depth) @ grid.pose[:3, :3].T + grid.pose[:3, 3]
    assert np.percentile(points[..., 2], 5) == pytest.approx(0, abs=0.03)
    assert grid.origin[2] == -0.05


def test_place_grid_without_walls_follows_the_camera():
    rotation = Rotation.from_euler("xyz", (-10, 25, 0), degrees=True)
    grid = place_grid(box_room(rotation, 1.2, WIDE), WIDE, rotation.apply([0, 1, 0]), walls=False, height=1.5)
    axis = grid.pose[:3, 2]
    assert axis[0] == pytest.approx(0, abs=1e-9)
    assert axis[1] > 0.9
    assert grid.pose[2, 3] == 1.5
    assert grid.origin[0] == pytest.approx(-2.4)


def test_place_grid_for_a_camera_that_looks_down():
    depth = np.full((120, 160), 1.7)
    grid = place_grid(depth, WIDE, np.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(grid.pose[:3, :3], [[1, 0, 0], [0, -1, 0], [0, 0, -1]], atol=1e-9)
    assert grid.pose[2, 3] == pytest.approx(1.7, abs=0.01)


def test_floor_out_of_view_puts_the_camera_at_130_cm():
    level = np.array([0.0, 1.0, 0.0])
    assert place_grid(np.full((120, 160), 0.8), WIDE, level).pose[2, 3] == 1.3
    # The top of a table before a wall that goes on below it is not the floor.
    depth = np.minimum(np.full((120, 160), 1.4), box_room(Rotation.identity(), 0.5, WIDE))
    depth[100:, :60] = 1.3
    assert place_grid(depth, WIDE, level).pose[2, 3] >= 1.0


def test_place_grid_in_rendered_rooms():
    """Furnished rooms, whose camera and world are known."""
    from enfilade.data.rooms import room

    errors = []
    for seed in range(3):
        sample = room(seed, width=128, height=96, voxels=False, threads=1)
        grid = place_grid(sample.depth.astype(np.float64), sample.camera)
        truth = sample.camera.pose
        up, yaw = (apart(grid.pose[axis, :3], truth[axis, :3]) for axis in (2, 1))
        errors.append((up, yaw, abs(grid.pose[2, 3] - truth[2, 3])))
    print(np.round(errors, 3).tolist())
    # The floor is in view, and its plane good to a voxel over 3 m, which is 0.4 degrees; furniture may stand askew
    # before the walls.
    up, yaw, height = np.max(errors, 0)
    assert up < 0.5
    assert yaw < 4
    assert height < 0.02


@pytest.mark.parametrize(
    ("depth", "options", "sentence"),
    [
        (0.0, {}, "the depth map has no known pixel"),
        (1.0, {"gravity": np.zeros(3)}, "gravity is a direction in the camera frame, three finite numbers"),
        (1.0, {"gravity": np.array([0.0, 1.0, 0.0]), "height": -1.0}, "height above the floor is a positive number"),
    ],
)
def test_place_grid_tells_what_is_wrong(depth, options, sentence):
    with pytest.raises(UserError, match=sentence):
        place_grid(np.full((120, 160), depth), WIDE, **options)


@pytest.mark.shared
def test_place_grid_on_the_real_frame(shared_data):
    """The grid that SSCNet's authors placed by hand-labelled rooms, from the depth alone."""
    depth, camera, grid, _, _ = real_frame(shared_data)
    found = place_grid(depth, camera)
    angle = np.degrees(np.arccos((np.trace(found.pose[:3, :3] @ grid.pose[:3, :3].T) - 1) / 2))
    print(f"{angle:.2f} degrees apart, height {found.pose[2, 3]:.2f} of {grid.pose[2, 3]:.2f} m")
    assert angle < 2
    assert abs(found.pose[2, 3] - grid.pose[2, 3]) < 0.1  # no floor is in view: the usual 1.3 m


def real_frame(shared_data):
    from enfilade.data import ssc

    folder = shared_data / "nyu_ssc"
    volume, pose = ssc.read_bin(folder / "NYU0003_0000.bin")
    depth = ssc.read_depth(folder / "NYU0003_0000.png")
    stored = np.load(folder / "NYU0003_0000_TSDF.npz")
    return depth, ssc.CAMERA, VoxelGrid(volume.origin, pose), volume.labels, stored
