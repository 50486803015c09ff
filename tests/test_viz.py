"""Pictures say what the arrays say; point clouds hold the geometry they were made from."""

import numpy as np
import PIL.Image
import pytest

from enfilade import labels, viz
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.types import Prediction, Sample

SPACE = labels.get("nyu40")


def prediction(height=48, width=64, **changes) -> Prediction:
    generator = np.random.default_rng(0)
    fields = {
        "image": generator.random((height, width, 3), np.float32),
        "labels": generator.integers(0, 40, (height, width)).astype(np.uint8),
        "depth": (1 + 3 * generator.random((height, width), np.float32)),
        "camera": Camera.from_fov(width, height, 60.0),
    }
    return Prediction(**(fields | changes))


def test_depth_colours_are_ordered_and_distinct():
    depth = np.linspace(1, 5, 64, dtype=np.float32)[None]
    colours = viz.colour_depth(depth, 1.0, 5.0)[0].astype(int)
    assert len({tuple(c) for c in colours}) == 64
    assert colours[0, 0] > colours[0, 2]  # near is warm
    assert colours[-1, 2] > colours[-1, 0]  # far is cool
    # no jumps: a step of 1/63 of the range moves no channel by more than 25 of 255, so no false edge appears
    assert np.abs(np.diff(colours, axis=0)).max() <= 25
    # beyond the range is drawn as its end
    np.testing.assert_array_equal(viz.colour_depth(np.float32([[0.5, 9]]), 1.0, 5.0)[0], colours[[0, -1]])


def test_unknown_depth_is_grey_and_does_not_move_the_range():
    depth = np.full((20, 20), 2.0, np.float32)
    depth[:, 10:] = 4
    clean = viz.colour_depth(depth)
    holes = depth.copy()
    holes[3:5, 3], holes[7, 7], holes[8, 8], holes[9, 9] = 0, np.nan, np.inf, -1
    coloured = viz.colour_depth(holes)
    unknown = ~(np.isfinite(holes) & (holes > 0))
    assert (coloured[unknown] == viz.UNKNOWN).all()
    np.testing.assert_array_equal(coloured[~unknown], clean[~unknown])
    assert (viz.colour_depth(np.zeros((3, 3), np.float32)) == viz.UNKNOWN).all()
    flat = viz.depth_range(np.full((4, 4), 3.0, np.float32))
    assert flat[0] < 3 < flat[1]


def test_depth_range_ignores_strays():
    depth = np.random.default_rng(0).uniform(2, 4, (100, 100)).astype(np.float32)
    depth[0, :20] = 100  # 0.2 % of the pixels
    near, far = viz.depth_range(depth)
    assert 2 <= near < 2.1
    assert 3.9 < far <= 4


def test_overlay():
    image = np.full((10, 12, 3), 0.4, np.float32)
    classes = np.zeros((10, 12), np.uint8)
    classes[:, 6:] = 3
    classes[8:] = 255
    drawn = viz.overlay(image, classes, SPACE, alpha=0.5).astype(int)
    for column, k in ((2, 0), (9, 3)):
        assert np.abs(drawn[4, column] - (102 + SPACE.colours[k].astype(int)) / 2).max() <= 1  # rounding
    assert drawn[4, 6].sum() < drawn[4, 9].sum()  # the line between
    assert (drawn[8:] == 102).all()
    plain = viz.overlay(image, np.zeros((10, 12), np.uint8), SPACE, alpha=0.0)
    assert (plain == 102).all()
    np.testing.assert_array_equal(viz.overlay(viz.as_uint8(image), classes, SPACE), drawn)


def test_as_uint8_rounds():
    values = np.random.default_rng(0).random((7, 5, 3), np.float32)
    np.testing.assert_array_equal(viz.as_uint8(values), np.rint(values * 255))


def test_shares_are_sorted_and_leave_out_what_is_ignored():
    classes = np.full((10, 10), 255, np.uint8)
    classes[:3], classes[3:4], classes[4, :4] = 7, 39, 0
    assert viz.shares(classes, SPACE) == [(7, 30 / 44), (39, 10 / 44), (0, 4 / 44)]
    assert viz.shares(np.full((2, 2), 255, np.uint8), SPACE) == []


def colours_of(picture: PIL.Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}


@pytest.mark.parametrize("width", [40, 150, 640, 1500])
def test_legend_shows_just_the_classes_present(width):
    classes = np.repeat(np.uint8([2, 11, 30]), [500, 300, 200])[None]
    picture = viz.legend(classes, SPACE, width)
    assert picture.width == width
    for k in range(40):
        assert (tuple(SPACE.colours[k].tolist()) in colours_of(picture)) == (k in (2, 11, 30))
    crowded = viz.legend(prediction().labels, SPACE, width)
    assert crowded.height > picture.height
    assert viz.legend(np.full((2, 2), 255, np.uint8), SPACE, width).height > 0


@pytest.mark.parametrize(("near", "far"), [(1.0, 5.0), (0.31, 0.33), (0.0, 80.0), (2.5, 2.6), (0.97, 9.2)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_ticks_are_round_and_inside(near, far, count):
    ticks = viz._ticks(near, far, count)
    assert len(ticks) <= count + 1
    assert all(near - 1e-6 <= t <= far + 1e-6 for t in ticks)
    steps = np.diff(ticks)
    if len(steps):
        digits = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9)
        assert min(abs(digits - d) for d in (1, 2, 5)) < 1e-6
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    if count >= 3:
        assert ticks
    assert viz.depth_bar(near, far, 200).size[0] == 200


SHAPES = [(48, 64), (1, 1), (1, 300), (300, 1), (200, 30), (30, 400), (700, 500), (2, 5000)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_panel_at_any_shape(height, width):
    picture = viz.panel(prediction(height, width))
    assert picture.mode == "RGB"
    assert 200 <= picture.width <= 3 * 960 + 100
    assert 100 <= picture.height <= 3 * 960 + 700
    pixels = np.asarray(picture)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()  # nothing is cut off by the border


@pytest.mark.parametrize(
    "lacks", [("labels",), ("depth",), ("camera",), ("labels", "depth"), ("labels", "depth", "camera")]
)
def test_panel_leaves_out_what_is_lacking(lacks):
    few = {"labels": np.zeros((48, 64), np.uint8)}  # a legend of one line, so that the bar and its note stand lower
    whole = viz.panel(prediction(**few))
    part = viz.panel(prediction(**(few | dict.fromkeys(lacks))))
    assert part.width <= whole.width
    assert part.height <= whole.height
    assert part.size != whole.size


def test_panel_shows_the_arrays():
    classes = np.zeros((48, 64), np.uint8)
    classes[:, 32:] = 5
    depth = np.full((48, 64), 2, np.float32)
    depth[:24] = 4
    picture = viz.panel(prediction(image=np.full((48, 64, 3), 0.5, np.float32), labels=classes, depth=depth))
    pixels = np.asarray(picture)
    w, h = viz._cell_size(64, 48)
    assert picture.width == 3 * w + 2 * viz.GAP + 2 * viz.MARGIN
    row = pixels[viz.MARGIN + 30 + h // 4]  # within the upper half of the cells
    at = [viz.MARGIN + i * (w + viz.GAP) for i in range(3)]
    np.testing.assert_array_equal(row[at[0] + w // 2], [128] * 3)
    np.testing.assert_array_equal(row[at[1] + w // 4], SPACE.colours[0])
    np.testing.assert_array_equal(row[at[1] + 3 * w // 4], SPACE.colours[5])
    np.testing.assert_array_equal(row[at[2] + w // 2], viz.colour_depth(depth)[0, 0])


def test_contact_sheet():
    pictures = [np.full((30, 40, 3), v, np.uint8) for v in (10, 20, 30)] + [PIL.Image.new("L", (40, 80), 40)]
    sheet = viz.contact_sheet(pictures, columns=3, titles=["a", "b", "c", "a very long title " * 9], width=60)
    assert {(v, v, v) for v in (10, 20, 30, 40)} <= colours_of(sheet)
    assert viz.contact_sheet(pictures, columns=1, width=60).height > sheet.height
    assert viz.contact_sheet(pictures[:1], columns=9, width=60).width < 100
    with pytest.raises(ValueError, match="at least one"):
        viz.contact_sheet([])
    with pytest.raises(ValueError, match="titles"):
        viz.contact_sheet(pictures, titles=["a"])


def test_error_pictures():
    truth = np.float32([[2, 2, 2, 0, 2]])
    coloured = viz.error_map(np.float32([[2, 2.5, 9, 2, np.nan]]), truth, worst=1.0)[0].astype(int)
    assert (coloured[0] == 255).all()
    assert (coloured[[3, 4]] == viz.UNKNOWN).all()
    assert coloured[0].sum() > coloured[1].sum() > coloured[2].sum()  # darker is worse
    right, wrong, ignored = viz.mistakes(np.uint8([[1, 2, 3]]), np.uint8([[1, 1, 255]]))[0].astype(int)
    assert np.ptp(right) < 10 < 100 < wrong[0] - wrong[1]
    assert tuple(ignored) == viz.UNKNOWN


def room(height=120, width=160) -> tuple[np.ndarray, Camera]:
    """Exact depth of a floor 1.4 m below the camera and a wall at 5 m: seen at a slant, but nothing flies."""
    camera = Camera.from_fov(width, height, 60.0)
    down = camera.rays()[..., 1]
    floor = np.where(down > 0, 1.4 / np.maximum(down, 1e-9), np.inf)
    return np.minimum(floor, 5).astype(np.float32), camera


def test_flying_pixels_are_those_smeared_over_an_edge():
    depth, camera = room()
    assert not viz.flying_pixels(depth, camera.fx).any()  # a floor far away is no edge
    sharp = depth.copy()
    sharp[30:90, 40:80] = 1.5
    assert not viz.flying_pixels(sharp, camera.fx).any()  # nor does a sharp edge lose its pixels
    smeared = sharp.copy()
    smeared[30:90, 80:84] = np.linspace(1.5, smeared[30:90, 84], 6, axis=1)[:, 1:-1]
    flying = viz.flying_pixels(smeared, camera.fx)
    hit = np.zeros_like(flying)
    hit[30:90, 80:84] = True
    assert flying[hit].mean() > 0.9
    assert not flying[~hit].any()
    np.testing.assert_array_equal(viz.flying_pixels(smeared.T.copy(), camera.fx), flying.T)
    for tiny in ((1, 1), (1, 9), (2, 2)):
        assert not viz.flying_pixels(np.ones(tiny, np.float32), 100.0).any()


def test_points_reproject_to_their_pixels():
    depth, camera = room()
    depth[5:9, 5:9] = 0
    depth[10, 10] = np.nan
    image = np.random.default_rng(0).random((120, 160, 3), np.float32)
    p = prediction(image=image, labels=None, depth=depth, camera=camera)
    xyz, rgb = viz.points(p)
    assert len(xyz) == 120 * 160 - 17
    uv, z = camera.project(xyz)
    u, v = np.rint(uv).astype(int).T
    np.testing.assert_allclose(uv, np.stack([u, v], -1), atol=1e-3)  # float32 of a few metres times f = 139
    np.testing.assert_array_equal(z, depth[v, u])
    np.testing.assert_array_equal(rgb, image[v, u])


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 500])
def test_points_with_a_stride_are_a_subset(stride):
    # wide enough to be made in several strips
    height, width = 70, 9000
    depth = np.random.default_rng(0).uniform(1, 2, (height, width)).astype(np.float32)
    p = prediction(height, width, depth=depth, labels=None)
    xyz, rgb = viz.points(p, stride, drop_flying=False)
    wanted = p.camera.unproject(depth)[::stride, ::stride].reshape(-1, 3)
    np.testing.assert_allclose(xyz, wanted, rtol=1e-6)
    np.testing.assert_array_equal(rgb, p.image[::stride, ::stride].reshape(-1, 3))


def test_points_drop_flying_pixels_unless_asked():
    depth, camera = room()
    depth[:, 80:84] = np.linspace(1, depth[:, 84], 6, axis=1)[:, 1:-1]
    p = prediction(120, 160, depth=depth, camera=camera)
    assert len(viz.points(p)[0]) < len(viz.points(p, drop_flying=False)[0]) == depth.size
    for lacking in ("depth", "camera"):
        with pytest.raises(ValueError, match=lacking):
            viz.points(prediction(**{lacking: None}))


def read_ply(data: bytes) -> np.ndarray:
    """A PLY reader of its own: the header's properties in the order it states them."""
    head, body = data.split(b"end_header\n", 1)
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    kinds = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith("property")]
    dtype = np.dtype(fields)
    assert len(body) == count * dtype.itemsize
    return np.frombuffer(body, dtype)


@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_ply_round_trip(tmp_path, normals, count):
    generator = np.random.default_rng(0)
    xyz, n = generator.normal(size=(2, count, 3)).astype(np.float32)
    rgb = generator.integers(0, 256, (count, 3)).astype(np.uint8)
    path = tmp_path / "room.ply"
    for colours in (rgb, rgb / np.float32(255)):
        viz.write_ply(path, xyz, colours, n if normals else None)
        back = read_ply(path.read_bytes())
        np.testing.assert_array_equal(np.stack([back[c] for c in "xyz"], -1), xyz)
        np.testing.assert_array_equal(np.stack([back[c] for c in ("red", "green", "blue")], -1), rgb)
        assert ("nx" in back.dtype.names) == normals
        if normals:
            np.testing.assert_array_equal(np.stack([back[c] for c in ("nx", "ny", "nz")], -1), n)
    viz.write_ply(path, xyz)
    assert read_ply(path.read_bytes()).dtype.names == ("x", "y", "z")


def test_ply_refuses_other_places(tmp_path):
    with pytest.raises(UserError, match=r"\.ply"):
        viz.write_ply(tmp_path / "a.xyz", np.zeros((1, 3), np.float32))
    with pytest.raises(UserError, match="absent"):
        viz.write_ply(tmp_path / "absent" / "a.ply", np.zeros((1, 3), np.float32))


def test_titles_of_strips_are_whole():
    """Their ink ends above the pictures."""
    space = labels.get("camvid11")
    maps = {"s1": np.zeros((60, 80), np.uint8), "truth": np.ones((60, 80), np.uint8)}
    sheet = viz.strips([(np.zeros((60, 80, 3)), maps)], space).min(2) < 100
    first = next(y for y in range(len(sheet)) if sheet[y].mean() > 0.2)  # where the black photo begins
    assert sheet[:first].any()
    assert not sheet[:4].any()
    assert not sheet[first - 2 : first].any()


def cell(sheet, row, column, rows, width, height, foot=0):
    """The middle of a picture in a sheet."""
    top = viz.MARGIN + 26 - viz.GAP // 2 + row * (height + foot + viz.GAP)
    left = viz.MARGIN + column * (width + viz.GAP)
    return sheet[top + height // 2, left + width // 2]


def test_depths_of_a_row_share_the_colours_of_the_truth():
    truth = np.linspace(1, 5, 64 * 48, dtype=np.float32).reshape(48, 64)
    photo = np.full((48, 64, 3), 0.5, np.float32)
    flat = np.full((48, 64), 3.0, np.float32)
    sheet = viz.depth_strips([(photo, {"flat": flat, "far": 9 + flat, "truth": truth})] * 2, width=240)
    near, far = viz.depth_range(truth)
    foot = viz.depth_bar(near, far, 480).height + viz.GAP
    want = viz.colour_depth(np.float32([[3.0, 12.0]]), near, far)[0]
    for row in range(2):
        np.testing.assert_array_equal(cell(sheet, row, 1, 2, 240, 180, foot), want[0])
        np.testing.assert_array_equal(cell(sheet, row, 2, 2, 240, 180, foot), want[1])
    assert sheet.shape[1] == 4 * 240 + 3 * viz.GAP + 2 * viz.MARGIN


def test_a_depth_picture_stands_above_its_bar():
    depth = np.full((40, 400), 2.0, np.float32)
    depth[:, 200:] = 4.0
    picture = viz.depth_picture(depth)
    assert picture.shape[1] == 400
    np.testing.assert_array_equal(picture[:40], viz.colour_depth(depth))
    assert (picture[:40] != picture[0, 0]).any()
    assert not (picture[40:] == 255).all()  # the bar
    assert viz.depth_picture(depth[:3, :5]).shape[1] == 240  # a bar needs room


def test_comparison_shows_what_both_have():
    answer = prediction()
    sample = Sample(image=answer.image, labels=(answer.labels + 1) % 40, depth=answer.depth + np.float32(0.5))
    sheet = viz.comparison([(sample, answer)], SPACE, width=240)
    near, far = viz.depth_range(sample.depth)
    foot = viz.depth_bar(near, far, 720).height + viz.GAP
    wrong = viz.mistakes(np.uint8([[0]]), np.uint8([[1]]))[0, 0]
    np.testing.assert_array_equal(cell(sheet, 0, 3, 1, 240, 180, foot), wrong)  # every label is wrong
    half = viz.error_map(np.float32([[1.0]]), np.float32([[1.5]]))[0, 0].astype(int)
    assert np.abs(cell(sheet, 0, 6, 1, 240, 180, foot) - half).max() <= 1
    less = viz.comparison([(sample.replace(labels=None), answer)], SPACE, width=240)
    assert less.shape[1] == sheet.shape[1] - 3 * (240 + viz.GAP)


def test_labels_in_another_space():
    answer = prediction()
    coarse = answer.in_space("nyu13")
    np.testing.assert_array_equal(coarse.labels, labels.mapping("nyu40", "nyu13")[answer.labels])
    assert coarse.space == "nyu13"
    assert answer.in_space("nyu40") is answer
