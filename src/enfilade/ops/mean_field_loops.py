"""The compiled loops of `ops.mean_field`: sweeps over tiles of points, products and sums over rows of vertices.

Rows are of channels, padded to whole vectors (`ops.vectors`); `start` and `stop` are a thread's share. A sweep makes
several passes over the rows of a tile, in the first-level cache: each has no chain of dependent instructions longer
than the processor can see past.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from enfilade.ops.vectors import (
    LANES,
    above,
    add,
    at,
    count_bits,
    exp,
    fill,
    highest,
    larger,
    load,
    load_short,
    lowest_bit,
    madd,
    mul,
    short_above,
    short_at,
    size,
    store,
    store_short,
    sub,
    total,
    turn,
)

TILE = 128  # points
FEW = 12  # one label in so many is dealt with by itself, more by products of matrices
START, RESUME, STEP, END = range(4)  # sweeps: Q from the unary; the given Q; Q from the messages; logits from them
# What a point's message to itself leaves out, for a label and for a kernel: of a logit, where the lattice's own error
# is some hundredths and more; in the backward pass, as a share of the mean gradient at a point, of a logit and of what
# is summed over all points to the gradient of the matrices.
NEGLIGIBLE = 4e-3
NEGLIGIBLE_SHARE, NEGLIGIBLE_PRODUCT = 4e-4, 4e-5


@njit(cache=True, nogil=True)
@no_type_check
def _transpose(source, i, step, target, j, width, rows, columns):
    """target[j + width * r + c] = source[i + step * c + r] for r below rows, c below columns."""
    full_rows, full_columns = rows // LANES * LANES, columns // LANES * LANES
    for r in range(0, full_rows, LANES):
        for c in range(0, full_columns, LANES):
            turn(source, i + step * c + r, step, target, j + width * r + c, width)
    for r in range(rows):
        for c in range(full_columns if r < full_rows else 0, columns):
            target[j + width * r + c] = source[i + step * c + r]


@njit(cache=True, nogil=True)
@no_type_check
def _from_planes(planes, channels, p, width, start, count, padding, tile):
    """Points start.. of an image, b c p, as rows of the tile."""
    first = start // p * p * channels + start % p
    _transpose(planes, first, p, tile, 0, width, count, channels)
    if channels < width:
        for i in range(count):
            tile[i * width + channels : (i + 1) * width] = padding


@njit(cache=True, nogil=True)
@no_type_check
def _to_planes(tile, channels, p, width, start, count, planes):
    _transpose(tile, 0, width, planes, start // p * p * channels + start % p, p, channels, count)


@njit(cache=True, nogil=True)
@no_type_check
def place(offsets, weights, norm, gain, divide, by_row, corner, row, all_offsets, inner, outer, own, start, stop):
    """One lattice's corners among those of all. If K is to be divided by its norm, a row's division lies in the slice,
    a symmetric one's half there, half in the splat, and so does the gain. `own`, unless empty, becomes K_ii: no more
    than the norm, which it comes to for a point that is alone. It is `Lattice.self_weight`, whose sum over pairs of
    corners falls by half from one to the next around the simplex, so that two rounds add it up."""
    one, half, corners = np.float32(1), np.float32(0.5), offsets.shape[1]
    rest = one - half**corners
    for i in range(start, stop):
        after = gain / norm[i] if divide else gain
        before = one if by_row else np.sqrt(after)
        after = after if by_row else before
        for k in range(corners):
            all_offsets[i, corner + k] = offsets[i, k] + row
            inner[i, corner + k] = weights[i, k] * before
            outer[i, corner + k] = weights[i, k] * after
        if len(own):
            come, squares, pairs = np.float32(0), np.float32(0), np.float32(0)
            for k in range(corners):
                come = half * (come + weights[i, k])
            come /= rest  # from all rounds, not from one
            for k in range(corners):
                squares += weights[i, k] * weights[i, k]
                pairs += weights[i, k] * come
                come = half * (come + weights[i, k])
            whole = min(gain * (squares + (rest + rest) * pairs), norm[i])
            own[i] = whole / norm[i] if divide else whole


@njit(cache=True, nogil=True)
@no_type_check
def move(target, source, start, stop):
    for i in range(start, stop):
        target[i] += source[i]
        source[i] = 0


@njit(cache=True, nogil=True)
@no_type_check
def _gather(table, width, offsets, weights, corners, start, count, base, ahead, equal, first, given, tile):
    """The rows of the tile: rows of `base` from `ahead` on, a number `equal` for each, what points start.. slice from
    the table, and if they are given, for labels that are marked, columns of the matrices: rows of the table from
    `first_row` on. Five vectors at a time keep the sums in registers and the arithmetic busy."""
    some, first_row, own, marks, q, least = given
    words = (width + 63) // 64
    for i in range(count):
        o, j, same = (start + i) * corners, i * width, fill(at(equal, first + i))
        end, back, point = j + width, j, (start + i) * width
        while j + 5 * LANES <= end:
            a0, a1 = add(load(base, ahead + j), same), add(load(base, ahead + j + LANES), same)
            a2, a3 = add(load(base, ahead + j + 2 * LANES), same), add(load(base, ahead + j + 3 * LANES), same)
            a4 = add(load(base, ahead + j + 4 * LANES), same)
            for k in range(o, o + corners):
                row, weight = at(offsets, k) * width + (j - back), at(weights, k)
                a0, a1 = madd(a0, weight, load(table, row)), madd(a1, weight, load(table, row + LANES))
                a2 = madd(a2, weight, load(table, row + 2 * LANES))
                a3 = madd(a3, weight, load(table, row + 3 * LANES))
                a4 = madd(a4, weight, load(table, row + 4 * LANES))
            for word in range(words if some else 0):
                bits = marks[(start + i) * words + word]
                while bits:
                    label = word * 64 + lowest_bit(bits)
                    bits &= bits - 1
                    share, row = short_at(q, point + label), (first_row + label) * width + (j - back)
                    for k in range(len(own)):
                        weight = own[k, start + i]
                        if weight < least[k]:  # as a wide kernel's is at most points
                            row += width * width
                            continue
                        weight *= share
                        a0, a1 = madd(a0, weight, load(table, row)), madd(a1, weight, load(table, row + LANES))
                        a2 = madd(a2, weight, load(table, row + 2 * LANES))
                        a3 = madd(a3, weight, load(table, row + 3 * LANES))
                        a4 = madd(a4, weight, load(table, row + 4 * LANES))
                        row += width * width
            store(tile, j, a0)
            store(tile, j + LANES, a1)
            store(tile, j + 2 * LANES, a2)
            store(tile, j + 3 * LANES, a3)
            store(tile, j + 4 * LANES, a4)
            j += 5 * LANES
        while j < end:
            a0 = add(load(base, ahead + j), same)
            for k in range(o, o + corners):
                a0 = madd(a0, at(weights, k), load(table, at(offsets, k) * width + (j - back)))
            for word in range(words if some else 0):
                bits = marks[(start + i) * words + word]
                while bits:
                    label = word * 64 + lowest_bit(bits)
                    bits &= bits - 1
                    share, row = short_at(q, point + label), (first_row + label) * width + (j - back)
                    for k in range(len(own)):
                        if own[k, start + i] >= least[k]:
                            a0 = madd(a0, share * own[k, start + i], load(table, row))
                        row += width * width
            store(tile, j, a0)
            j += LANES


@njit(cache=True, nogil=True)
@no_type_check
def _scatter(tile, width, offsets, weights, corners, start, count, table):
    """Splats the rows of the tile, five vectors at a time like `_gather`."""
    for i in range(count):
        o, j = (start + i) * corners, i * width
        end, back = j + width, j
        while j + 5 * LANES <= end:
            a0, a1, a2 = load(tile, j), load(tile, j + LANES), load(tile, j + 2 * LANES)
            a3, a4 = load(tile, j + 3 * LANES), load(tile, j + 4 * LANES)
            for k in range(o, o + corners):
                r0, weight = at(offsets, k) * width + (j - back), at(weights, k)
                r1, r2, r3, r4 = r0 + LANES, r0 + 2 * LANES, r0 + 3 * LANES, r0 + 4 * LANES
                store(table, r0, madd(load(table, r0), weight, a0))
                store(table, r1, madd(load(table, r1), weight, a1))
                store(table, r2, madd(load(table, r2), weight, a2))
                store(table, r3, madd(load(table, r3), weight, a3))
                store(table, r4, madd(load(table, r4), weight, a4))
            j += 5 * LANES
        while j < end:
            a0 = load(tile, j)
            for k in range(o, o + corners):
                row = at(offsets, k) * width + (j - back)
                store(table, row, madd(load(table, row), at(weights, k), a0))
            j += LANES


@njit(cache=True, nogil=True)
@no_type_check
def _softmax(tile, width, count, shares, shorts, start, bounds, marks):
    """The rows of the tile, in place, and in 16 bits rows start.. of the others; `marks` of what is above the bounds.
    `shares` is room for the points."""
    for i in range(count):
        top = load(tile, i * width)
        for j in range(i * width + LANES, (i + 1) * width, LANES):
            top = larger(top, load(tile, j))
        shares[i] = highest(top)
    for i in range(count):
        top, sums = fill(shares[i]), fill(np.float32(0))
        for j in range(i * width, (i + 1) * width, LANES):
            e = exp(sub(load(tile, j), top))
            store(tile, j, e)
            sums = add(sums, e)
        shares[i] = np.float32(1) / total(sums)
    for i in range(count):
        share = fill(shares[i])
        for j in range(i * width, (i + 1) * width, LANES):
            e = mul(load(tile, j), share)
            store(tile, j, e)
            store_short(shorts, start * width + j, e)
    _mark_above(tile, width, count, start, bounds, marks)


@njit(cache=True, nogil=True)
@no_type_check
def _mark_above(tile, width, count, start, bounds, marks):
    """Of points start.., whose Q is in the tile, the labels above the point's bound, as bits."""
    if len(bounds) == 0:
        return
    words = (width + 63) // 64
    for i in range(count):
        bound = fill(at(bounds, start + i))
        for word in range(words):
            bits, first = 0, i * width + word * 64
            for c in range(0, min(64, width - word * 64), LANES):
                bits |= above(load(tile, first + c), bound) << c
            marks[(start + i) * words + word] = bits


@njit(cache=True, nogil=True)
@no_type_check
def survey(own, b, reach_whole, bounds, equal, start, stop):
    """For each point, above which Q its message to itself counts (2: never), and sum_k own_k b_k."""
    for i in range(start, stop):
        heft, sums = np.float32(0), np.float32(0)
        for k in range(len(own)):
            heft = max(heft, own[k, i] * reach_whole[k])
            sums += own[k, i] * b[k]
        bounds[i] = np.float32(NEGLIGIBLE) / heft if heft > np.float32(NEGLIGIBLE) else np.float32(2)
        equal[i] = sums


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
def _combined(own, start, count, factors, out):
    """sum_k own_k factors_k of points start.."""
    for i in range(count):
        out[i] = 0
    for k in range(len(own)):
        row, factor = own[k, start : start + count], factors[k]
        for i in range(count):
            out[i] += factor * row[i]


@njit(cache=True, nogil=True)
@no_type_check
def _mark(q, width, start, count, heft, marks):
    """The labels of points start.. whose message to themselves counts, q * heft > 1, as bits; returns their number.
    They are few once Q has made up its mind."""
    words, number = (width + 63) // 64, 0
    bounds = np.empty(LANES, np.uint16)
    for i in range(count):
        weight = at(heft, i)
        if weight > 1:
            store_short(bounds, 0, fill(np.float32(1) / weight))
        for word in range(words):
            bits, first = 0, (start + i) * width + word * 64
            if weight > 1:
                for c in range(0, min(64, width - word * 64), LANES):
                    bits |= short_above(q, first + c, at(bounds, 0)) << c
                number += count_bits(bits)
            marks[i * words + word] = bits
    return number


@njit(cache=True, nogil=True)
@no_type_check
def _weighted(rows, first, width, count, start, own, k, out):
    """-own_k times rows that begin at `first`, of points start.."""
    for i in range(count):
        factor = fill(-own[k, start + i])
        for j in range(i * width, (i + 1) * width, LANES):
            store(out, j, mul(factor, load(rows, first + j)))


@njit(cache=True, nogil=True)
@no_type_check
def _buffers(width):
    """Of a thread: four tiles; two numbers and bits for each point."""
    tiles = np.empty(TILE * width, np.float32), np.empty(TILE * width, np.float32)
    tiles = *tiles, np.empty(TILE * width, np.float32), np.empty(TILE * width, np.float32)
    numbers = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    return tiles, numbers, np.zeros(TILE * ((width + 63) // 64), np.int64)


@njit(cache=True, nogil=True)
@no_type_check
def _return_own(width, count, unary, q, start, own, m, tiles, factors, marks):
    """For what sum_j K_ij Q_j holds of Q_i: own_k M_k q, with M = b 1 1^T + the whole rest. Labels that are marked are
    left to `_gather`; but if they are many, the first tile is the unary plus the rest's product, and the result True.
    """
    a, _, reach, rest, _, _, _ = m
    tile, shares, room, more = tiles
    words, number = (width + 63) // 64, 0
    for i in range(start * words, (start + count) * words):
        number += count_bits(marks[i])
    dense = number > count * width // FEW
    if dense:
        _combined(own, start, count, a, factors)
        for i in range(count):
            for j in range(i * width, (i + 1) * width, LANES):
                share = load_short(q, start * width + j)
                store(shares, j, share)
                store(tile, j, madd(load(unary, start * width + j), factors[i], share))
        for k in range(len(own)):
            if reach[k]:
                _weighted(shares, 0, width, count, start, own, k, room)
                multiply(room, rest[k * width * width : (k + 1) * width * width], width, width, 0, count, more)
                for j in range(0, count * width, LANES):
                    store(tile, j, add(load(tile, j), load(more, j)))
    return dense


@njit(cache=True, nogil=True)
@no_type_check
def _return_own_back(width, count, g, q, start, own, m, mean, learn, products, tiles, numbers, marks):
    """The transposed `_return_own`: from the gradient g of the logits to that of Q, in the first tile, and of the M;
    the second holds q. `mean` is the sum of |g| over a point's logits, on average over the points."""
    a, b, reach, _, rest_rows, reach_whole, whole = m
    tile, shares, room, more = tiles
    heft, sizes = numbers
    words, ahead = (width + 63) // 64, start * width
    _combined(own, start, count, b, heft)
    for i in range(count):
        sums, spread = fill(np.float32(0)), fill(np.float32(0))
        for j in range(ahead + i * width, ahead + (i + 1) * width, LANES):
            sums, spread = add(sums, load(g, j)), add(spread, size(load(g, j)))
        sizes[i] = total(spread)
        equal = fill(at(heft, i) * total(sums))
        for j in range(i * width, (i + 1) * width, LANES):
            store(tile, j, equal)
    for k in range(len(own)):
        square = slice(k * width * width, (k + 1) * width * width)
        # The larger of what counts for Q and what counts for M
        counts = max(reach_whole[k] / np.float32(NEGLIGIBLE_SHARE), np.float32(learn / NEGLIGIBLE_PRODUCT)) / mean
        for i in range(count):
            heft[i] = own[k, start + i] * sizes[i] * counts
        number = _mark(q, width, start, count, heft, marks)
        if number > count * width // FEW:
            if learn:
                _weighted(shares, 0, width, count, start, own, k, room)
                correlate(room, g[ahead : ahead + count * width], width, 0, count, products[square])
            _weighted(g, ahead, width, count, start, own, k, room)
            for j in range(0, count * width, LANES):
                store(tile, j, madd(load(tile, j), -a[k], load(room, j)))
            if reach[k]:
                multiply(room, rest_rows[square], width, width, 0, count, more)
                for j in range(0, count * width, LANES):
                    store(tile, j, add(load(tile, j), load(more, j)))
        elif number:
            for i in range(count):
                for word in range(words):
                    bits = marks[i * words + word]
                    while bits:
                        label = word * 64 + lowest_bit(bits)
                        bits &= bits - 1
                        weight, factor = own[k, start + i], own[k, start + i] * at(shares, i * width + label)
                        row, point, sums = (k * width + label) * width, ahead + i * width, fill(np.float32(0))
                        for j in range(0, width, LANES):
                            sums = add(sums, mul(load(whole, row + j), load(g, point + j)))
                        tile[i * width + label] += weight * total(sums)
                        if learn:
                            for j in range(0, width, LANES):
                                step = madd(load(products, row + j), factor, load(g, point + j))
                                store(products, row + j, step)


@njit(cache=True, nogil=True)
@no_type_check
def sweep(
    mode, planes, full, unary, before, after, marks, table, first_row, target, channels, points, m, known, start, stop
):
    """From the messages in the table, or the `unary` in `planes`, to the next Q, `after` and splatted onto the target;
    at the END to logits in `planes`. `before` and `after` hold Q in 16 bits, and `full`, unless empty, in 32; `marks`
    holds the labels of Q that count, by the `survey`, in messages to themselves. From `first_row` on the table has the
    columns of the matrices."""
    offsets, inner, outer, corners, own, p = points
    width = (channels + LANES - 1) // LANES * LANES
    tiles, (shares, _), _ = _buffers(width)
    tile, (bounds, equal) = tiles[0], known
    least = np.float32(NEGLIGIBLE) / np.maximum(m[5], np.float32(1e-30))
    while start < stop:
        count = min(TILE, stop - start, p - start % p)
        ahead = start * width
        if mode <= RESUME:
            _from_planes(planes, channels, p, width, start, count, np.float32(-np.inf), tile)
            for j in range(0, count * width, LANES):
                store(unary, ahead + j, load(tile, j))
        else:
            dense = False
            if len(own):
                dense = _return_own(width, count, unary, before, start, own, m, tiles, shares, marks)
            base, base_ahead = (tile, 0) if dense else (unary, ahead)
            given = len(own) and not dense, first_row, own, marks, before, least
            _gather(table, width, offsets, outer, corners, start, count, base, base_ahead, equal, start, given, tile)
        if mode == END:
            _to_planes(tile, channels, p, width, start, count, planes)
        else:
            if mode == RESUME:
                for j in range(0, count * width, LANES):
                    x = load(full, ahead + j)
                    store(tile, j, x)
                    store_short(after, ahead + j, x)
                _mark_above(tile, width, count, start, bounds, marks)
            else:
                _softmax(tile, width, count, shares, after, start, bounds, marks)
                if len(full):
                    for j in range(0, count * width, LANES):
                        store(full, ahead + j, load(tile, j))
            _scatter(tile, width, offsets, inner, corners, start, count, target)
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def sweep_back(
    mode, planes, g, sums, old, earlier, mean, q, table, target, channels, points, m, learn, products, start, stop
):
    """At the RESUME from the gradient of the logits in `planes` to its rows g, splatted onto the target; returns the
    sum of |g|. Then from the gradient of the messages in the table to that of the logits before, g again; at the END to
    that of the unary, the sum of all g, in `planes`. What is summed so far is in `sums`, if it is `earlier` than
    nothing, and there every other sweep adds two, its g and the `old` one."""
    offsets, inner, outer, corners, own, p = points
    width = (channels + LANES - 1) // LANES * LANES
    tiles, numbers, marks = _buffers(width)
    tile, shares, _, _ = tiles
    average, zero = numbers[0], np.zeros(TILE, np.float32)
    given = False, 0, own, marks, q, zero
    whole = 0.0
    while start < stop:
        count = min(TILE, stop - start, p - start % p)
        ahead = start * width
        if mode == RESUME:
            _from_planes(planes, channels, p, width, start, count, np.float32(0), tile)
            spread = fill(np.float32(0))
            for j in range(0, count * width, LANES):
                store(g, ahead + j, load(tile, j))
                spread = add(spread, size(load(tile, j)))
            whole += total(spread)
        else:
            for j in range(0, count * width, LANES):
                store(shares, j, load_short(q, ahead + j))
            if len(own):
                _return_own_back(width, count, g, q, start, own, m, mean, learn, products, tiles, numbers, marks)
            else:
                tile[:] = 0
            _gather(table, width, offsets, inner, corners, start, count, tile, 0, zero, 0, given, tile)
            # Softmax: the gradient of the logits is q (dq - <q, dq>), with a sum of 0 though q is rounded.
            for i in range(count):
                along, all_ = fill(np.float32(0)), fill(np.float32(0))
                for j in range(i * width, (i + 1) * width, LANES):
                    x = load(shares, j)
                    along, all_ = add(along, mul(x, load(tile, j))), add(all_, x)
                average[i] = total(along) / total(all_)
            for i in range(count):
                mean_ = fill(at(average, i))
                for j in range(i * width, (i + 1) * width, LANES):
                    store(tile, j, mul(load(shares, j), sub(load(tile, j), mean_)))
        if mode != END:
            _scatter(tile, width, offsets, outer, corners, start, count, target)
        if mode != RESUME:
            for j in range(0, count * width, LANES):
                x = load(tile, j)
                if old:
                    x = add(x, load(g, ahead + j))
                if earlier and (old or mode == END):
                    x = add(x, load(sums, ahead + j))
                if mode == END:
                    store(tile, j, x)
                else:
                    store(g, ahead + j, load(tile, j))
                    if old:
                        store(sums, ahead + j, x)
        if mode == END:
            _to_planes(tile, channels, p, width, start, count, planes)
        start += count
    return whole


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
