"""The compiled loops of `ops.mean_field`: sweeps over tiles of points, products and sums over rows of vertices.

Rows are of channels, padded to whole vectors (`ops.vectors`); `start` and `stop` are a thread's share.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from enfilade.ops.vectors import (
    LANES,
    above,
    add,
    at,
    exp,
    fill,
    highest,
    larger,
    load,
    lowest_bit,
    madd,
    mul,
    store,
    sub,
    total,
)

TILE = 64  # points
START, RESUME, STEP, END = range(4)  # sweeps: Q from the unary; the given Q; Q from the messages; logits from them
# What a point's message to itself leaves out, for a label: of a logit, where the lattice's own error is some hundredths
# and more, and in the backward pass of the gradient of the point's logits.
NEGLIGIBLE = 1e-3
NEGLIGIBLE_SHARE = 1e-4


@njit(cache=True, nogil=True)
@no_type_check
def to_rows(values, padding, rows, start, stop):
    channels, p = values.shape[1:]
    width = (channels + LANES - 1) // LANES * LANES
    while start < stop:
        image = start // p
        count = min(4 * TILE, stop - start, (image + 1) * p - start)
        source = values[image, :, start - image * p : start - image * p + count]
        target = rows[start * width : (start + count) * width].reshape(count, width)
        for c in range(0, channels, LANES):
            for i in range(count):
                for k in range(c, min(c + LANES, channels)):
                    target[i, k] = source[k, i]
        target[:, channels:] = padding
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def from_rows(rows, values, start, stop):
    channels, p = values.shape[1:]
    width = (channels + LANES - 1) // LANES * LANES
    while start < stop:
        image = start // p
        count = min(4 * TILE, stop - start, (image + 1) * p - start)
        source = rows[start * width : (start + count) * width].reshape(count, width)
        for c in range(channels):
            target = values[image, c, start - image * p : start - image * p + count]
            for i in range(count):
                target[i] = source[i, c]
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def place(offsets, weights, before, after, corner, row, all_offsets, inner, outer, start, stop):
    """One lattice's corners among those of all."""
    for i in range(start, stop):
        for k in range(offsets.shape[1]):
            all_offsets[i, corner + k] = offsets[i, k] + row
            inner[i, corner + k] = weights[i, k] * before[i]
            outer[i, corner + k] = weights[i, k] * after[i]


@njit(cache=True, nogil=True)
@no_type_check
def move(target, source, start, stop):
    for i in range(start, stop):
        target[i] += source[i]
        source[i] = 0


@njit(cache=True, nogil=True)
@no_type_check
def _gather(table, width, offsets, weights, corners, start, count, tile):
    """Adds to the rows of the tile what points start.. slice from the table. Five vectors at a time keep the sums in
    registers and the arithmetic busy."""
    for i in range(count):
        o, j = (start + i) * corners, i * width
        end, back = j + width, j
        while j + 5 * LANES <= end:
            a0, a1, a2 = load(tile, j), load(tile, j + LANES), load(tile, j + 2 * LANES)
            a3, a4 = load(tile, j + 3 * LANES), load(tile, j + 4 * LANES)
            for k in range(o, o + corners):
                row, weight = at(offsets, k) * width + (j - back), at(weights, k)
                a0, a1 = madd(a0, weight, load(table, row)), madd(a1, weight, load(table, row + LANES))
                a2 = madd(a2, weight, load(table, row + 2 * LANES))
                a3 = madd(a3, weight, load(table, row + 3 * LANES))
                a4 = madd(a4, weight, load(table, row + 4 * LANES))
            store(tile, j, a0)
            store(tile, j + LANES, a1)
            store(tile, j + 2 * LANES, a2)
            store(tile, j + 3 * LANES, a3)
            store(tile, j + 4 * LANES, a4)
            j += 5 * LANES
        while j + 2 * LANES <= end:
            a0, a1 = load(tile, j), load(tile, j + LANES)
            for k in range(o, o + corners):
                row, weight = at(offsets, k) * width + (j - back), at(weights, k)
                a0, a1 = madd(a0, weight, load(table, row)), madd(a1, weight, load(table, row + LANES))
            store(tile, j, a0)
            store(tile, j + LANES, a1)
            j += 2 * LANES
        if j < end:
            a0 = load(tile, j)
            for k in range(o, o + corners):
                a0 = madd(a0, at(weights, k), load(table, at(offsets, k) * width + (j - back)))
            store(tile, j, a0)


@njit(cache=True, nogil=True)
@no_type_check
def _scatter(tile, width, offsets, weights, corners, start, count, table):
    """Splats the rows of the tile."""
    for i in range(count):
        o = (start + i) * corners
        for k in range(o, o + corners):
            row, weight = at(offsets, k) * width, at(weights, k)
            for j in range(i * width, (i + 1) * width, LANES):
                store(table, row, madd(load(table, row), weight, load(tile, j)))
                row += LANES


@njit(cache=True, nogil=True)
@no_type_check
def _softmax(tile, width, count, rows, start):
    """The rows of the tile, in place, and rows start.. of the others."""
    for i in range(count):
        first, end = i * width, (i + 1) * width
        ahead = start * width
        top = load(tile, first)
        for j in range(first + LANES, end, LANES):
            top = larger(top, load(tile, j))
        top, sums = fill(highest(top)), fill(np.float32(0))
        for j in range(first, end, LANES):
            e = exp(sub(load(tile, j), top))
            store(tile, j, e)
            sums = add(sums, e)
        share = fill(np.float32(1) / total(sums))
        for j in range(first, end, LANES):
            e = mul(load(tile, j), share)
            store(tile, j, e)
            store(rows, ahead + j, e)


@njit(cache=True, nogil=True)
@no_type_check
def multiply(source, matrix, channels, width, start, stop, target):
    """target = source matrix, of rows: four rows by two vectors at a time, what the registers hold."""
    zero = fill(np.float32(0))
    row = start
    while row < stop:
        # Where fewer than four are left, the last stands in for those that lack.
        r0, r1, r2, r3 = row, min(row + 1, stop - 1), min(row + 2, stop - 1), min(row + 3, stop - 1)
        r0, r1, r2, r3 = r0 * width, r1 * width, r2 * width, r3 * width
        for j in range(0, width, 2 * LANES):
            two = j + LANES < width
            i = j + LANES if two else j
            a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
            for c in range(channels):
                x, y = load(matrix, c * width + j), load(matrix, c * width + i)
                s0, s1, s2, s3 = at(source, r0 + c), at(source, r1 + c), at(source, r2 + c), at(source, r3 + c)
                a0, a1, a2, a3 = madd(a0, s0, x), madd(a1, s1, x), madd(a2, s2, x), madd(a3, s3, x)
                if two:
                    b0, b1, b2, b3 = madd(b0, s0, y), madd(b1, s1, y), madd(b2, s2, y), madd(b3, s3, y)
            store(target, r0 + j, a0)
            store(target, r1 + j, a1)
            store(target, r2 + j, a2)
            store(target, r3 + j, a3)
            if two:
                store(target, r0 + i, b0)
                store(target, r1 + i, b1)
                store(target, r2 + i, b2)
                store(target, r3 + i, b3)
        row += 4


@njit(cache=True, nogil=True)
@no_type_check
def correlate(first, second, width, start, stop, products):
    """products -= first^T second, of rows, over some rows at a time that stay in the first-level cache."""
    zero = fill(np.float32(0))
    while start < stop:
        end = min(start + TILE, stop)
        for c in range(0, width, 4):
            for j in range(0, width, 2 * LANES):
                two = j + LANES < width
                i = j + LANES if two else j
                a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
                for row in range(start * width, end * width, width):
                    x, y = load(second, row + j), load(second, row + i)
                    s0, s1 = at(first, row + c), at(first, row + c + 1)
                    s2, s3 = at(first, row + c + 2), at(first, row + c + 3)
                    a0, a1, a2, a3 = madd(a0, s0, x), madd(a1, s1, x), madd(a2, s2, x), madd(a3, s3, x)
                    if two:
                        b0, b1, b2, b3 = madd(b0, s0, y), madd(b1, s1, y), madd(b2, s2, y), madd(b3, s3, y)
                p = c * width
                store(products, p + j, sub(load(products, p + j), a0))
                store(products, p + width + j, sub(load(products, p + width + j), a1))
                store(products, p + 2 * width + j, sub(load(products, p + 2 * width + j), a2))
                store(products, p + 3 * width + j, sub(load(products, p + 3 * width + j), a3))
                if two:
                    store(products, p + i, sub(load(products, p + i), b0))
                    store(products, p + width + i, sub(load(products, p + width + i), b1))
                    store(products, p + 2 * width + i, sub(load(products, p + 2 * width + i), b2))
                    store(products, p + 3 * width + i, sub(load(products, p + 3 * width + i), b3))
        start = end


@njit(cache=True, nogil=True)
@no_type_check
def _labels(q, point, first, width, bound):
    """Bit i is set where label first + i, of up to 64, has a q above the bound at a point."""
    bits = 0
    for c in range(first, min(first + 64, width), LANES):
        bits |= above(load(q, point + c), bound) << (c - first)
    return bits


@njit(cache=True, nogil=True)
@no_type_check
def _spread(q, width, start, count, own, reach, least, negligible):
    """How many labels a point of the tile has whose message to itself counts, by every eighth point: few once Q has
    made up its mind, and then they are taken one by one; else matrices are multiplied."""
    labels, points = 0, 0
    for i in range(start, start + count, 8):
        points += 1
        most = np.float32(0)
        for k in range(own.shape[1]):
            most = max(most, own[i, k] * max(reach[k], least))
        if most > negligible:
            for c in range(0, width, 64):
                bits = _labels(q, i * width, c, width, np.float32(negligible) / most)
                while bits:
                    labels += 1
                    bits &= bits - 1
    return labels / points


@njit(cache=True, nogil=True)
@no_type_check
def _scaled(rows, width, start, count, own, k, sign, out):
    """The rows of points start.. times sign * own_k."""
    for i in range(count):
        factor = fill(sign * own[start + i, k])
        for j in range(i * width, (i + 1) * width, LANES):
            store(out, j, mul(factor, load(rows, start * width + j)))


@njit(cache=True, nogil=True)
@no_type_check
def _return_own(tile, width, count, q, start, own, a, b, rest, reach, room, more):
    """Adds own_k M_k q to the logits in the tile, for what sum_j K_ij Q_j holds of Q_i. `rest` is negative."""
    for i in range(count):
        first, point = i * width, (start + i) * width
        along, all_ = np.float32(0), np.float32(0)
        for k in range(own.shape[1]):
            along += own[start + i, k] * a[k]
            all_ += own[start + i, k] * b[k]
        equal = fill(all_)
        for j in range(0, width, LANES):
            store(tile, first + j, madd(add(load(tile, first + j), equal), along, load(q, point + j)))
    if _spread(q, width, start, count, own, reach, np.float32(0), NEGLIGIBLE) > width / 12:
        for k in range(own.shape[1]):
            if reach[k]:
                _scaled(q, width, start, count, own, k, np.float32(-1), room)
                multiply(room, rest[k * width * width : (k + 1) * width * width], width, width, 0, count, more)
                for j in range(0, count * width, LANES):
                    store(tile, j, add(load(tile, j), load(more, j)))
        return
    for i in range(count):
        first, point, most = i * width, (start + i) * width, np.float32(0)
        for k in range(own.shape[1]):
            most = max(most, own[start + i, k] * reach[k])
        if most <= NEGLIGIBLE:
            continue
        for c in range(0, width, 64):
            bits = _labels(q, point, c, width, np.float32(NEGLIGIBLE) / most)
            while bits:
                label = c + lowest_bit(bits)
                bits &= bits - 1
                for k in range(own.shape[1]):
                    factor, column = -own[start + i, k] * at(q, point + label), (k * width + label) * width
                    for j in range(0, width, LANES):
                        store(tile, first + j, madd(load(tile, first + j), factor, load(rest, column + j)))


@njit(cache=True, nogil=True)
@no_type_check
def _return_own_back(tile, width, count, g, q, start, own, a, b, rest, rest_rows, reach, learn, products, room, more):
    """The transposed `_return_own`: from the gradient g of the logits to that of Q, in the tile, and of the M."""
    least = np.float32(1) if learn else np.float32(0)
    for i in range(count):
        first, point = i * width, (start + i) * width
        along, all_ = np.float32(0), np.float32(0)
        for k in range(own.shape[1]):
            along += own[start + i, k] * a[k]
            all_ += own[start + i, k] * b[k]
        sums = fill(np.float32(0))
        for j in range(point, point + width, LANES):
            sums = add(sums, load(g, j))
        equal = fill(all_ * total(sums))
        for j in range(0, width, LANES):
            store(tile, first + j, madd(add(load(tile, first + j), equal), along, load(g, point + j)))
    if _spread(q, width, start, count, own, reach, least, NEGLIGIBLE_SHARE) > width / 4:
        for k in range(own.shape[1]):
            square = slice(k * width * width, (k + 1) * width * width)
            _scaled(g, width, start, count, own, k, np.float32(-1), room)
            if learn:
                correlate(q[start * width : (start + count) * width], room, width, 0, count, products[square])
            if reach[k]:
                multiply(room, rest_rows[square], width, width, 0, count, more)
                for j in range(0, count * width, LANES):
                    store(tile, j, add(load(tile, j), load(more, j)))
        return
    for i in range(count):
        first, point, most = i * width, (start + i) * width, np.float32(0)
        for k in range(own.shape[1]):
            most = max(most, own[start + i, k] * max(reach[k], least))
        if most <= NEGLIGIBLE_SHARE:
            continue
        for c in range(0, width, 64):
            bits = _labels(q, point, c, width, np.float32(NEGLIGIBLE_SHARE) / most)
            while bits:
                label = c + lowest_bit(bits)
                bits &= bits - 1
                for k in range(own.shape[1]):
                    column, weight = (k * width + label) * width, own[start + i, k]
                    if reach[k]:
                        sums = fill(np.float32(0))
                        for j in range(0, width, LANES):
                            sums = add(sums, mul(load(rest, column + j), load(g, point + j)))
                        tile[first + label] -= weight * total(sums)
                    if learn:
                        factor = weight * at(q, point + label)
                        for j in range(0, width, LANES):
                            store(products, column + j, madd(load(products, column + j), factor, load(g, point + j)))


@njit(cache=True, nogil=True)
@no_type_check
def sweep(
    mode,
    unary,
    before,
    after,
    table,
    target,
    channels,
    offsets,
    inner,
    outer,
    corners,
    own,
    a,
    b,
    rest,
    reach,
    start,
    stop,
):
    width = (channels + LANES - 1) // LANES * LANES
    tile = np.empty(TILE * width, np.float32)
    room, more = np.empty_like(tile), np.empty_like(tile)
    while start < stop:
        count = min(TILE, stop - start)
        source = before if mode == RESUME else unary
        for j in range(0, count * width, LANES):
            store(tile, j, load(source, start * width + j))
        if mode >= STEP:  # there are messages
            _gather(table, width, offsets, outer, corners, start, count, tile)
            if own.shape[1]:
                _return_own(tile, width, count, before, start, own, a, b, rest, reach, room, more)
        if mode == END:
            for j in range(0, count * width, LANES):
                store(after, start * width + j, load(tile, j))
        else:
            if mode != RESUME:
                _softmax(tile, width, count, after, start)
            _scatter(tile, width, offsets, inner, corners, start, count, target)
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def sweep_back(
    mode,
    g,
    sums,
    q,
    table,
    target,
    channels,
    offsets,
    inner,
    outer,
    corners,
    own,
    a,
    b,
    rest,
    rest_rows,
    reach,
    learn,
    products,
    start,
    stop,
):
    width = (channels + LANES - 1) // LANES * LANES
    tile = np.empty(TILE * width, np.float32)
    room, more = np.empty_like(tile), np.empty_like(tile)
    while start < stop:
        count = min(TILE, stop - start)
        if mode == RESUME:
            for j in range(0, count * width, LANES):
                store(tile, j, load(g, start * width + j))
        else:
            tile[:] = 0
            _gather(table, width, offsets, inner, corners, start, count, tile)
            if own.shape[1]:
                _return_own_back(
                    tile, width, count, g, q, start, own, a, b, rest, rest_rows, reach, learn, products, room, more
                )
            # Softmax: the gradient of the logits is q (dq - <q, dq>).
            for i in range(count):
                first, ahead = i * width, start * width
                mean = fill(np.float32(0))
                for j in range(first, first + width, LANES):
                    mean = add(mean, mul(load(q, ahead + j), load(tile, j)))
                mean = fill(total(mean))
                for j in range(first, first + width, LANES):
                    x = mul(load(q, ahead + j), sub(load(tile, j), mean))
                    store(tile, j, x)
                    store(g, ahead + j, x)
                    store(sums, ahead + j, add(load(sums, ahead + j), x))
        if mode != END:
            _scatter(tile, width, offsets, outer, corners, start, count, target)
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def scale(source, a, b, width, start, stop, target):
    """target = source (a I + b 1 1^T), of rows."""
    for r in range(start * width, stop * width, width):
        sums = fill(np.float32(0))
        for j in range(r, r + width, LANES):
            sums = add(sums, load(source, j))
        sums = fill(b * total(sums))
        for j in range(r, r + width, LANES):
            store(target, j, madd(sums, a, load(source, j)))
