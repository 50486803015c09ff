"""Augmentation against a scene whose truth is a formula: a plane whose texture, labels and depth are known anywhere."""

import numpy as np
import pytest

from enfilade.camera import Camera
from enfilade.data.transforms import Augment, jitter, paste, warp
from enfilade.errors import UserError
from enfilade.types import IGNORE, Sample

W, H = 96, 72
NORMAL = np.array([0.25, -0.35, -1.0]) / np.linalg.norm([0.25, -0.35, -1.0])
OFFSET = -2.5  # n . X = OFFSET for every point X of the plane


def camera() -> Camera:
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]  # looks along world X
    pose[:3, 3] = [0.3, -0.2, 1.5]
    return Camera(80.0, 82.0, 46.3, 37.1, W, H, pose)


def plane_depth(camera: Camera) -> np.ndarray:
    return OFFSET / (camera.rays() @ NORMAL)


def stripes(points: np.ndarray) -> np.ndarray:
    """Label of a point of the plane: upright stripes 0.6 m wide, named by where they stand."""
    return (np.floor(points[..., 0] / 0.6) + 100).astype(np.uint8)


def scene() -> Sample:
    view = camera()
    depth = plane_depth(view)
    points = view.rays() * depth[..., None]
    labels = stripes(points)
    smooth = np.stack([0.5 + 0.1 * points[..., 0], 0.5 + 0.1 * points[..., 1], 0.5 + 0.02 * depth], -1)
    return Sample(
        image=smooth.astype(np.float32),
        labels=labels,
        depth=depth.astype(np.float32),
        camera=view,
        instances=labels.astype(np.int32) * 1000 + 70_000,
        normals=np.broadcast_to(NORMAL, (H, W, 3)).astype(np.float32).copy(),
        hha=smooth.astype(np.float32),
    )


PLAIN = {"scale": 1.0, "flip": 0.0, "colour": 0.0}
CASES = [
    {"size": (72, 96), "flip": 1.0},
    {"size": (40, 50)},
    {"size": (40, 50), "zoom": (1.7, 1.7)},
    {"size": (72, 96), "zoom": (0.6, 0.6), "flip": 1.0},
    {"size": (100, 130), "zoom": (1.2, 1.2), "crop": "centre"},
    {"size": (31, 47), "scale": 0.5, "zoom": (0.8, 1.4), "flip": 0.5},
]


def augmented(case, seed=0, focal=None):
    return Augment(**{**PLAIN, **case}, focal=focal)(scene(), np.random.default_rng(seed))


def source_shift(case) -> float:
    """How far nearest-neighbour values may come from their pixel, in source pixels: half a pixel, and the rounding of
    OpenCV's fixed-point coordinates (1/32)."""
    return 0.5 + 1 / 32


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_points_stay_on_the_plane_in_the_world(case, seed):
    sample = augmented(case, seed)
    assert sample.image.shape == (*case["size"], 3)
    assert (sample.camera.height, sample.camera.width) == case["size"]
    seen = sample.depth > 0
    assert seen.mean() > 0.3
    world = sample.camera.to_world(sample.camera.unproject(sample.depth))
    before = camera()
    back = before.to_camera(world)
    # Depth comes from a pixel up to half a source pixel away in u and v; on the plane that is so much of depth:
    depth = plane_depth(before)
    slope = np.abs(np.diff(depth, axis=0)).max() + np.abs(np.diff(depth, axis=1)).max()
    error = np.abs(back @ NORMAL - OFFSET)[seen]
    ray = np.linalg.norm(before.rays(), axis=-1).max()
    assert error.max() < source_shift(case) * slope * ray
    assert error.mean() < 0.5 * source_shift(case) * slope * ray


@pytest.mark.parametrize("case", CASES)
def test_canonical_depth_follows_the_focal_length(case):
    focal = 33.0
    plain, canonical = augmented(case, 3), augmented(case, 3, focal)
    # depth = true depth x f0 / f, where f is the focal length after the warp
    np.testing.assert_allclose(canonical.depth, plain.depth * focal / plain.camera.fx, rtol=1e-6)
    assert canonical.camera.fx == focal
    assert canonical.camera.fy / focal == pytest.approx(82 / 80)  # pixels keep their shape
    # x = (u - cx) z / f: what is seen keeps its metric width
    a = plain.camera.unproject(plain.depth)
    b = canonical.camera.unproject(canonical.depth)
    np.testing.assert_allclose(a[..., :2], b[..., :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize(("scale", "size"), [(1.0, (40, 50)), (0.5, (31, 47)), (1.7, (90, 131)), (0.37, (100, 120))])
def test_the_middle_stays_the_middle(scale, size, flip):
    """A centre crop of an image whose principal point is its centre has its principal point in its centre."""
    middle = Camera(80.0, 80.0, (W - 1) / 2, (H - 1) / 2, W, H)
    augment = Augment(size, scale=scale, flip=flip, colour=0.0, crop="centre")
    out = augment(scene().replace(camera=middle), np.random.default_rng(0))
    assert out.camera.cx == pytest.approx((size[1] - 1) / 2)
    assert out.camera.cy == pytest.approx((size[0] - 1) / 2)


def test_zoom_divides_depth_without_a_camera():
    sample = scene().replace(camera=None)
    augment = Augment((H, W), **PLAIN, focal=500.0, zoom=(2.0, 2.0), crop="centre")
    out = augment(sample, np.random.default_rng(0))
    assert out.camera is None
    assert set(np.unique(out.depth)) <= {np.float32(d) / np.float32(2) for d in sample.depth.ravel()}


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_image_labels_depth_and_hha_stay_aligned(case, seed):
    """The image tells each pixel's x coordinate, the truth says where stripes meet: they agree to half a pixel."""
    sample = augmented(case, seed)
    inside = (sample.labels != IGNORE) & (sample.depth > 0)
    assert inside.mean() > 0.3
    eroded = inside.copy()
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            eroded &= np.roll(inside, step, axis)
    eroded[:2] = eroded[-2:] = False
    eroded[:, :2] = eroded[:, -2:] = False
    x = (sample.image[..., 0] - 0.5) / 0.1  # read back from the texture, which was interpolated
    names = sample.labels.astype(int) - 100
    low, high = names * 0.6, (names + 1) * 0.6
    outside = np.maximum(np.maximum(low - x, x - high), 0)[eroded]  # metres on the wrong side of a stripe's edge
    per_pixel = np.abs(np.diff((scene().image[..., 0] - 0.5) / 0.1, axis=1)).max()  # of a source pixel
    assert outside.max() < source_shift(case) * per_pixel * 1.2  # 1.2: the blur before shrinking, on a curved texture
    np.testing.assert_allclose(sample.hha[eroded], sample.image[eroded], atol=0.02)  # hha is not blurred
    z = (sample.image[..., 2] - 0.5) / 0.02
    slope = sum(np.abs(np.diff(scene().depth, axis=a)).max() for a in (0, 1))
    assert np.abs(z - sample.depth)[eroded].max() < source_shift(case) * slope * 1.2


@pytest.mark.parametrize("factor", [0.35, 0.5, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("flip", [False, True])
def test_an_edge_stays_where_it_is(factor, flip):
    """The crossing of a blurred step in the image against the label's step, along one row: no systematic shift."""
    edge, width = 40.0, 96
    u = np.arange(width)
    image = np.repeat((1 / (1 + np.exp(-(u - edge + 0.5) / 1.5)))[None, :, None], 24, 0).repeat(3, 2).astype(np.float32)
    labels = np.repeat((u >= edge)[None], 24, 0).astype(np.uint8)
    sx = -factor if flip else factor
    shift = (width - 0.5) * factor - 0.5 if flip else 0.5 * factor - 0.5
    affine = np.array([[sx, 0, shift], [0, factor, 0.5 * factor - 0.5]])
    out = warp(Sample(image=image, labels=labels), affine, max(4, round(24 * factor)), round(width * factor))
    row = out.image[out.image.shape[0] // 2, :, 0].astype(np.float64)
    truth = out.labels[out.image.shape[0] // 2].astype(np.float64)
    if flip:  # read from the right, so that the step rises
        row, truth = row[::-1], truth[::-1]
    at = np.flatnonzero(row >= 0.5)[0]
    crossing = at - (row[at] - 0.5) / (row[at] - row[at - 1])
    jump = np.flatnonzero(truth == 1)[0] - 0.5
    wanted = sx * (edge - 0.5) + shift  # the edge lies between source pixels 39 and 40
    if flip:
        wanted = len(row) - 1 - wanted
    assert crossing == pytest.approx(wanted, abs=0.1)  # logistic step against linear interpolation
    assert abs(jump - wanted) <= 0.5 + factor / 32
    assert abs(jump - crossing) <= 0.6 + factor / 32


def test_labels_are_never_mixed():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 7, 200, 255], (H, W)).astype(np.uint8)
    instances = rng.choice([0, 5, 1_000_003], (H, W)).astype(np.int32)
    depth = rng.choice([0, 1.25, 6.5], (H, W)).astype(np.float32)
    sample = scene().replace(labels=labels, instances=instances, depth=depth)
    for seed in range(5):
        out = Augment((50, 70), scale=0.7, zoom=(0.5, 2.0))(sample, np.random.default_rng(seed))
        assert set(np.unique(out.labels)) <= {0, 7, 200, 255}
        assert set(np.unique(out.instances)) <= {0, 5, 1_000_003}
        assert set(np.unique(out.depth)) <= {0, np.float32(1.25), np.float32(6.5)}
        assert (out.labels.dtype, out.instances.dtype, out.depth.dtype) == (np.uint8, np.int32, np.float32)


def test_outside_the_source():
    out = Augment((100, 120), scale=0.5, flip=0.5, colour=0.0, crop="centre")(scene(), np.random.default_rng(1))
    top, left = (100 - 36) // 2, (120 - 48) // 2
    border = np.ones((100, 120), bool)
    border[top - 1 : top + 37, left - 1 : left + 49] = False
    assert (out.image[border] == 0.5).all()
    assert (out.labels[border] == IGNORE).all()
    assert (out.depth[border] == 0).all()
    assert (out.instances[border] == 0).all()
    assert (out.normals[border] == 0).all()
    inside = np.zeros_like(border)
    inside[top + 1 : top + 35, left + 1 : left + 47] = True
    assert (out.labels[inside] != IGNORE).all()
    assert (out.depth[inside] > 0).all()


def test_normals_are_mirrored_with_the_image():
    still, turned = (augmented({"size": (H, W), "flip": f}) for f in (0.0, 1.0))
    np.testing.assert_array_equal(turned.normals[:, ::-1], still.normals * np.float32([-1, 1, 1]))
    # a normal is still perpendicular to the surface that unprojection shows
    points = turned.camera.unproject(turned.depth).astype(np.float64)
    across, down = points[:, 2:] - points[:, :-2], points[2:] - points[:-2]
    for step, normals in ((across, turned.normals[:, 1:-1]), (down, turned.normals[1:-1])):
        cosine = (step * normals).sum(-1) / np.linalg.norm(step, axis=-1)
        assert np.abs(cosine).max() < 1e-3


def test_identity():
    sample = scene()
    out = Augment((H, W), **PLAIN)(sample, np.random.default_rng(0))
    for field in ("image", "labels", "depth", "instances", "normals", "hha"):
        np.testing.assert_array_equal(getattr(out, field), getattr(sample, field))
    np.testing.assert_array_equal(out.camera.matrix, sample.camera.matrix)
    out = Augment((H, W), **{**PLAIN, "flip": 1.0})(sample, np.random.default_rng(0))
    for field in ("image", "labels", "depth", "instances", "hha"):
        np.testing.assert_array_equal(getattr(out, field), getattr(sample, field)[:, ::-1])


def test_the_same_random_state_gives_the_same_sample():
    augment = Augment((40, 50), scale=0.8, focal=100.0, zoom=(0.7, 1.5))
    a, b, c = (augment(scene(), np.random.default_rng(s)) for s in (1, 1, 2))
    for field in ("image", "labels", "depth", "normals"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert a.camera.matrix.tolist() == b.camera.matrix.tolist()
    assert not np.array_equal(a.image, c.image)


def test_the_source_is_not_written_to():
    sample = scene()
    before = scene()
    for value in (sample.image, sample.labels, sample.depth, sample.normals):
        value.setflags(write=False)
    Augment((40, 50), scale=0.5, focal=70.0)(sample, np.random.default_rng(0))
    np.testing.assert_array_equal(sample.image, before.image)


def test_random_draws_cover_their_ranges():
    """Crops reach every border, zooms both ends of their range, and half of the samples are mirrored."""
    augment = Augment((40, 50), scale=1.0, zoom=(0.8, 1.25), colour=0.0)
    outs = [augment(scene(), np.random.default_rng(i)) for i in range(200)]
    zooms = np.array([o.camera.fx / 80 for o in outs])
    assert zooms.min() > 0.8 - 1e-9
    assert zooms.max() < 1.25 + 1e-9
    assert zooms.min() < 0.82
    assert zooms.max() > 1.22
    assert np.log(zooms).mean() == pytest.approx(0, abs=0.04)  # log-uniform: sd 0.129 / sqrt(200) = 0.009
    mirrored = np.mean([np.linalg.det(o.camera.pose[:3, :3]) < 0 for o in outs])
    assert mirrored == pytest.approx(0.5, abs=0.15)  # 4 standard deviations of 0.035
    assert all((o.labels != IGNORE).all() for o in outs)  # the window lies inside wherever it fits
    still = [o for o in outs if np.linalg.det(o.camera.pose[:3, :3]) > 0]
    left = [(46.3 + 0.5) * o.camera.fx / 80 - 0.5 - o.camera.cx for o in still]
    room = [96 * o.camera.fx / 80 - 50 for o in still]
    share = np.array(left) / np.array(room)
    assert share.min() > -1e-9
    assert share.max() < 1 + 1e-9
    assert share.min() < 0.05
    assert share.max() > 0.95


def test_colour_changes_stay_in_range_and_scale_with_strength():
    image = scene().image
    grey = np.full_like(image, 0.45)
    changes = []
    for strength in (0.0, 0.5, 2.0):
        outs = [jitter(image, np.random.default_rng(s), strength) for s in range(20)]
        assert all(o.min() >= 0 and o.max() <= 1 and o.dtype == np.float32 for o in outs)
        changes.append(np.mean([np.abs(o - np.clip(image, 0, 1)).mean() for o in outs]))
    assert changes[0] < 1e-6
    assert changes[0] < changes[1] < changes[2]
    shifts = [jitter(grey, np.random.default_rng(s), 1.0).mean() - 0.45 for s in range(200)]
    assert abs(np.mean(shifts)) < 0.05  # no drift to bright or dark


def test_shrinking_does_not_alias():
    """A checkerboard of single pixels has no place on a grid of a third: it must become grey, not a moire."""
    board = (np.indices((96, 96)).sum(0) % 2).astype(np.float32)
    out = Augment((32, 32), **{**PLAIN, "scale": 1 / 3})(
        Sample(image=np.repeat(board[..., None], 3, 2)), np.random.default_rng(0)
    )
    assert np.abs(out.image[2:-2, 2:-2] - 0.5).max() < 0.05


def flat(label: int | np.ndarray, depth: float | np.ndarray | None, colour: float) -> Sample:
    """A wall at one depth, or what the arrays say."""
    labels = np.broadcast_to(np.asarray(label, np.uint8), (6, 8)).copy()
    known = None if depth is None else np.broadcast_to(np.float32(depth), (6, 8)).copy()
    return Sample(image=np.full((6, 8, 3), colour, np.float32), labels=labels, depth=known)


def test_what_is_pasted_stands_in_front():
    ours = np.where(np.arange(8) < 3, 1.0, 4.0)  # near on the left
    result = paste(flat(1, ours, 0.2), flat(7, 2.0, 0.8), np.random.default_rng(0))
    theirs = np.broadcast_to(np.arange(8) >= 3, (6, 8))
    assert (result.labels == np.where(theirs, 7, 1)).all()
    assert (result.depth == np.where(theirs, 2.0, 1.0)).all()
    assert (result.image == np.where(theirs, np.float32(0.8), np.float32(0.2))[..., None]).all()


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_classes_are_pasted_and_void_never(seed):
    labels = np.array([3, 5, 9, 11, 13, IGNORE, IGNORE, 3], np.uint8)
    result = paste(flat(1, None, 0.2), flat(labels, None, 0.8), np.random.default_rng(seed))
    pasted = set(np.unique(result.labels)) - {1}
    assert len(pasted) == 3
    assert pasted < {3, 5, 9, 11, 13}
    assert ((result.labels != 1) == np.isin(labels, list(pasted))).all()  # every pixel of a chosen class
    assert ((result.image[..., 0] > 0.5) == (result.labels != 1)).all()


def test_which_classes_are_pasted_is_chance():
    labels = np.arange(8, dtype=np.uint8)
    sets = {
        tuple(np.unique(paste(flat(99, None, 0), flat(labels, None, 1), np.random.default_rng(s)).labels))
        for s in range(20)
    }
    assert len(sets) > 10


@pytest.mark.parametrize(
    ("ours", "theirs", "depth"), [(0.0, 3.0, 3.0), (1.0, 0.0, 0.0), (1.0, None, 0.0), (None, 1.0, None)]
)
def test_unknown_depth_is_behind_what_is_pasted(ours, theirs, depth):
    result = paste(flat(1, ours, 0.2), flat(7, theirs, 0.8), np.random.default_rng(0))
    assert (result.labels == 7).all()
    assert result.depth is None if depth is None else (result.depth == depth).all()


def test_pasting_takes_every_map_along_and_writes_to_none():
    ours, theirs = scene(), augmented({"size": (H, W), "flip": 1.0}, seed=3)
    theirs = theirs.replace(depth=theirs.depth / 2)  # all of it in front
    before = ours.image.copy()
    result = paste(ours, theirs, np.random.default_rng(1))
    front = (result.labels == theirs.labels) & (result.depth == theirs.depth)
    assert 0.2 < front.mean() < 0.8
    for name in ("image", "instances", "normals", "hha"):
        chosen = front if getattr(ours, name).ndim == 2 else front[..., None]
        assert (getattr(result, name) == np.where(chosen, getattr(theirs, name), getattr(ours, name))).all()
        assert getattr(result, name).dtype == getattr(ours, name).dtype
    assert result.camera == ours.camera
    assert (ours.image == before).all()


def test_pasting_needs_labels():
    bare = flat(1, 1.0, 0.2).replace(labels=None, name="kitchen")
    with pytest.raises(UserError, match=r"kitchen.*paste=0"):
        paste(flat(1, 1.0, 0.2), bare, np.random.default_rng(0))
