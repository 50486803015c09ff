"""Regions of a label map, and region support: each region at its mean depth.

* Anonymous: Region-Support Depth Inference from a Single Image (Algorithm 1, Eq. 2)

    ids, count = regions(labels)                   # connected pixels of one label
    support = region_support(labels, depth)        # metres; the target and the guidance of the region support network
    means, pixels = region_means(error, ids)       # torch, differentiable; for Eq. (2)

Arrays h w are numpy, and their loops are compiled and run on one thread, so that a result depends on nothing but its
input. They release the GIL.
"""

from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64, Integer, Shaped
from numba import njit
from torch import Tensor

from enfilade.errors import UserError

BINS = 10  # widths `var` in the depth range of an image
HAIR = 1e-6  # of a width: a range of a whole number of widths, rounded up, gets no further bin for its farthest pixel


# --- connected components ---------------------------------------------------------------------------------------------


def regions(labels: Shaped[np.ndarray, "*s"], *, void: int = 255) -> tuple[Int32[np.ndarray, "*s"], int]:
    """The regions of a label map [h, w] of whole numbers: pixels of one label that touch at a side or a corner.

    Returns the number of each pixel's region and how many there are. Regions count from 1 in the order of their first
    pixel, row by row; 0 is `void`, which belongs to none. (The paper's void is 0; inside this library it is 255, and 0
    is a class. Maps straight from files that count classes from 1 take `void=0`.)

    Raises UserError for another shape or type.
    """
    labels = _label_map(labels)
    ids = np.empty(labels.shape, np.int32)
    return ids, _components(labels, void, ids)


def regions_reference(labels: Shaped[np.ndarray, "*s"], *, void: int = 255) -> tuple[Int32[np.ndarray, "*s"], int]:
    """`regions` by flood fill, each region looked for in the whole image, as step 1 of Algorithm 1 does. Numbers follow
    the algorithm: the highest label first."""
    labels = _label_map(labels)
    # The paper's S: void is 0, the classes lie above.
    rest = np.where(labels == void, 0, 1 + np.unique(labels, return_inverse=True)[1].reshape(labels.shape))
    ids = np.zeros(labels.shape, np.int32)  # its I
    label = 0
    while rest.max() > 0:  # line 14
        category = rest.max()
        while rest.max() == category:  # line 16
            y, x = np.argwhere(rest == category)[0].tolist()  # lines 17-18: sorted from left-top to right-bottom
            label = label + 1
            rest[y, x], ids[y, x] = 0, label
            reached = [(y, x)]
            # Differs from paper: lines 20-27 stop at the first jump in the sorted list of positions, which cuts every
            # region whose rows are not whole. Meant is what connects: a distance below 2, that is 8 neighbours.
            for y, x in reached:
                for v, u in _around(y, x, rest.shape):
                    if rest[v, u] == category:
                        rest[v, u], ids[v, u] = 0, label
                        reached.append((v, u))
    return ids, label


def _around(y: int, x: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The up to eight pixels around one."""
    rows, columns = range(max(y - 1, 0), min(y + 2, shape[0])), range(max(x - 1, 0), min(x + 2, shape[1]))
    return [(v, u) for v in rows for u in columns if (v, u) != (y, x)]


def _label_map(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 2 or labels.size == 0 or labels.dtype.kind not in "biu":
        raise UserError(
            f"regions are found in a label map [h, w] of whole numbers, not in {labels.dtype} {list(labels.shape)}"
        )
    # Two types to compile for, not nine; only equality matters, so that the largest uint64 may wrap.
    return np.ascontiguousarray(labels, np.uint8 if labels.dtype == np.uint8 else np.int64)


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
@no_type_check
def _join(parent, i, j):
    i, j = _root(parent, i), _root(parent, j)
    if i < j:  # the root is the set's lowest number, hence that of its first pixel
        parent[j] = i
        return i
    parent[i] = j
    return j


@njit(cache=True, nogil=True)
@no_type_check
def _components(labels, void, ids):
    """Fills ids[h, w]; returns the number of regions. Two passes with a union-find in between (Wu, Otoo, Suzuki 2009).

    Of the four pixels seen before, equal labels at W or NW or NE touch an equal N and are joined already. Without N,
    only NE can be new to W or NW, which touch each other."""
    h, w = labels.shape
    parent = np.empty(h * w + 1, np.int32)
    top = 0
    for y in range(h):
        for x in range(w):
            label = labels[y, x]
            if label == void:
                ids[y, x] = 0
                continue
            if y > 0 and labels[y - 1, x] == label:
                ids[y, x] = ids[y - 1, x]
                continue
            west = x > 0 and labels[y, x - 1] == label
            north_west = y > 0 and x > 0 and labels[y - 1, x - 1] == label
            if y > 0 and x + 1 < w and labels[y - 1, x + 1] == label:
                if west:
                    ids[y, x] = _join(parent, ids[y - 1, x + 1], ids[y, x - 1])
                elif north_west:
                    ids[y, x] = _join(parent, ids[y - 1, x + 1], ids[y - 1, x - 1])
                else:
                    ids[y, x] = ids[y - 1, x + 1]
            elif west:
                ids[y, x] = ids[y, x - 1]
            elif north_west:
                ids[y, x] = ids[y - 1, x - 1]
            else:
                top += 1
                parent[top] = top
                ids[y, x] = top
    parent[0] = 0
    count = 0
    for i in range(1, top + 1):  # parents lie below their children and are final before them
        if parent[i] == i:
            count += 1
            parent[i] = count
        else:
            parent[i] = parent[parent[i]]
    for y in range(h):
        for x in range(w):
            ids[y, x] = parent[ids[y, x]]
    return count


# --- region support ---------------------------------------------------------------------------------------------------


def region_support(
    labels: Shaped[np.ndarray, "*s"], depth: Shaped[np.ndarray, "*_s"], *, void: int = 255
) -> Float32[np.ndarray, "*s"]:
    """Each region at its mean depth, large ranges in parts (Algorithm 1): metres, 0 where the label is `void`.

    `labels` [h, w] of whole numbers, `depth` [h, w] of floats in metres; not finite or not above 0 is unknown. With
    var = (max - min) / 10 of the image's known depth, a region (see `regions`)

    * whose own range is below 2 var gets its mean depth;
    * else has its range cut into bins of width var from its minimum. A bin with fewer pixels than their number over
      that of the bins joins the next; the last one takes what is left. Each bin's pixels get their mean depth.

    Every pixel with a label gets a depth if any pixel of the image has one. The paper's depth has no holes; here

    * a pixel without depth takes the value of the pixel of its region that is nearest, in steps to any of the eight
      neighbours inside the region; of several, the lowest value;
    * a region without any depth gets one value: the mean of the values around it, one for each pair of touching pixels;
      if none around it has a value either, the mean depth of the image.

    The result is unchanged where label values change places and, but for rounding, where the image is mirrored. Raises
    UserError where sizes or types do not fit.
    """
    labels = _label_map(labels)
    depth = _depth_map(depth, labels)
    ids = np.empty(labels.shape, np.int32)
    count = _components(labels, void, ids)
    support = np.zeros(labels.shape, np.float32)
    _average(ids, count, depth, support)
    return support


def region_support_reference(
    labels: Shaped[np.ndarray, "*s"], depth: Shaped[np.ndarray, "*_s"], *, void: int = 255
) -> Float32[np.ndarray, "*s"]:
    """`region_support`, line by line as Algorithm 1 stands: each region and bin is looked for in the whole image."""
    labels = _label_map(labels)
    metres = _depth_map(depth, labels).astype(np.float64)  # the paper's D
    known = np.isfinite(metres) & (metres > 0)
    ids, count = regions_reference(labels, void=void)  # lines 11-31; its R
    support = np.zeros(metres.shape)  # line 34; its S
    if not known.any():
        return support.astype(np.float32)
    var = (metres[known].max() - metres[known].min()) / 10  # line 33
    for i in range(1, count + 1):  # line 35
        region = (ids == i) & known  # line 36
        d = metres[region]  # line 37
        if d.size == 0:
            continue
        if d.max() - d.min() < 2 * var or var == 0:  # line 38
            support[region] = d.mean()
            continue
        first, bins = d.min(), 1
        while bins < BINS and first + bins * var < d.max() - HAIR * var:
            bins += 1
        start = first  # line 41
        for k in range(1, bins + 1):  # line 42
            end = first + k * var if k < bins else np.inf
            p = region & (metres >= start) & (metres < end)  # lines 43-44
            # Differs from paper: line 45 asks for more than the fair share, so that of equally filled bins none would
            # stand, and counts (max(d) - min(d)) / var bins, which is no whole number. Lines 50-53 drop a small bin,
            # whose pixels would stay 0, and lines 54-57 for the last bin are never reached: here a small bin joins
            # the next, and the last one takes what is left.
            if p.sum() * bins >= d.size or k == bins:
                support[p] = metres[p].mean()  # line 46
                start = end  # line 47

    # Differs from paper: what follows fills holes in the depth.
    inside = [(y, x) for y, x in np.argwhere(~known & (ids > 0)).tolist() if known[ids == ids[y, x]].any()]
    while inside:
        found = {}
        for y, x in inside:
            around = _around(y, x, support.shape)
            near = [support[p] for p in around if ids[p] == ids[y, x] and support[p] > 0]
            if near:
                found[y, x] = min(near)
        for place, value in found.items():
            support[place] = value
        inside = [place for place in inside if place not in found]
    done = support.copy()
    for i in range(1, count + 1):
        region = ids == i
        if not done[region].any():
            near = [done[p] for y, x in np.argwhere(region).tolist() for p in _around(y, x, done.shape) if done[p] > 0]
            support[region] = np.mean(near or metres[known])
    return support.astype(np.float32)


def _depth_map(depth: np.ndarray, labels: np.ndarray) -> Float32[np.ndarray, "h w"]:
    if depth.dtype.kind != "f":
        raise UserError(
            f"region support takes depth as floats in metres, not {depth.dtype}: divide millimetres by 1000"
        )
    if depth.shape != labels.shape:
        raise UserError(f"depth of shape {list(depth.shape)} does not fit labels of {list(labels.shape)}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, hence unknown
        return np.ascontiguousarray(depth, np.float32)


@njit(cache=True, nogil=True)
@no_type_check
def _bin(d, low, var, per_metre, bins):
    """The k with low + k * var <= d < low + (k + 1) * var, and the last for all beyond. The product with 1 / var, which
    is faster than a quotient, may be one off."""
    k = min(int((d - low) * per_metre), bins - 1)
    if k > 0 and d < low + k * var:
        return k - 1
    if k < bins - 1 and d >= low + (k + 1) * var:
        return k + 1
    return k


@njit(cache=True, nogil=True)
@no_type_check
def _average(ids, count, depth, support):
    """Fills support[h, w], which is 0, from the regions 1..count."""
    h, w = ids.shape
    pixels, total = np.zeros(count + 1, np.int64), np.zeros(count + 1)
    low, high = np.full(count + 1, np.inf), np.zeros(count + 1)
    labelled = 0
    for y in range(h):
        for x in range(w):
            i, d = ids[y, x], np.float64(depth[y, x])
            labelled += i > 0
            if 0 < d < np.inf:
                pixels[i] += 1
                total[i] += d
                low[i] = min(low[i], d)
                high[i] = max(high[i], d)
    if pixels.sum() == 0:
        return
    var = (high.max() - low.min()) / BINS
    per_metre = 1 / var if var > 0 else 0.0

    # A region of many bins has a row in these tables; `row` is -1 for the others.
    row, bins = np.full(count + 1, -1, np.int32), np.zeros(count + 1, np.int64)
    rows = 0
    for i in range(1, count + 1):
        if pixels[i] > 0 and var > 0 and not high[i] - low[i] < 2 * var:
            n = 1
            while n < BINS and low[i] + n * var < high[i] - HAIR * var:
                n += 1
            row[i], bins[i] = rows, n
            rows += 1
    held, value = np.zeros((rows, BINS), np.int64), np.zeros((rows, BINS))
    if rows:
        for y in range(h):
            for x in range(w):
                i, d = ids[y, x], np.float64(depth[y, x])
                if row[i] >= 0 and 0 < d < np.inf:
                    k = _bin(d, low[i], var, per_metre, bins[i])
                    held[row[i], k] += 1
                    value[row[i], k] += d
    for i in range(1, count + 1):
        r = row[i]
        if r < 0:
            continue
        start, n, s = 0, 0, 0.0
        for k in range(bins[i]):
            n += held[r, k]
            s += value[r, k]
            if n * bins[i] >= pixels[i] or k == bins[i] - 1:
                value[r, start : k + 1] = s / n
                start, n, s = k + 1, 0, 0.0

    mean = total / np.maximum(pixels, 1)
    known = 0
    for y in range(h):
        for x in range(w):
            i, d = ids[y, x], np.float64(depth[y, x])
            if i > 0 and 0 < d < np.inf:
                known += 1
                support[y, x] = mean[i] if row[i] < 0 else value[row[i], _bin(d, low[i], var, per_metre, bins[i])]
    if known < labelled:
        _fill_holes(ids, pixels, support)
        _fill_regions(ids, count, pixels, total.sum() / pixels.sum(), support)


@njit(cache=True, nogil=True)
@no_type_check
def _fill_holes(ids, pixels, support):
    """Grows the values of each region into its pixels without depth, a step at a time."""
    h, w = ids.shape
    coming = np.zeros((h, w), np.float32)  # values of the next step
    queue = np.empty(h * w, np.int64)
    end = 0
    for y in range(h):
        for x in range(w):
            i = ids[y, x]
            if i == 0 or pixels[i] == 0 or support[y, x] > 0:
                continue
            for v in range(max(y - 1, 0), min(y + 2, h)):
                for u in range(max(x - 1, 0), min(x + 2, w)):
                    s = support[v, u]
                    if ids[v, u] == i and s > 0 and (coming[y, x] == 0 or s < coming[y, x]):
                        coming[y, x] = s
            if coming[y, x] > 0:
                queue[end] = y * w + x
                end += 1
    start = 0
    while start < end:
        stop = end
        for q in range(start, stop):
            support[queue[q] // w, queue[q] % w] = coming[queue[q] // w, queue[q] % w]
        for q in range(start, stop):
            y, x = queue[q] // w, queue[q] % w
            s = support[y, x]
            for v in range(max(y - 1, 0), min(y + 2, h)):
                for u in range(max(x - 1, 0), min(x + 2, w)):
                    if ids[v, u] == ids[y, x] and support[v, u] == 0:
                        if coming[v, u] == 0:
                            queue[end] = v * w + u
                            end += 1
                            coming[v, u] = s
                        else:
                            coming[v, u] = min(coming[v, u], s)
        start = stop


@njit(cache=True, nogil=True)
@no_type_check
def _fill_regions(ids, count, pixels, image_mean, support):
    """Gives each region without depth the mean of the values that touch it."""
    h, w = ids.shape
    touching, total = np.zeros(count + 1, np.int64), np.zeros(count + 1)
    empty = False
    for y in range(h):
        for x in range(w):
            i = ids[y, x]
            if i == 0 or pixels[i] > 0:
                continue
            empty = True
            for v in range(max(y - 1, 0), min(y + 2, h)):
                for u in range(max(x - 1, 0), min(x + 2, w)):
                    if support[v, u] > 0:
                        touching[i] += 1
                        total[i] += support[v, u]
    if not empty:
        return
    for y in range(h):
        for x in range(w):
            i = ids[y, x]
            if i > 0 and pixels[i] == 0:
                support[y, x] = total[i] / touching[i] if touching[i] else image_mean


# --- means over regions, for losses -----------------------------------------------------------------------------------


def region_means(
    values: Float[Tensor, "b h w"], regions: Integer[Tensor, "_ _ _"]
) -> tuple[Float[Tensor, "b m"], Int64[Tensor, "b m"]]:
    """The mean of `values` inside each region, and its number of pixels; differentiable in the values.

    `regions` counts from 1 in each image, as `regions()` does, up to m in the batch; pixels of 0 are left out, so that
    `regions.where(depth > 0, 0)` leaves out what has no true depth. A region without pixels has mean 0 and 0 pixels.
    With them the loss of Eq. (2), averaged over the images of the batch, is

        means, pixels = region_means((y - y_true).square(), regions)
        loss = (means.sum(1) / (pixels > 0).sum(1).clamp(min=1)).mean()

    Sums are at least float32. Raises UserError for sizes that differ and for negative numbers.
    """
    if values.shape != regions.shape:
        raise UserError(f"values of shape {list(values.shape)} do not fit regions of {list(regions.shape)}")
    if regions.numel() == 0:
        raise UserError(f"means over regions need at least one pixel, the shape is {list(regions.shape)}")
    lowest, highest = (int(n) for n in regions.aminmax())
    if lowest < 0:
        raise UserError(f"regions count from 1, and 0 is none: {lowest} is no region")
    index = regions.flatten(1).long()
    flat = (values if values.dtype == torch.float64 else values.float()).flatten(1)
    sums = flat.new_zeros(len(flat), highest + 1).scatter_add(1, index, flat)
    pixels = index.new_zeros(len(index), highest + 1).scatter_add(1, index, torch.ones_like(index))
    return (sums / pixels.clamp(min=1))[:, 1:], pixels[:, 1:]
