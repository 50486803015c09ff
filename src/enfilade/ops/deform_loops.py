"""The compiled loops of `ops.deform` for float32 on CPUs: samples, products and their adjoints, some points at a time.

Volumes are rows of channels, padded to pairs of vectors (`ops.vectors`), in a border of one empty voxel, so that no
corner of a cell has to be asked whether it is inside. `g` is a `deform.Geometry`; `start` and `stop` are a thread's
share.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from enfilade.ops.vectors import LANES, add, at, fill, load, madd, mul, store, sub, total

_TILE = 32  # points whose taps are all sampled before the next: few, so that rows stay in the first-level cache
_BLOCK = 256  # points whose offsets are fetched into the second-level cache at a time: long pieces of each channel
PAIR = 2 * LANES  # rows are padded to it: two vectors by four rows of sums keep the arithmetic busy


@njit(cache=True, nogil=True)
@no_type_check
def fill_rows(values, first, count, rows, start, stop):
    """Lines of voxels along z, start..stop of all."""
    _, nx, ny, nz, _ = rows.shape
    nx, ny, nz = nx - 2, ny - 2, nz - 2
    for line in range(start, stop):
        image, x, y = line // (nx * ny), line // ny % nx, line % ny
        target = rows[image, x + 1, y + 1]
        source = values[image, :, (x * ny + y) * nz : (x * ny + y + 1) * nz]
        for z in range(nz):
            for c in range(count):
                target[z + 1, c] = source[first + c, z]


@njit(cache=True, nogil=True)
@no_type_check
def add_rows(rows, image, values, first, count, start, stop):
    """Adds a part's planes of voxels, start..stop from that of its first image on, without the border."""
    _, nx, ny, nz, _ = rows.shape
    for plane in range(start, stop):
        part, x = plane // nx, plane % nx - 1
        if 0 <= x < nx - 2:
            for y in range(ny - 2):
                source, z0 = rows[part, x + 1, y + 1], (x * (ny - 2) + y) * (nz - 2)
                target = values[image + part, :, z0 : z0 + nz - 2]
                for c in range(count):
                    for z in range(nz - 2):
                        target[first + c, z] += source[z + 1, c]


@njit(cache=True, nogil=True)
@no_type_check
def _fetch(offsets, first, start, count, steps):
    """Some points' offsets, which lie far apart in memory."""
    for channel in range(len(steps)):
        line, target = offsets[first + channel, start : start + count], steps[channel]
        for i in range(count):
            target[i] = line[i]


@njit(cache=True, nogil=True)
@no_type_check
def _centres(g, start, count, centres):
    """Where the tap 0, 0, 0 of some points samples without offset."""
    for i in range(count):
        rest, z = divmod(start + i, g.out[2])
        x, y = divmod(rest, g.out[1])
        centres[0, i] = x * g.stride[0] - g.padding[0]
        centres[1, i] = y * g.stride[1] - g.padding[1]
        centres[2, i] = z * g.stride[2] - g.padding[2]


@njit(cache=True, nogil=True)
@no_type_check
def _locate(g, centres, tap, steps, start, count, cells, fractions, inside):
    """The first row of the cell that each point's tap falls into, how far it lies in it along each axis, and where a
    step moves it within the volume. NaN falls anywhere inside, but is NaN in the cell."""
    rest, z = divmod(tap, g.kernel[2])
    x, y = divmod(rest, g.kernel[1])
    shift = x * g.dilation[0], y * g.dilation[1], z * g.dilation[2]
    cells[:] = 0
    for axis in range(3):
        step, size, one = np.float32(shift[axis]), np.float32(g.size[axis]), np.float32(1)
        length = np.int32(g.size[axis] + 2)
        # As lines, which LLVM makes vectors of.
        centre, move = centres[axis], steps[3 * tap + axis, start : start + count]
        fraction, within = fractions[axis], inside[axis]
        for i in range(count):
            place = centre[i] + step + move[i]
            kept = place if place > -one else -one
            kept = kept if kept < size else size
            cell = np.floor(kept)
            cell = cell if cell < size else size - one
            fraction[i] = kept - cell if place == place else place
            within[i] = np.float32(0) if place < -one or place >= size else one
            cells[i] = np.int32(cells[i] * length) + np.int32(cell) + np.int32(1)


@njit(cache=True, nogil=True)
@no_type_check
def _between(a, b, fraction):
    return madd(a, fraction, sub(b, a))


@njit(cache=True, nogil=True)
@no_type_check
def _sample(rows, width, step_x, step_y, cells, fractions, count, samples):
    """`rows` and `samples` are flat."""
    along_x, along_y, along_z = fractions[0], fractions[1], fractions[2]
    for pair in range(0, width, PAIR):
        for i in range(count):
            fx, fy, fz = at(along_x, i), at(along_y, i), at(along_z, i)
            row, sample = np.int64(at(cells, i)) * width + pair, i * width + pair
            for j in range(0, PAIR, LANES):  # of known length, so that it becomes straight code
                p = row + j
                low = _between(load(rows, p), load(rows, p + width), fz)
                p += step_y
                high = _between(load(rows, p), load(rows, p + width), fz)
                near = _between(low, high, fy)
                p += step_x
                high = _between(load(rows, p), load(rows, p + width), fz)
                p -= step_y
                low = _between(load(rows, p), load(rows, p + width), fz)
                store(samples, sample + j, _between(near, _between(low, high, fy), fx))


@njit(cache=True, nogil=True)
@no_type_check
def _sample_back(rows, width, step_x, step_y, cells, fractions, gradient, count, samples, moves):
    """The samples again, and what a step along each axis changes in their products with their gradient."""
    along_x, along_y, along_z = fractions[0], fractions[1], fractions[2]
    moves[:] = 0
    to_x, to_y, to_z = moves[0], moves[1], moves[2]
    for pair in range(0, width, PAIR):
        for i in range(count):
            fx, fy, fz = at(along_x, i), at(along_y, i), at(along_z, i)
            row, sample = np.int64(at(cells, i)) * width + pair, i * width + pair
            x, y, z = fill(np.float32(0)), fill(np.float32(0)), fill(np.float32(0))
            for j in range(0, PAIR, LANES):
                p = row + j
                a0, a2 = load(rows, p), load(rows, p + step_y)
                a1, a3 = sub(load(rows, p + width), a0), sub(load(rows, p + step_y + width), a2)
                a = madd(a0, fz, a1)
                a_y = sub(madd(a2, fz, a3), a)
                a, a_z = madd(a, fy, a_y), _between(a1, a3, fy)
                p += step_x
                b0, b2 = load(rows, p), load(rows, p + step_y)
                b1, b3 = sub(load(rows, p + width), b0), sub(load(rows, p + step_y + width), b2)
                b = madd(b0, fz, b1)
                b_y = sub(madd(b2, fz, b3), b)
                b, b_z = madd(b, fy, b_y), _between(b1, b3, fy)
                step, given = sub(b, a), load(gradient, sample + j)
                store(samples, sample + j, madd(a, fx, step))
                x = add(x, mul(given, step))
                y = add(y, mul(given, _between(a_y, b_y, fx)))
                z = add(z, mul(given, _between(a_z, b_z, fx)))
            to_x[i], to_y[i], to_z[i] = to_x[i] + total(x), to_y[i] + total(y), to_z[i] + total(z)


@njit(cache=True, nogil=True)
@no_type_check
def _scatter(rows, width, step_x, step_y, cells, fractions, gradient, count):
    """The adjoint of `_sample`."""
    along_x, along_y, along_z, one = fractions[0], fractions[1], fractions[2], np.float32(1)
    for pair in range(0, width, PAIR):
        for i in range(count):
            fx, fy, fz = at(along_x, i), at(along_y, i), at(along_z, i)
            w0, w1, w2, w3 = (one - fx) * (one - fy), (one - fx) * fy, fx * fy, fx * (one - fy)
            row, sample = np.int64(at(cells, i)) * width + pair, i * width + pair
            for j in range(0, PAIR, LANES):
                given, p = load(gradient, sample + j), row + j
                store(rows, p, madd(load(rows, p), w0 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w0 * fz, given))
                p += step_y
                store(rows, p, madd(load(rows, p), w1 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w1 * fz, given))
                p += step_x
                store(rows, p, madd(load(rows, p), w2 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w2 * fz, given))
                p -= step_y
                store(rows, p, madd(load(rows, p), w3 * (one - fz), given))
                store(rows, p + width, madd(load(rows, p + width), w3 * fz, given))


@njit(cache=True, nogil=True)
@no_type_check
def _multiply(a, step_i, step_k, count, depth, b, first_b, width, out, first_out):
    """out[i] += sum of a[i * step_i + k * step_k] b[k] over k < depth, for i < count rounded up to fours and rows of
    `width`, a number of pairs of vectors. All are flat; those of b and out start at first_b and first_out."""
    for i in range(0, count, 4):
        for j in range(0, width, PAIR):
            p, q, o = i * step_i, first_b + j, first_out + i * width + j
            s00, s01 = load(out, o), load(out, o + LANES)
            s10, s11 = load(out, o + width), load(out, o + width + LANES)
            s20, s21 = load(out, o + 2 * width), load(out, o + 2 * width + LANES)
            s30, s31 = load(out, o + 3 * width), load(out, o + 3 * width + LANES)
            for _ in range(depth):
                b0, b1 = load(b, q), load(b, q + LANES)
                a0, a1 = at(a, p), at(a, p + step_i)
                a2, a3 = at(a, p + 2 * step_i), at(a, p + 3 * step_i)
                s00, s01 = madd(s00, a0, b0), madd(s01, a0, b1)
                s10, s11 = madd(s10, a1, b0), madd(s11, a1, b1)
                s20, s21 = madd(s20, a2, b0), madd(s21, a2, b1)
                s30, s31 = madd(s30, a3, b0), madd(s31, a3, b1)
                p += step_k
                q += width
            store(out, o, s00)
            store(out, o + LANES, s01)
            store(out, o + width, s10)
            store(out, o + width + LANES, s11)
            store(out, o + 2 * width, s20)
            store(out, o + 2 * width + LANES, s21)
            store(out, o + 3 * width, s30)
            store(out, o + 3 * width + LANES, s31)


@njit(cache=True, nogil=True)
@no_type_check
def forward(rows, offsets, offset_group, matrices, g, target, first, last, start, stop):
    """Adds to outputs first..last of points start..stop, counted through all images."""
    n, width, (taps, channels, outputs) = target.shape[2], rows.shape[4], matrices.shape
    step_y, step_x = rows.shape[3] * width, rows.shape[2] * rows.shape[3] * width
    centres, cells, steps = (
        np.empty((3, _TILE), np.float32),
        np.empty(_TILE, np.int32),
        np.empty((3 * taps, _BLOCK), np.float32),
    )
    cells, fractions, inside = np.empty(_TILE, np.int32), np.empty_like(centres), np.empty_like(centres)
    samples, sums = np.zeros(_TILE * width, np.float32), np.empty(_TILE * outputs, np.float32)
    matrices = matrices.reshape(-1)
    while start < stop:
        image = start // n
        point = start - image * n
        block = min(_BLOCK, stop - start, n - point)
        volume = rows[image].reshape(-1)
        _fetch(offsets[image], 3 * taps * offset_group, point, block, steps)
        for tile in range(0, block, _TILE):
            count = min(_TILE, block - tile)
            _centres(g, point + tile, count, centres)
            sums[:] = 0
            for tap in range(taps):
                _locate(g, centres, tap, steps, tile, count, cells, fractions, inside)
                _sample(volume, width, step_x, step_y, cells, fractions, count, samples)
                _multiply(samples, width, 1, count, channels, matrices, tap * channels * outputs, outputs, sums, 0)
            for o in range(first, last):
                line = target[image, o, point + tile : point + tile + count]
                for i in range(count):
                    line[i] += sums[i * outputs + o - first]
        start += block


@njit(cache=True, nogil=True)
@no_type_check
def backward(
    rows, offsets, offset_group, matrices, g, given, first, channels, to_offsets, to_rows, to_matrices, start, stop
):
    """Adds to the three gradients, where they have any elements, what points start..stop give. Returns the planes of
    `to_rows` that it touched, counted through its images."""
    n, width, (taps, outputs, _), planes = given.shape[2], rows.shape[4], matrices.shape, rows.shape[1]
    step_y, step_x = rows.shape[3] * width, rows.shape[2] * rows.shape[3] * width
    padded, first_image, group = -(-outputs // PAIR) * PAIR, start // n, 3 * taps * offset_group
    centres, cells, steps = (
        np.empty((3, _TILE), np.float32),
        np.empty(_TILE, np.int32),
        np.empty((3 * taps, _BLOCK), np.float32),
    )
    cells, fractions, inside = np.empty(_TILE, np.int32), np.empty_like(centres), np.empty_like(centres)
    samples, moves = np.zeros(_TILE * width, np.float32), np.empty((3, _TILE), np.float32)
    gradient, to_samples = np.zeros(_TILE * padded, np.float32), np.empty(_TILE * width, np.float32)
    low, high = planes * len(to_rows), 0
    matrices, to_rows, to_matrices = matrices.reshape(-1), to_rows.reshape(-1), to_matrices.reshape(-1)
    while start < stop:
        image = start // n
        point = start - image * n
        block = min(_BLOCK, stop - start, n - point)
        volume = rows[image].reshape(-1)
        to_volume = to_rows[(image - first_image) * volume.size : (image - first_image + 1) * volume.size]
        _fetch(offsets[image], group, point, block, steps)
        lowest, highest = np.int32(2**31 - 1), np.int32(0)
        for tile in range(0, block, _TILE):
            count = min(_TILE, block - tile)
            _centres(g, point + tile, count, centres)
            for o in range(outputs):
                line = given[image, first + o, point + tile : point + tile + count]
                for i in range(count):
                    gradient[i * padded + o] = line[i]
            for tap in range(taps):
                _locate(g, centres, tap, steps, tile, count, cells, fractions, inside)
                to_samples[:] = 0
                _multiply(gradient, padded, 1, count, outputs, matrices, tap * outputs * width, width, to_samples, 0)
                if to_offsets.size:
                    _sample_back(volume, width, step_x, step_y, cells, fractions, to_samples, count, samples, moves)
                    for axis in range(3):  # in the place of the steps, which are done with
                        line, move, within = steps[3 * tap + axis, tile : tile + count], moves[axis], inside[axis]
                        for i in range(count):
                            line[i] = within[i] * move[i]
                elif to_matrices.size:
                    _sample(volume, width, step_x, step_y, cells, fractions, count, samples)
                if to_matrices.size:
                    at_tap = tap * width * padded
                    _multiply(samples, 1, width, channels, count, gradient, 0, padded, to_matrices, at_tap)
                if to_rows.size:
                    _scatter(to_volume, width, step_x, step_y, cells, fractions, to_samples, count)
                    for i in range(count):
                        lowest, highest = min(lowest, cells[i]), max(highest, cells[i])
        if to_offsets.size:
            for channel in range(3 * taps):
                line, part = to_offsets[image, group + channel, point : point + block], steps[channel]
                for i in range(block):
                    line[i] += part[i]
        if to_rows.size:
            plane, size = (image - first_image) * planes, rows.shape[2] * rows.shape[3]
            low, high = min(low, plane + lowest // size), max(high, plane + highest // size + 2)
        start += block
    return low, high
