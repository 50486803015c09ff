"""Regions and region support: against the algorithm as printed, against SciPy, and what must hold for any image."""

import threading

import numpy as np
import pytest
import torch
from scipy import ndimage

from enfilade.errors import UserError
from enfilade.ops.regions import (
    BINS,
    HAIR,
    region_means,
    region_support,
    region_support_reference,
    regions,
    regions_reference,
)

# Both average in float64 in different orders and round once to float32: one unit in the last place.
ROUNDING = 2.0**-23


def patches(rng, height, width, classes, size=3, void=0.15):
    """A label map of ragged patches, some of them void."""
    rows, columns = -(-height // size), -(-width // size)
    coarse = rng.integers(0, classes, (rows, columns)).astype(np.uint8)
    coarse[rng.random((rows, columns)) < void] = 255
    labels = np.kron(coarse, np.ones((size, size), np.uint8))[:height, :width]
    stray = rng.random(labels.shape) < (0.1 if void < 1 else 0)
    labels[stray] = rng.integers(0, classes, labels.shape)[stray]
    return labels


def scene(seed, holes=0.0):
    """Labels and depth of a kind that the seed chooses: noise, ramps, whole decimetres (ties at the edges of bins), a
    few levels, one level; `holes` is the share of single pixels without depth, and then a block has none either."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(1, 28, 2))
    labels = patches(rng, height, width, int(rng.integers(1, 6)), int(rng.integers(1, 9)))
    y, x = np.mgrid[:height, :width]
    depth = [
        lambda: rng.uniform(0.5, 9, (height, width)),
        lambda: 1 + 0.1 * y + 0.03 * x + rng.normal(0, 0.02, (height, width)).clip(-0.1, 0.1),
        lambda: np.round(rng.uniform(0.5, 4, (height, width)), 1),
        lambda: rng.choice([1.0, 2.0, 3.0, 11.0], (height, width), p=[0.5, 0.3, 0.15, 0.05]),
        lambda: np.full((height, width), 2.5),
    ][seed % 5]()
    if holes:
        depth[rng.random(depth.shape) < holes] = rng.choice([0, np.nan, np.inf, -1])
        top, left = rng.integers(0, height), rng.integers(0, width)
        depth[top : top + 9, left : left + 9] = 0
    return labels, depth.astype(np.float32)


def known(depth):
    return np.isfinite(depth) & (depth > 0)


def same_partition(a, b):
    """Whether two numberings of regions, 0 for none, are the same up to the numbers."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0)
    return (
        len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
        and (pairs[pairs[:, 0] == 0] == 0).all()
        and (pairs[pairs[:, 1] == 0] == 0).all()
    )


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 20])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_regions_are_scipys_components_of_each_label(classes, size):
    labels = patches(np.random.default_rng(size), 90, 110, classes, size)
    ids, count = regions(labels)
    expected, total = np.zeros(labels.shape, int), 0
    for label in np.unique(labels[labels != 255]):
        components, n = ndimage.label(labels == label, structure=np.ones((3, 3)))
        expected[components > 0] = components[components > 0] + total
        total += n
    assert count == total
    assert same_partition(ids, expected)


def test_regions_count_from_one_in_the_order_of_their_first_pixel():
    labels = patches(np.random.default_rng(3), 40, 60, 5, 2)
    ids, count = regions(labels)
    numbers, first = np.unique(ids[ids > 0], return_index=True)
    assert numbers.tolist() == list(range(1, count + 1))
    assert (np.diff(first) > 0).all()
    assert ids.dtype == np.int32


def test_regions_equal_the_flood_fill():
    for seed in range(60):
        labels, _ = scene(seed)
        (ids, count), (expected, n) = regions(labels), regions_reference(labels)
        assert count == n, seed
        assert same_partition(ids, expected), seed


def test_a_checkerboard_is_two_regions_that_cross():
    board = np.indices((9, 12)).sum(0) % 2
    ids, count = regions(board)
    assert count == 2
    np.testing.assert_array_equal(ids, board + 1)
    # Without its white squares the black ones still touch at their corners.
    assert regions(board, void=0)[1] == 1
    # A white line between them does not let them pass.
    board[:, 6] = 2
    assert regions(board)[1] == 5


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (["a.a.a", "a.a.a", "aaaaa"], 1),  # joined in the last row only
        (["aaaaa", "a...a", "a.a.a", "a...a", "aaaaa"], 2),
        (["..a", ".a.", "a.."], 1),
        (["a..", ".a.", "..a"], 1),
        (["a.a", ".b.", "a.a"], 5),
        (["a.a", ".a.", "a.a"], 1),
        (["ab", "ba"], 2),
        ([".a.a.a.a", "a.a.a.a."], 1),
        (["a"], 1),
        (["."], 0),
        (["ababab"], 6),
    ],
)
def test_small_regions_by_eye(rows, count):
    labels = np.array([[".ab".index(letter) for letter in row] for row in rows])
    for turned in (labels, labels.T, labels[::-1], labels[:, ::-1]):
        assert regions(turned, void=0)[1] == count


def test_a_long_spiral_is_one_region():
    """Many provisional numbers that all turn out to be one."""
    labels = np.zeros((101, 101), np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    labels[0, 0] = 1
    for length in [100, *(n for n in range(100, 1, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            labels[y, x] = 1
        dy, dx = dx, -dy
    assert 0.4 < labels.mean() < 0.6
    assert regions(labels, void=0)[1] == 1
    assert regions(labels, void=255)[1] == 2  # and so is what lies between its arms


# --- region support ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_support_equals_the_algorithm_as_printed(holes):
    wide = 0
    for seed in range(100):
        labels, depth = scene(seed, holes)
        support = region_support(labels, depth)
        np.testing.assert_allclose(support, region_support_reference(labels, depth), rtol=ROUNDING, err_msg=str(seed))
        ids, count = regions(labels)
        wide += sum(len(np.unique(support[ids == i])) > 1 for i in range(1, count + 1))
    assert wide > 100  # regions that are cut


@pytest.mark.parametrize("holes", [0.0, 0.3, 0.9])
def test_every_label_gets_a_depth_of_its_region_and_void_none(holes):
    for seed in range(150):
        labels, depth = scene(seed, holes)
        support, (ids, count) = region_support(labels, depth), regions(labels)
        assert (support[labels == 255] == 0).all(), seed
        if not known(depth).any():
            assert (support == 0).all()
            continue
        assert (support[labels != 255] > 0).all(), seed
        for i in range(1, count + 1):
            inside = ids == i
            d = depth[inside & known(depth)]
            if d.size:
                assert d.min() <= support[inside].min() <= support[inside].max() <= d.max(), (seed, i)


def test_parts_of_a_region_follow_the_rule():
    """The rule read off the result: parts are intervals of depth that end at whole widths, hold their fair share but
    for the last, would not have held it a width earlier, and are at their mean."""
    cut = 0
    for seed in range(150):
        labels, depth = scene(seed)
        support, (ids, count) = region_support(labels, depth), regions(labels)
        var = (np.float64(depth.max()) - depth.min()) / BINS
        for i in range(1, count + 1):
            d, s = depth[ids == i].astype(np.float64), support[ids == i]
            values = np.unique(s)
            for value in values:
                np.testing.assert_allclose(value, d[s == value].mean(), rtol=ROUNDING)
            if np.ptp(d) < 2 * var or var == 0:
                assert len(values) == 1
                continue
            bins = int(np.ceil(np.ptp(d) / var - HAIR))
            ends = d.min() + var * np.arange(1, bins)
            start = d.min()
            for value in values[:-1]:
                part, above = d[s == value], d[s > value]
                assert part.max() < above.min()
                held = np.array([((d >= start) & (d < end)).sum() for end in ends])
                first = np.argmax(held * bins >= d.size)
                assert held[first] == part.size
                assert held[first] * bins >= d.size
                start = ends[first]
            # The last part is what no earlier edge completes.
            assert all(((d >= start) & (d < end)).sum() * bins < d.size for end in ends[ends > start])
            cut += len(values) > 1
    assert cut > 50


def test_a_ramp_is_cut_into_ten_bins_of_equal_width():
    """A bin that holds exactly its fair share stands: 100 columns, 9.9 of them a width, so that each bin has ten."""
    depth = np.broadcast_to(1 + np.arange(100, dtype=np.float32) / 64, (7, 100))
    expected = depth[0].reshape(10, 10).mean(1).repeat(10)
    support = region_support(np.zeros((7, 100), np.uint8), depth)
    np.testing.assert_allclose(support, np.broadcast_to(expected, support.shape), rtol=ROUNDING)


def test_thin_bins_join_the_next_by_hand():
    """var is 1 m. The 20 pixels of label 1 reach from 1 to 5 m: 4 bins, fair share 5."""
    inside = [1.0] * 3 + [2.5] * 4 + [3.5] * 11 + [4.5] + [5.0]
    labels = np.array([[1] * 20 + [2, 3]], np.uint8)
    depth = np.array([[*inside, 0.5, 10.5]], np.float32)
    support = region_support(labels, depth)[0]
    np.testing.assert_allclose(support[:7], (3 * 1.0 + 4 * 2.5) / 7, rtol=ROUNDING)  # 3 are too few, 3 + 4 enough
    np.testing.assert_allclose(support[7:18], 3.5, rtol=ROUNDING)
    np.testing.assert_allclose(support[18:20], 4.75, rtol=ROUNDING)  # the last takes what is left, though too few
    assert support[20:].tolist() == [0.5, 10.5]


def test_a_region_just_below_two_widths_stays_whole():
    labels = np.array([[1, 1, 1, 2, 3]], np.uint8)
    for far, parts in ((2.99, 1), (3.0, 2)):
        depth = np.array([[1.0, 1.1, far, 1.0, 11.0]], np.float32)  # var is 1 m
        assert len(np.unique(region_support(labels, depth)[0, :3])) == parts


def test_names_of_labels_do_not_matter():
    rng = np.random.default_rng(0)
    for seed in range(40):
        labels, depth = scene(seed, holes=0.2)
        support = region_support(labels, depth)
        table = np.concatenate([rng.permutation(255), [255]]).astype(np.uint8)
        np.testing.assert_array_equal(region_support(table[labels], depth), support)
        np.testing.assert_array_equal(region_support((labels + 1).astype(np.uint8), depth, void=0), support)


def test_mirrored_images_have_mirrored_support():
    for seed in range(60):
        labels, depth = scene(seed, holes=0.3)
        support = region_support(labels, depth)
        for turn in (np.fliplr, np.flipud, np.transpose):
            np.testing.assert_allclose(region_support(turn(labels), turn(depth)), turn(support), rtol=ROUNDING)


def test_depth_in_other_units_gives_support_in_them():
    """A power of two, which rounds nothing."""
    for seed in range(20):
        labels, depth = scene(seed, holes=0.3)
        np.testing.assert_array_equal(region_support(labels, depth * 4), region_support(labels, depth) * 4)


def test_one_pixel_regions_keep_their_depth():
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 9, (12, 17)).astype(np.float32)
    labels = np.arange(12 * 17).reshape(12, 17)
    np.testing.assert_array_equal(region_support(labels, depth, void=-1), depth)
    np.testing.assert_array_equal(region_support(labels[:1, :1], depth[:1, :1], void=-1), depth[:1, :1])


def test_support_is_a_fixed_point_where_no_region_was_cut():
    for seed in range(40):
        labels, depth = scene(seed)
        ids, count = regions(labels)
        support = region_support(labels, depth)
        if all(len(np.unique(support[ids == i])) == 1 for i in range(1, count + 1)):
            np.testing.assert_allclose(region_support(labels, support), support, rtol=2 * ROUNDING)


# --- holes ------------------------------------------------------------------------------------------------------------


def test_a_hole_takes_the_nearest_part_of_its_region():
    """A floor from 1 to 9 m with a hole at its far end, across which another region is nearer."""
    labels = np.ones((1, 30), np.uint8)
    depth = np.repeat([1.0, 5.0, 9.0], 10)[None].astype(np.float32)
    depth[0, 25:29] = 0
    assert region_support(labels, depth)[0, 20:].tolist() == [9.0] * 10
    depth[0, 12:28] = np.nan  # 5 m at 10 and 11, 9 m at 29
    depth[0, 28] = 0
    support = region_support(labels, depth)[0]
    assert support[:20].tolist() == [1.0] * 10 + [5.0] * 10
    assert support[20:].tolist() == [5.0] + [9.0] * 9  # 20 is as far from 11 as from 29: the lower value
    labels[0, 28] = 2
    assert region_support(labels, depth)[0, :28].tolist() == [1.0] * 10 + [5.0] * 18


def test_a_region_without_depth_takes_what_touches_it():
    labels = np.array([[1, 2, 2, 3], [255, 2, 2, 255]], np.uint8)
    depth = np.array([[1.0, 0, 0, 3.0], [50.0, 0, np.nan, 50.0]], np.float32)  # void has depth, but no value
    support = region_support(labels, depth)
    np.testing.assert_array_equal(support, [[1, 2, 2, 3], [0, 2, 2, 0]])


def test_a_region_that_touches_nothing_takes_the_mean_of_the_image():
    labels = np.array([[1, 255, 2, 255, 3]], np.uint8)
    depth = np.array([[1.0, 4.0, 0.0, 2.0, 5.0]], np.float32)
    np.testing.assert_array_equal(region_support(labels, depth), [[1, 0, 3, 0, 5]])
    only_void = np.array([[0, 4.0, 0.0, 2.0, 0]], np.float32)
    np.testing.assert_array_equal(region_support(labels, only_void), [[3, 0, 3, 0, 3]])


def test_images_without_depth_or_labels():
    labels, depth = np.ones((4, 5), np.uint8), np.full((4, 5), 2.0, np.float32)
    assert (region_support(labels, np.zeros_like(depth)) == 0).all()
    assert (region_support(labels, np.full_like(depth, np.nan)) == 0).all()
    assert (region_support(np.full_like(labels, 255), depth) == 0).all()
    assert (region_support(labels, depth) == 2).all()


# --- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_every_type_of_whole_numbers_gives_the_same(kind):
    labels, depth = scene(12, holes=0.2)
    expected = region_support(labels, depth)
    void = 100
    changed = np.where(labels == 255, void, labels).astype(kind)
    np.testing.assert_array_equal(region_support(changed, depth, void=void), expected)
    np.testing.assert_array_equal(region_support(changed, depth.astype(np.float64), void=void), expected)
    assert region_support(changed, depth.astype(np.float64), void=void).dtype == np.float32


def test_masks_are_labels():
    mask = np.random.default_rng(0).random((20, 30)) < 0.4
    assert regions(mask, void=0)[1] == ndimage.label(mask, structure=np.ones((3, 3)))[1]


def test_views_give_what_copies_give_and_nothing_is_written_to():
    labels, depth = scene(5, holes=0.2)
    labels, depth = np.tile(labels, (3, 4)), np.tile(depth, (3, 4))
    for view in ((slice(None, None, 2), slice(None, None, 3)), (slice(None, None, -1), slice(1, -1))):
        a, b = labels[view], depth[view]
        a.flags.writeable = b.flags.writeable = False
        assert not a.flags.c_contiguous
        np.testing.assert_array_equal(region_support(a, b), region_support(a.copy(), b.copy()))
        np.testing.assert_array_equal(regions(a)[0], regions(a.copy())[0])
    np.testing.assert_array_equal(
        region_support(np.asfortranarray(labels), np.asfortranarray(depth)), region_support(labels, depth)
    )


def test_threads_change_nothing():
    scenes = [scene(seed, holes=0.2) for seed in range(24)]
    expected = [region_support(*s) for s in scenes]
    found = [None] * len(scenes)

    def work(start):
        for i in range(start, len(scenes), 4):
            found[i] = region_support(*scenes[i])

    workers = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("labels", "depth", "sentence"),
    [
        (
            np.zeros((4, 5), np.uint8),
            np.ones((5, 4), np.float32),
            r"depth of shape \[5, 4\] does not fit labels of \[4",
        ),
        (np.zeros((4, 5), np.uint8), np.ones((4, 5, 1), np.float32), r"depth of shape \[4, 5, 1\] does not fit"),
        (np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint16), "not uint16: divide millimetres by 1000"),
        (
            np.zeros((4, 5, 1), np.uint8),
            np.ones((4, 5, 1), np.float32),
            r"label map \[h, w\].*not in uint8 \[4, 5, 1\]",
        ),
        (np.zeros((4, 5), np.float32), np.ones((4, 5), np.float32), r"of whole numbers, not in float32 \[4, 5\]"),
        (np.zeros((0, 5), np.uint8), np.ones((0, 5), np.float32), r"not in uint8 \[0, 5\]"),
    ],
)
def test_what_does_not_fit_is_told(labels, depth, sentence):
    with pytest.raises(UserError, match=sentence):
        region_support(labels, depth)


# --- means over regions -----------------------------------------------------------------------------------------------


def batch(height=11, width=13, dtype=torch.float64):
    rng = np.random.default_rng(0)
    maps = [regions(patches(rng, height, width, n, 3, void))[0] for n, void in ((4, 0.2), (1, 0.0), (3, 1.0))]
    values = torch.from_numpy(rng.normal(2, 1, (3, height, width))).to(dtype)
    return values, torch.from_numpy(np.stack(maps))


def means_by_loop(values, ids):
    m = int(ids.max())
    means, pixels = np.zeros((len(values), m)), np.zeros((len(values), m), int)
    for b in range(len(values)):
        for i in range(1, m + 1):
            inside = values[b][ids[b] == i]
            pixels[b, i - 1] = inside.numel()
            means[b, i - 1] = inside.double().mean() if inside.numel() else 0
    return means, pixels


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_region_means_equal_a_loop(dtype, kind):
    values, ids = batch(dtype=dtype)
    means, pixels = region_means(values, ids.to(kind))
    expected, counts = means_by_loop(values, ids)
    np.testing.assert_array_equal(pixels, counts)
    assert (pixels[2] == 0).all()  # an image that is all void
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # At most 143 numbers of size about 2 are summed.
    np.testing.assert_allclose(means, expected, atol=1e-13 if dtype == torch.float64 else 1e-5)


def test_region_means_have_the_gradient_of_means():
    values, ids = batch(5, 6)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: region_means(v, ids)[0], values)
    means, pixels = region_means(values, ids)
    (gradient,) = torch.autograd.grad(means.sum(), values)
    share = torch.cat([torch.zeros(3, 1), 1 / pixels.clamp(min=1)], 1).double()
    torch.testing.assert_close(gradient, share.gather(1, ids.flatten(1).long()).view_as(values) * (ids > 0))


def test_what_lies_outside_the_regions_is_left_out():
    values, ids = batch()
    means, _ = region_means(values, ids)
    torch.testing.assert_close(region_means(values.where(ids > 0, torch.nan), ids)[0], means, rtol=0, atol=0)
    holes = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    left = ids.where(~holes, 0)
    np.testing.assert_allclose(region_means(values, left)[0], means_by_loop(values, left)[0], atol=1e-13)


def test_loss_of_the_docstring_is_equation_2():
    """Mean over regions of the mean error inside; an image without regions adds nothing."""
    values, ids = batch()
    means, pixels = region_means(values.square(), ids)
    loss = (means.sum(1) / (pixels > 0).sum(1).clamp(min=1)).mean()
    by_image = []
    for v, r in zip(values, ids):
        inside = [float(v[r == i].square().mean()) for i in r.unique() if i > 0]
        by_image.append(np.mean(inside) if inside else 0)
    assert float(loss) == pytest.approx(np.mean(by_image), rel=1e-12)


def test_support_is_the_mean_of_regions_where_none_is_cut():
    rng = np.random.default_rng(2)
    labels = patches(rng, 40, 50, 6, 4)
    depth = rng.uniform(2, 2.1, labels.shape).astype(np.float32)
    labels[0, 0], depth[0, 0] = 9, 5  # far away: 2 var is wider than any other region
    ids, _ = regions(labels)
    means, _ = region_means(torch.from_numpy(depth)[None].double(), torch.from_numpy(ids)[None])
    support = np.concatenate([[0], means[0]])[ids]
    np.testing.assert_allclose(region_support(labels, depth), support, rtol=ROUNDING)


def test_region_means_refuse_what_does_not_fit():
    values, ids = batch()
    with pytest.raises(UserError, match=r"values of shape \[3, 11, 13\] do not fit regions of \[2, 11, 13\]"):
        region_means(values, ids[:2])
    with pytest.raises(UserError, match=r"do not fit regions of \[3, 10, 13\]"):
        region_means(values, ids[:, :10])
    with pytest.raises(UserError, match="-1 is no region"):
        region_means(values, ids - 1)
    with pytest.raises(UserError, match="at least one pixel"):
        region_means(values[:0], ids[:0])
    means, pixels = region_means(values, torch.zeros_like(ids))
    assert means.shape == pixels.shape == (3, 0)
