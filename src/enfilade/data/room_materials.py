"""Procedural materials of the rooms: a table of parameters, and one compiled function that colours a point by it.

Patterns are evaluated in each part's own metres. Detail finer than the pixel's footprint fades into its mean, as
mipmaps do, so that nothing glitters far away.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit

PLAIN, WOOD, TILES, CARPET, WEAVE, PLASTER, STRIPES, MARBLE, CHECKER, PLANKS = range(10)
PICTURE, TEXT, GRANITE, SCREEN, RUG, DOTS, FLORAL, PLAID, SKY, SPINE, SHADE, BRICK = range(10, 22)
# Columns of the table.
KIND, A, B, C, SCALE, SPECULAR, SHINE, REFLECT, EMIT, SEED, P0, P1, COLUMNS = (
    0,
    1,
    4,
    7,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
)


def linear(colour) -> np.ndarray:
    """sRGB 0..1 to linear light."""
    return np.clip(np.asarray(colour, float), 0, 1) ** 2.2


def hsv(h, s, v) -> np.ndarray:
    """sRGB of a hue (turns), saturation and value."""
    k = (np.array([5.0, 3.0, 1.0]) + h * 6) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


class Materials:
    """The rows of a room's material table, and the random choices of its style."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.rows: list[np.ndarray] = []
        self.woods = [self.wood_colours() for _ in range(3)]
        self.metal = self.add(PLAIN, self.grey(0.5, 0.75), specular=0.6, shine=60, reflect=0.14)
        self.dark = self.add(PLAIN, self.grey(0.04, 0.14), specular=0.25, shine=40)
        self.white = self.add(PLAIN, self.grey(0.85, 0.95), specular=0.15, shine=30)
        self.chrome = self.add(PLAIN, (0.75, 0.76, 0.78), specular=0.9, shine=120, reflect=0.55)
        self.ceramic = self.add(PLAIN, (0.93, 0.93, 0.92), specular=0.5, shine=90, reflect=0.06)
        self.glass = self.add(PLAIN, (0.55, 0.62, 0.6), specular=0.7, shine=120, reflect=0.15)
        self.brass = self.add(PLAIN, (0.72, 0.58, 0.3), specular=0.7, shine=50, reflect=0.2)

    @property
    def table(self) -> np.ndarray:
        return np.stack(self.rows).astype(np.float32)

    def add(self, kind, a, b=None, c=None, *, scale=1.0, specular=0.0, shine=20.0, reflect=0.0, emit=0.0, p0=0.0,
            p1=0.0) -> int:  # fmt: skip
        """A new material; colours are sRGB, and None repeats the one before."""
        b = a if b is None else b
        c = b if c is None else c
        seed = float(self.rng.integers(1, 30000))
        row = [kind, *linear(a), *linear(b), *linear(c), scale, specular, shine, reflect, emit, seed, p0, p1]
        self.rows.append(np.array(row))
        return len(self.rows) - 1

    def uniform(self, low, high) -> float:
        return float(self.rng.uniform(low, high))

    def grey(self, low=0.1, high=0.9) -> np.ndarray:
        return np.clip(self.uniform(low, high) + self.rng.normal(0, 0.012, 3), 0, 1)

    def colour(self, saturation=(0.15, 0.65), value=(0.3, 0.85)) -> np.ndarray:
        """A household colour: warm hues and blues are commoner than greens and violets."""
        hue = self.rng.choice(
            [0.04, 0.09, 0.12, 0.58, 0.62, 0.98, 0.33, 0.8], p=[0.2, 0.2, 0.12, 0.16, 0.1, 0.1, 0.08, 0.04]
        )
        return hsv((hue + self.rng.normal(0, 0.03)) % 1, self.uniform(*saturation), self.uniform(*value))

    def muted(self, value=(0.3, 0.85)) -> np.ndarray:
        """A colour for large surfaces: greys and beiges, now and then a weak blue or green."""
        warm = self.rng.random() < 0.75
        hue = self.uniform(0.05, 0.14) if warm else self.rng.choice([0.33, 0.5, 0.58, 0.62, 0.95])
        return hsv(hue, self.uniform(0.02, 0.38) if warm else self.uniform(0.03, 0.28), self.uniform(*value))

    def wood_colours(self):
        hue, saturation = self.uniform(0.05, 0.1), self.uniform(0.25, 0.65)
        value = self.uniform(0.18, 0.82)
        if self.rng.random() < 0.12:
            saturation, value = 0.06, self.uniform(0.8, 0.95)  # painted white
        dark = hsv(hue - 0.01, min(saturation * 1.15, 1), value * self.uniform(0.6, 0.85))
        return hsv(hue, saturation, value), dark

    def wood(self, which=None) -> int:
        """One of the room's woods (0..2), or any."""
        a, b = self.woods[which] if which is not None else self.wood_colours()
        lacquer = self.uniform(0, 1)
        return self.add(
            WOOD, a, b, scale=self.uniform(0.7, 1.6), specular=0.14 * lacquer, shine=30, reflect=0.02 * lacquer
        )

    def paint(self, value=(0.2, 0.9), gloss=0.2) -> int:
        colour = self.colour(value=value) if self.rng.random() < 0.6 else self.grey(*value)
        return self.add(PLAIN, colour, specular=gloss, shine=35)

    def fabric(self, value=(0.2, 0.85), plain=0.45) -> int:
        """Upholstery or bedding: plain weave, stripes, plaid, flowers, dots or checks."""
        a = self.colour((0.05, 0.6), value)
        if self.rng.random() < plain:
            return self.add(WEAVE, a, a * self.uniform(0.65, 0.9), scale=self.uniform(0.8, 1.5))
        b = self.colour((0.05, 0.6), (0.25, 0.95))
        c = self.colour((0.1, 0.8), (0.1, 0.9))
        kind = self.rng.choice([STRIPES, PLAID, FLORAL, DOTS, CHECKER, RUG])
        scale = {STRIPES: 12.0, PLAID: 6.0, FLORAL: 7.0, DOTS: 9.0, CHECKER: 8.0, RUG: 4.0}[int(kind)]
        return self.add(kind, a, b, c, scale=scale * self.uniform(0.6, 1.5), p0=1.0, p1=1.0)

    def screen(self) -> int:
        a, b = self.colour((0.3, 0.9), (0.3, 0.9)), self.colour((0.2, 0.9), (0.1, 0.6))
        return self.add(SCREEN, a, b, (0.95, 0.95, 0.95), emit=self.uniform(0.5, 1.1), reflect=0.05)

    def picture(self) -> int:
        a, b, c = (self.colour((0.1, 0.8), (0.15, 0.95)) for _ in range(3))
        return self.add(PICTURE, a, b, c, p0=float(self.rng.integers(0, 4)))


@njit(cache=True, nogil=True, inline="never")
@no_type_check
def _hash(i, j, k, seed):
    h = (i * 374761393 + j * 668265263 + k * 2147483647 + seed * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 2246822519) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFFFF) / 16777216.0


@njit(cache=True, nogil=True)
@no_type_check
def noise(x, y, z, seed):
    """Value noise in 0..1 with one bump per unit."""
    fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
    i, j, k = int(fx), int(fy), int(fz)
    x, y, z = x - fx, y - fy, z - fz
    x, y, z = x * x * (3 - 2 * x), y * y * (3 - 2 * y), z * z * (3 - 2 * z)
    a = _hash(i, j, k, seed) * (1 - x) + _hash(i + 1, j, k, seed) * x
    b = _hash(i, j + 1, k, seed) * (1 - x) + _hash(i + 1, j + 1, k, seed) * x
    c = _hash(i, j, k + 1, seed) * (1 - x) + _hash(i + 1, j, k + 1, seed) * x
    d = _hash(i, j + 1, k + 1, seed) * (1 - x) + _hash(i + 1, j + 1, k + 1, seed) * x
    return (a * (1 - y) + b * y) * (1 - z) + (c * (1 - y) + d * y) * z


@njit(cache=True, nogil=True)
@no_type_check
def _fade(frequency, footprint):
    """How much of a detail of `frequency` per metre is left in a pixel that covers `footprint` metres."""
    return min(max(1.5 - 2.0 * frequency * footprint, 0.0), 1.0)


@njit(cache=True, nogil=True)
@no_type_check
def fbm(x, y, z, frequency, seed, footprint):
    """Three octaves of noise around 0.5."""
    total, gain = 0.0, 0.5
    for octave in range(3):
        keep = _fade(frequency, footprint)
        if keep > 0:
            value = noise(x * frequency, y * frequency, z * frequency, seed + octave)
            total += gain * keep * (value - 0.5)
        frequency *= 2.1
        gain *= 0.5
    return 0.5 + total


@njit(cache=True, nogil=True)
@no_type_check
def _line(distance, width, footprint):
    """Coverage of a line of half-width `width` at `distance`, blurred by the pixel."""
    blur = max(footprint, 1e-5)
    return min(max((width - distance) / blur + 0.5, 0.0), 1.0) * min(1.0, (2 * width + blur * 0.2) / blur)


@njit(cache=True, nogil=True)
@no_type_check
def _band(t, footprint):
    """A square wave of period 1 as 0..1, blurred by the pixel (footprint in periods)."""
    t = t - math.floor(t)
    d = 0.25 - abs(t - 0.5)
    wave = min(max(d / max(footprint, 1e-4) + 0.5, 0.0), 1.0)
    keep = min(max(1.5 - 2 * footprint, 0.0), 1.0)
    return 0.5 + (wave - 0.5) * keep


@njit(cache=True, nogil=True)
@no_type_check
def _outdoors(dx, dy, dz, seed):
    """Mix weights of sky (a) and trees (b) and a brightness, for a view direction."""
    azimuth, rise = math.atan2(dy, dx) * 4, dz * 6
    trees = fbm(azimuth, rise * 0.3, 0.0, 1.0, seed, 0.0) * 1.2 - 0.35
    edge = min(max((rise - trees) * 3 + 0.5, 0.0), 1.0)
    leaves = 0.5 + 0.8 * (fbm(azimuth * 4, rise * 4, 1.0, 1.0, seed + 5, 0.0) - 0.5)
    bright = edge * (1.0 + 0.2 * fbm(azimuth, rise, 3.0, 0.6, seed + 9, 0.0)) + (1 - edge) * leaves * 0.6
    return edge, bright


@njit(cache=True, nogil=True)
@no_type_check
def shade(row, p, n, footprint, d, out):
    """Colour of the material `row` at the texture point `p` with texture-space normal `n`, in a pixel covering
    `footprint` metres and seen along the world direction `d`; written to `out` as linear RGB."""
    kind, seed, scale = int(row[KIND]), int(row[SEED]), row[SCALE]
    x, y, z = p[0], p[1], p[2]
    ax, ay, az = abs(n[0]), abs(n[1]), abs(n[2])
    if az >= ax and az >= ay:
        s, t = x, y
    elif ay >= ax:
        s, t = x, z
    else:
        s, t = y, z
    wa, wb, wc, gain = 1.0, 0.0, 0.0, 1.0
    if kind == PLAIN:
        gain = 0.96 + 0.08 * fbm(x, y, z, 6.0, seed, footprint)
    elif kind == WOOD:
        # Long streaks along x; their lines bend slowly and stand closer than the part is wide.
        warp = fbm(x * 0.12, y, z, 5.0 * scale, seed, footprint)
        ring = math.sin(2 * math.pi * (warp * 6.0 + (y + z) * 17.0 * scale)) * _fade(22 * scale, footprint)
        fibre = (noise(x * 6, y * 240, z * 240, seed + 3) - 0.5) * _fade(240.0, footprint)
        broad = noise(x * 1.5, y * 14, z * 14, seed + 6) - 0.5
        wb = min(max(0.4 + 0.05 * ring + 0.5 * fibre + 0.9 * (warp - 0.5) + 0.35 * broad, 0.0), 1.0)
        wa = 1 - wb
    elif kind == PLANKS:
        width, length = row[P0], row[P1]
        lane = math.floor(t / width)
        shift = _hash(int(lane), 7, 3, seed) * length
        cell = math.floor((s + shift) / length)
        tone = _hash(int(lane), int(cell), 1, seed)
        fx, fy = (s + shift) / length - cell, t / width - lane
        warp = fbm(s * 0.25, t + 7 * tone, tone * 9, 9.0, seed, footprint)
        fibre = (noise(s * 5 + 31 * tone, t * 160, 0.0, seed + 3) - 0.5) * _fade(160.0, footprint)
        wb = min(max(0.2 + 0.5 * tone + 0.35 * fibre + 0.9 * (warp - 0.5), 0.0), 1.0)
        wa = 1 - wb
        gap = min(min(fx, 1 - fx) * length, min(fy, 1 - fy) * width)
        gain = 1 - 0.6 * _line(gap, 0.0012, footprint)
    elif kind in (TILES, BRICK):
        u, v = s * scale, t * scale * row[P1]
        if kind == BRICK:
            u += 0.5 * (math.floor(v) % 2)
        cu, cv = math.floor(u), math.floor(v)
        du, dv = min(u - cu, cu + 1 - u) / scale, min(v - cv, cv + 1 - v) / (scale * row[P1])
        tone = _hash(int(cu), int(cv), 2, seed)
        wc = _line(min(du, dv), row[P0], footprint)
        mottle = fbm(x, y, z, 9.0, seed, footprint) - 0.5
        wb = (1 - wc) * min(max(0.15 + 0.5 * tone + 0.9 * mottle, 0.0), 1.0)
        wa = 1 - wc - wb
    elif kind == CARPET:
        fine = (noise(x * 190, y * 190, z * 190, seed) - 0.5) * _fade(190.0, footprint)
        mid = (noise(x * 60, y * 60, z * 60, seed + 1) - 0.5) * _fade(60.0, footprint)
        wb = min(max(0.5 + 0.8 * fine + 0.5 * mid + 0.7 * (fbm(x, y, z, 2.5, seed + 2, footprint) - 0.5), 0.0), 1.0)
        wa = 1 - wb
    elif kind == WEAVE:
        f = 260.0 * scale
        keep = _fade(f / 6.28, footprint)
        weave = 0.25 * keep * math.sin(s * f) * math.sin(t * f)
        wb = min(max(0.4 + weave + 0.8 * (fbm(x, y, z, 7.0, seed, footprint) - 0.5), 0.0), 1.0)
        wa = 1 - wb
    elif kind == PLASTER:
        gain = 1 + row[P0] * (fbm(x, y, z, 1.2, seed, footprint) - 0.5)
        gain += 0.12 * row[P0] * (noise(x * 90, y * 90, z * 90, seed + 4) - 0.5) * _fade(90.0, footprint)
    elif kind == STRIPES:
        wb = _band(s * scale, footprint * scale)
        wc = 0.7 * _line(abs(s * scale - math.floor(s * scale) - 0.5) / scale, 0.06 / scale, footprint)
        wb *= 1 - wc
        wa = 1 - wb - wc
    elif kind == MARBLE:
        warp = fbm(x, y, z, 1.6 * scale, seed, footprint)
        vein = abs(warp - 0.5) * 9 + 0.6 * abs(noise(x * 11, y * 11, z * 11, seed + 5) - 0.3)
        cloud = fbm(x, y, z, 3.0 * scale, seed + 9, footprint)
        wb = min(0.75 * max(0.0, 1 - 2.2 * vein) + max(0.0, 0.9 * (cloud - 0.45)), 1.0)
        wa = 1 - wb
    elif kind == CHECKER:
        u, v = 2 * _band(s * scale * 0.5, footprint * scale) - 1, 2 * _band(t * scale * 0.5, footprint * scale) - 1
        wb = 0.5 + 0.5 * u * v
        wa = 1 - wb
        gain = 0.92 + 0.16 * fbm(x, y, z, 8.0, seed, footprint)
    elif kind == GRANITE:
        keep = _fade(160.0, footprint)
        grain = noise(x * 160, y * 160, z * 160, seed)
        wb = 0.35 * (1 - keep) + keep * (1.0 if grain > 0.62 else 0.15)
        wc = keep * (0.8 if noise(x * 110, y * 110, z * 110, seed + 1) > 0.74 else 0.0)
        wb = max(0.0, wb - wc)
        wa = 1 - wb - wc
    elif kind in (DOTS, FLORAL):
        u, v = s * scale, t * scale
        cu, cv = math.floor(u), math.floor(v)
        ou = 0.5 + (0.3 * (_hash(int(cu), int(cv), 1, seed) - 0.5) if kind == FLORAL else 0.0)
        du, dv = u - cu - ou, v - cv - ou
        radius = math.sqrt(du * du + dv * dv)
        limit = 0.26
        if kind == FLORAL:
            turn = 6.28 * _hash(int(cu), int(cv), 3, seed)
            limit = 0.3 + 0.1 * math.cos(5 * math.atan2(dv, du) + turn)
            wc = min(max((0.1 - radius) / max(footprint * scale, 0.02) + 0.5, 0.0), 1.0) * _fade(scale, footprint)
        wb = min(max((limit - radius) / max(footprint * scale, 0.02) + 0.5, 0.0), 1.0)
        keep = _fade(scale, footprint)
        wb = (wb * keep + 0.25 * (1 - keep)) * (1 - wc)
        if kind == DOTS and _hash(int(cu), int(cv), 5, seed) > 0.5:
            wc, wb = wb, 0.0
        wa = 1 - wb - wc
    elif kind == PLAID:
        u, v = _band(s * scale, footprint * scale), _band(t * scale, footprint * scale)
        thin_u = _line(abs(s * scale - math.floor(s * scale) - 0.1) / scale, 0.05 / scale, footprint)
        thin_v = _line(abs(t * scale - math.floor(t * scale) - 0.1) / scale, 0.05 / scale, footprint)
        wc = 0.5 * max(thin_u, thin_v)
        wb = 0.5 * (u + v) * (1 - wc)
        wa = 1 - wb - wc
    elif kind == RUG:
        # Borders and lozenges; P0, P1 are the half sizes of the rug along its first two axes.
        edge = min(row[P0] - abs(s), row[P1] - abs(t))
        lozenge = _band((abs(s) + abs(t)) * scale, footprint * scale)
        star = _band((abs(s) - abs(t)) * scale * 0.5 + 0.25, footprint * scale)
        wb = 0.6 * lozenge + 0.3 * star
        if edge < 0.3 * min(row[P0], row[P1]) and row[P0] != row[P1]:
            wb = 1.0 - 0.3 * _band(s * scale * 2, footprint * scale * 2)
            if edge < 0.06:
                wc = 0.8
        wb *= 1 - wc
        wa = 1 - wb - wc
        gain = 0.85 + 0.3 * fbm(x, y, z, 30.0, seed, footprint)
    elif kind == PICTURE:
        # P0 picks landscape, blots, bands or a figure; the picture spans about half a metre.
        f, style = max(footprint, 1e-4), int(row[P0])
        h = fbm(s, t, 0.0, 4.0, seed, f)
        if style == 0:
            ground = min(max((0.25 * (h - 0.5) + 0.02 - t) / 0.004 + 0.5, 0.0), 1.0)
            far = min(max((0.4 * (fbm(s, 9.0, 0.0, 6.0, seed + 3, f) - 0.5) + 0.08 - t) / 0.004 + 0.5, 0.0), 1.0)
            wb = ground
            wc = (1 - ground) * far
            gain = 0.9 + 0.8 * t + 0.5 * (h - 0.5)
        elif style == 1:
            wb = min(max((h - 0.52) * 14, 0.0), 1.0)
            wc = (1 - wb) * min(max((fbm(s, t, 5.0, 7.0, seed + 4, f) - 0.56) * 14, 0.0), 1.0)
        elif style == 2:
            cell = math.floor((t + 0.1 * s * (seed % 3)) * 14)
            wb = _hash(int(cell), 1, 1, seed)
            wc = (1 - wb) * _hash(int(cell), 2, 1, seed)
        else:
            head = math.sqrt(s * s + 1.6 * (t - 0.06) ** 2)
            body = math.sqrt(s * s * 0.6 + (t + 0.16) ** 2)
            wb = 1.0 if head < 0.07 else 0.0
            wc = 1.0 if body < 0.13 and wb == 0 else 0.0
            gain = 0.8 + 0.5 * h
        wa = max(0.0, 1 - wb - wc)
    elif kind == TEXT:
        line = math.floor(t * scale)
        f = t * scale - line
        ink = _hash(math.floor(s * scale * 2.2), int(line), 1, seed) > 0.28
        length = _hash(3, int(line), 2, seed)
        keep = _fade(scale * 1.5, footprint)
        if 0.3 < f < 0.7 and ink and length > row[P0]:
            wb = 0.75 * keep + 0.2 * (1 - keep)
        wa = 1 - wb
    elif kind == SCREEN:
        wb = min(max(t * 2 + 0.5, 0.0), 1.0)
        if abs(s - 0.06) < 0.12 and abs(t) < 0.07:
            wc = 0.85
            if (t * 60 - math.floor(t * 60)) < 0.4 and _hash(int(s * 120), int(t * 60), 1, seed) > 0.4:
                wc = 0.2
        wb *= 1 - wc
        wa = 1 - wb - wc
    elif kind == SKY:
        wa, gain = _outdoors(d[0], d[1], d[2], seed)
        wb = 1 - wa
    elif kind == SPINE:
        # Bands at both ends of the spine and a title in its middle; P0 is half the book's height.
        h = x / max(row[P0], 0.01)
        if 0.72 < abs(h) < 0.84:
            wb = 0.9
        elif abs(h) < 0.5 and _hash(math.floor(x * 150), 1, 1, seed) > 0.45 and abs(y) < 0.012:
            wb = 0.8 * _fade(150.0, footprint)
        wa = 1 - wb
    elif kind == SHADE:
        gain = 0.75 + 0.35 * noise(x * 5, y * 5, z * 5, seed)
    for c in range(3):
        out[c] = gain * (wa * row[A + c] + wb * row[B + c] + wc * row[C + c])
