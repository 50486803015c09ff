"""The compiled loops of the renderer: surfaces under rays, light and shadow rays, smoothing, shading. Each works on
flat arrays of pixels, (n, 3) where it is a vector, and lets go of the interpreter lock."""

import math
from typing import no_type_check

import numpy as np
from numba import njit

from enfilade.data import room_materials as kinds
from enfilade.data.room_materials import EMIT, SHINE, SPECULAR, A, B, C

BOUNCES = 2  # indirect rays for each half-resolution pixel


@njit(cache=True, nogil=True)
@no_type_check
def surface(face, u, v, t, origin, direction, spread, vertices, faces, texture, corner, face_material, materials, point,
             flat, normal, albedo, with_texture):  # fmt: skip
    """Where rays hit: the point, the flat normal and the smooth one, both facing the ray, and the colour."""
    p, q, colour = np.empty(3), np.empty(3), np.empty(3)
    for i in range(len(face)):
        f = face[i]
        if f < 0:
            for k in range(3):
                point[i, k] = origin[i, k] + direction[i, k]
                flat[i, k] = normal[i, k] = albedo[i, k] = 0.0
            continue
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        wu, wv = u[i], v[i]
        ww = 1 - wu - wv
        e = np.empty((4, 3))
        for k in range(3):
            point[i, k] = origin[i, k] + t[i] * direction[i, k]
            e[0, k], e[1, k] = vertices[b, k] - vertices[a, k], vertices[c, k] - vertices[a, k]
            e[2, k], e[3, k] = texture[b, k] - texture[a, k], texture[c, k] - texture[a, k]
            p[k] = ww * texture[a, k] + wu * texture[b, k] + wv * texture[c, k]
            normal[i, k] = ww * corner[f, 0, k] + wu * corner[f, 1, k] + wv * corner[f, 2, k]
        nx, ny, nz = (
            e[0, 1] * e[1, 2] - e[0, 2] * e[1, 1],
            e[0, 2] * e[1, 0] - e[0, 0] * e[1, 2],
            e[0, 0] * e[1, 1] - e[0, 1] * e[1, 0],
        )
        length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-30
        facing = nx * direction[i, 0] + ny * direction[i, 1] + nz * direction[i, 2]
        sign = -1.0 if facing > 0 else 1.0
        flat[i, 0], flat[i, 1], flat[i, 2] = sign * nx / length, sign * ny / length, sign * nz / length
        smooth = math.sqrt(normal[i, 0] ** 2 + normal[i, 1] ** 2 + normal[i, 2] ** 2) + 1e-30
        for k in range(3):
            normal[i, k] *= sign / smooth
        reach = math.sqrt(direction[i, 0] ** 2 + direction[i, 1] ** 2 + direction[i, 2] ** 2)
        row = materials[face_material[f]]
        if with_texture:
            cosine = abs(facing) / (length * reach)
            q[0], q[1], q[2] = (
                e[2, 1] * e[3, 2] - e[2, 2] * e[3, 1],
                e[2, 2] * e[3, 0] - e[2, 0] * e[3, 2],
                e[2, 0] * e[3, 1] - e[2, 1] * e[3, 0],
            )
            footprint = t[i] * reach * spread / max(cosine, 0.25)
            kinds.shade(row, p, q, footprint, direction[i] / reach, colour)
            for k in range(3):
                albedo[i, k] = max(colour[k], 0.0)
        else:
            for k in range(3):
                albedo[i, k] = 0.55 * row[A + k] + 0.35 * row[B + k] + 0.1 * row[C + k]


@njit(cache=True, nogil=True)
@no_type_check
def factor(light, p, n, points):
    """Irradiance from a light of unit power at p with normal n, nothing in between. `points` is 1 or 2 for each side
    of a rectangle."""
    sun = light[13] * n[0] + light[14] * n[1] + light[15] * n[2]
    if light[13] != 0 or light[14] != 0 or light[15] != 0:
        return max(sun, 0.0)
    if light[12] > 0:
        dx, dy, dz = light[0] - p[0], light[1] - p[1], light[2] - p[2]
        d2 = dx * dx + dy * dy + dz * dz
        d = math.sqrt(d2) + 1e-9
        cosine = (dx * n[0] + dy * n[1] + dz * n[2]) / d
        # A shade passes less sideways than through its openings; a ball lights also what is slightly turned away.
        wrap = min(light[12] / d, 0.6)
        return (
            max(cosine + 0.3 * wrap, 0.0)
            / (1 + 0.3 * wrap)
            * (0.35 + 1.3 * (dz / d) ** 2)
            / max(d2, light[12] ** 2)
            * 0.6
        )
    nx = light[4] * light[8] - light[5] * light[7]
    ny = light[5] * light[6] - light[3] * light[8]
    nz = light[3] * light[7] - light[4] * light[6]
    size = math.sqrt(nx * nx + ny * ny + nz * nz)
    total = 0.0
    for i in range(points):
        for j in range(points):
            a = 0.0 if points == 1 else (2 * i - 1) * 0.5774
            b = 0.0 if points == 1 else (2 * j - 1) * 0.5774
            dx = light[0] + a * light[3] + b * light[6] - p[0]
            dy = light[1] + a * light[4] + b * light[7] - p[1]
            dz = light[2] + a * light[5] + b * light[8] - p[2]
            d2 = dx * dx + dy * dy + dz * dz
            here = dx * n[0] + dy * n[1] + dz * n[2]
            there = -(dx * nx + dy * ny + dz * nz) / size
            if here > 0 and there > 0:
                total += here * there / (max(d2, 0.02) * max(d2, 0.02 + size))
    return total / (points * points)


@njit(cache=True, nogil=True)
@no_type_check
def direct(point, normal, lights, points, seen, out):
    """Irradiance (n, 3) from all lights, each weighted by how much of it is seen."""
    for i in range(len(point)):
        r, g, b = 0.0, 0.0, 0.0
        for k in range(len(lights)):
            f = factor(lights[k], point[i], normal[i], points) * seen[i, k]
            r, g, b = r + f * lights[k, 9], g + f * lights[k, 10], b + f * lights[k, 11]
        out[i, 0], out[i, 1], out[i, 2] = r, g, b


@njit(cache=True, nogil=True)
@no_type_check
def shadow_rays(index, width, point, flat, normal, light, offset, origin, direction, far, which):
    """A ray from each of the chosen pixels to its own point of the light, for those that can be lit; returns how
    many. The points follow the R2 sequence over the 4x4 pattern of pixels."""
    count = 0
    is_sun = light[13] != 0 or light[14] != 0 or light[15] != 0
    for i in range(len(index)):
        p = index[i]
        if factor(light, point[p], normal[p], 1 if light[12] > 0 or is_sun else 2) <= 0:
            continue
        x, y = (p % width) >> 1, (p // width) >> 1
        k = ((x & 3) * 5 + (y & 3) * 4 + ((x >> 1) & 1) * 8) % 16 + offset
        a = (0.5 + 0.7548776662466927 * k) % 1.0
        b = (0.5 + 0.5698402909980532 * k) % 1.0
        a, b = 2 * a - 1, 2 * b - 1
        for c in range(3):
            origin[count, c] = point[p, c] + 0.0015 * flat[p, c]
        if is_sun:
            nx = light[4] * light[8] - light[5] * light[7]
            ny = light[5] * light[6] - light[3] * light[8]
            nz = light[3] * light[7] - light[4] * light[6]
            sx, sy, sz = light[13] + 0.008 * a, light[14] + 0.008 * b, light[15] - 0.004 * a
            along = sx * nx + sy * ny + sz * nz
            gap = (light[0] - point[p, 0]) * nx + (light[1] - point[p, 1]) * ny + (light[2] - point[p, 2]) * nz
            t = gap / along if along < -1e-9 else -1.0
            if t <= 0:
                far[count] = -1.0
            else:
                hx, hy, hz = (
                    point[p, 0] + t * sx - light[0],
                    point[p, 1] + t * sy - light[1],
                    point[p, 2] + t * sz - light[2],
                )
                uu = light[3] ** 2 + light[4] ** 2 + light[5] ** 2
                vv = light[6] ** 2 + light[7] ** 2 + light[8] ** 2
                s1 = abs(hx * light[3] + hy * light[4] + hz * light[5]) / uu
                s2 = abs(hx * light[6] + hy * light[7] + hz * light[8]) / vv
                far[count] = t if s1 < 1 and s2 < 1 else -1.0
            direction[count, 0], direction[count, 1], direction[count, 2] = sx, sy, sz
        else:
            radius = light[12]
            if radius > 0:
                dx, dy = light[0] - point[p, 0], light[1] - point[p, 1]
                side = math.sqrt(dx * dx + dy * dy) + 1e-9
                shift = 0.5 * radius * a
                direction[count, 0] = dx - dy / side * shift
                direction[count, 1] = dy + dx / side * shift
                direction[count, 2] = light[2] - point[p, 2] + 0.5 * radius * b
            else:
                for c in range(3):
                    direction[count, c] = light[c] + a * light[3 + c] + b * light[6 + c] - point[p, c]
            length = math.sqrt(direction[count, 0] ** 2 + direction[count, 1] ** 2 + direction[count, 2] ** 2) + 1e-9
            far[count] = max(1 - radius / length, 0.0) if radius > 0 else 0.999
        which[count] = i
        count += 1
    return count


@njit(cache=True, nogil=True)
@no_type_check
def bounce_rays(index, width, flat, normal, point, offset, origin, direction):
    """A cosine-weighted direction for each chosen pixel."""
    for i in range(len(index)):
        p = index[i]
        x, y = (p % width) >> 1, (p // width) >> 1
        k = ((x & 3) * 5 + (y & 3) * 4 + ((x >> 1) & 1) * 8) % 16 * BOUNCES + offset
        a = (0.5 + 0.7548776662466927 * k) % 1.0
        b = 2 * math.pi * ((0.5 + 0.5698402909980532 * k) % 1.0)
        r, up = math.sqrt(a), math.sqrt(1 - a)
        nx, ny, nz = normal[p, 0], normal[p, 1], normal[p, 2]
        # An orthonormal frame without branches on the direction (Duff et al. 2017).
        sign = 1.0 if nz >= 0 else -1.0
        q = -1.0 / (sign + nz)
        w = nx * ny * q
        cx, cy = r * math.cos(b), r * math.sin(b)
        dx = cx * (1 + sign * nx * nx * q) + cy * w + up * nx
        dy = cx * sign * w + cy * (sign + ny * ny * q) + up * ny
        dz = -cx * sign * nx - cy * ny + up * nz
        below = dx * flat[p, 0] + dy * flat[p, 1] + dz * flat[p, 2]
        if below < 0.02:  # the smooth normal leans over the flat one
            dx, dy, dz = (
                dx + (0.04 - below) * flat[p, 0],
                dy + (0.04 - below) * flat[p, 1],
                dz + (0.04 - below) * flat[p, 2],
            )
        direction[i, 0], direction[i, 1], direction[i, 2] = dx, dy, dz
        for c in range(3):
            origin[i, c] = point[p, c] + 0.0015 * flat[p, c]


@njit(cache=True, nogil=True)
@no_type_check
def smooth(source, step, width, height, rows, point, normal, target):
    """5x5 mean over half-resolution neighbours on the same surface, `step` apart. `point` and `normal` are those of
    the full image."""
    half, channels = (width + 1) // 2, source.shape[2]
    tall = (height + 1) // 2
    total = np.empty(channels, np.float32)
    for y in range(rows[0], rows[1]):
        for x in range(half):
            p = 2 * y * width + 2 * x
            nx, ny, nz = normal[p, 0], normal[p, 1], normal[p, 2]
            px, py, pz = point[p, 0], point[p, 1], point[p, 2]
            total[:] = 0
            weights = 0.0
            for dy in range(-2, 3):
                yy = y + dy * step
                if yy < 0 or yy >= tall:
                    continue
                for dx in range(-2, 3):
                    xx = x + dx * step
                    if xx < 0 or xx >= half:
                        continue
                    q = 2 * yy * width + 2 * xx
                    cosine = nx * normal[q, 0] + ny * normal[q, 1] + nz * normal[q, 2]
                    if cosine < 0.7:
                        continue
                    rx, ry, rz = point[q, 0] - px, point[q, 1] - py, point[q, 2] - pz
                    off = abs(nx * rx + ny * ry + nz * rz)
                    far = rx * rx + ry * ry + rz * rz
                    # Half weight on the rim: the window then covers each point of the 4x4 pattern equally.
                    w = max(0.0, 1 - off * 30) * cosine * cosine / (1 + far)
                    w *= (0.5 if abs(dx) == 2 else 1.0) * (0.5 if abs(dy) == 2 else 1.0)
                    weights += w
                    for c in range(channels):
                        total[c] += w * source[yy, xx, c]
            for c in range(channels):
                target[y, x, c] = total[c] / weights if weights > 0 else source[y, x, c]


@njit(cache=True, nogil=True)
@no_type_check
def upsample(source, width, height, rows, point, normal, target, lonely):
    """Half-resolution values at every pixel: bilinear among those on its own surface; else the best one nearby; else
    the pixel is marked as lonely."""
    half, channels = (width + 1) // 2, source.shape[2]
    tall = (height + 1) // 2
    for y in range(rows[0], rows[1]):
        for x in range(width):
            p = y * width + x
            if x % 2 == 0 and y % 2 == 0:
                for c in range(channels):
                    target[p, c] = source[y // 2, x // 2, c]
                continue
            nx, ny, nz = normal[p, 0], normal[p, 1], normal[p, 2]
            weights = 0.0
            for c in range(channels):
                target[p, c] = 0
            for reach in range(2):
                for dy in range(-reach, 2 + reach):
                    for dx in range(-reach, 2 + reach):
                        yy, xx = y // 2 + dy, x // 2 + dx
                        if yy < 0 or xx < 0 or yy >= tall or xx >= half:
                            continue
                        q = 2 * yy * width + 2 * xx
                        cosine = nx * normal[q, 0] + ny * normal[q, 1] + nz * normal[q, 2]
                        if cosine < 0.75:
                            continue
                        rx, ry, rz = point[q, 0] - point[p, 0], point[q, 1] - point[p, 1], point[q, 2] - point[p, 2]
                        off = abs(nx * rx + ny * ry + nz * rz)
                        ax, ay = abs(2 * xx - x), abs(2 * yy - y)
                        w = max(0.0, 1 - off * 30) * cosine / (1 + 6 * (rx * rx + ry * ry + rz * rz))
                        w *= max(2.0 - ax, 0.0) * max(2.0 - ay, 0.0) if reach == 0 else 1.0 / (1 + ax + ay)
                        weights += w
                        for c in range(channels):
                            target[p, c] += w * source[yy, xx, c]
                if weights > 0.02:
                    break
            if weights > 0.02:
                for c in range(channels):
                    target[p, c] /= weights
            else:
                lonely[p] = True


@njit(cache=True, nogil=True)
@no_type_check
def compose(rows, view, point, normal, albedo, material, materials, lights, seen, indirect, out, light_out, gloss):
    """Outgoing radiance of each pixel; also the light it received and its highlights, for its
    neighbours' finer samples."""
    for i in range(rows[0], rows[1]):
        row = materials[material[i]]
        r, g, b = indirect[i, 0], indirect[i, 1], indirect[i, 2]
        sr, sg, sb = 0.0, 0.0, 0.0
        vx, vy, vz = view[0] - point[i, 0], view[1] - point[i, 1], view[2] - point[i, 2]
        length = math.sqrt(vx * vx + vy * vy + vz * vz) + 1e-9
        vx, vy, vz = vx / length, vy / length, vz / length
        for k in range(len(lights)):
            light = lights[k]
            f = factor(light, point[i], normal[i], 2) * seen[i, k]
            if f <= 0:
                continue
            r, g, b = r + f * light[9], g + f * light[10], b + f * light[11]
            if row[SPECULAR] > 0:
                if light[13] != 0 or light[14] != 0:
                    hx, hy, hz = light[13] + vx, light[14] + vy, light[15] + vz
                else:
                    dx, dy, dz = light[0] - point[i, 0], light[1] - point[i, 1], light[2] - point[i, 2]
                    d = math.sqrt(dx * dx + dy * dy + dz * dz) + 1e-9
                    hx, hy, hz = dx / d + vx, dy / d + vy, dz / d + vz
                h = math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9
                cosine = (hx * normal[i, 0] + hy * normal[i, 1] + hz * normal[i, 2]) / h
                if cosine > 0:
                    s = f * row[SPECULAR] * 0.03 * (row[SHINE] + 8) * cosine ** row[SHINE]
                    sr, sg, sb = sr + s * light[9], sg + s * light[10], sb + s * light[11]
        light_out[i, 0], light_out[i, 1], light_out[i, 2] = r, g, b
        emit = row[EMIT]
        gloss[i, 0], gloss[i, 1], gloss[i, 2] = sr * 0.3183, sg * 0.3183, sb * 0.3183
        out[i, 0] = albedo[i, 0] * (r * 0.3183 + emit) + sr * 0.3183
        out[i, 1] = albedo[i, 1] * (g * 0.3183 + emit) + sg * 0.3183
        out[i, 2] = albedo[i, 2] * (b * 0.3183 + emit) + sb * 0.3183


@njit(cache=True, nogil=True)
@no_type_check
def edges(width, height, face_object, material, normal, point, mark):
    """Pixels whose right or lower neighbour is another object, material, orientation or plane, and those neighbours."""
    for y in range(height):
        for x in range(width):
            p = y * width + x
            for step in (1, width):
                if (step == 1 and x + 1 == width) or (step == width and y + 1 == height):
                    continue
                q = p + step
                cosine = normal[p, 0] * normal[q, 0] + normal[p, 1] * normal[q, 1] + normal[p, 2] * normal[q, 2]
                rx, ry, rz = point[q, 0] - point[p, 0], point[q, 1] - point[p, 1], point[q, 2] - point[p, 2]
                off = abs(rx * normal[p, 0] + ry * normal[p, 1] + rz * normal[p, 2])
                if face_object[p] != face_object[q] or material[p] != material[q] or cosine < 0.85 or off > 0.03:
                    mark[p] = mark[q] = True


@njit(cache=True, nogil=True)
@no_type_check
def lend(
    pixel,
    width,
    height,
    point,
    normal,
    albedo,
    material,
    materials,
    at_point,
    at_normal,
    light,
    colour,
    centre,
    gloss,
    out,
):
    """Colour of finer samples: their own surface under the light of the best matching pixel around theirs."""
    for i in range(len(pixel)):
        p = pixel[i]
        x0, y0 = p % width, p // width
        best, chosen = -1.0, p
        for dy in range(-1, 2):
            for dx in range(-1, 2):
                x, y = x0 + dx, y0 + dy
                if x < 0 or y < 0 or x >= width or y >= height:
                    continue
                q = y * width + x
                cosine = (
                    normal[i, 0] * at_normal[q, 0] + normal[i, 1] * at_normal[q, 1] + normal[i, 2] * at_normal[q, 2]
                )
                rx, ry, rz = at_point[q, 0] - point[i, 0], at_point[q, 1] - point[i, 1], at_point[q, 2] - point[i, 2]
                off = abs(rx * normal[i, 0] + ry * normal[i, 1] + rz * normal[i, 2])
                score = (
                    cosine - 20 * off - 2 * (rx * rx + ry * ry + rz * rz) + (0.2 if centre[q] == material[i] else 0.0)
                )
                if score > best:
                    best, chosen = score, q
        row = materials[material[i]]
        for c in range(3):
            extra = gloss[chosen, c] if centre[chosen] == material[i] else 0.0
            out[i, c] = albedo[i, c] * (light[chosen, c] * 0.3183 + row[EMIT]) + extra
