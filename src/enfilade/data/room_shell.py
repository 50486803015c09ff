"""The room itself: walls with openings, floor, ceiling, and what belongs to them: doors, windows, blinds, curtains,
pictures, mirrors, whiteboards, rugs, fireplaces, radiators, ceiling lights. Things as in `room_furniture`; those that
hang are drawn around z = 0 at their lower edge, and openings are at their place in the wall."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from enfilade.data import room_materials as kinds
from enfilade.data import room_objects as small
from enfilade.data.room_materials import Materials
from enfilade.data.room_mesh import Light, Solid, Thing, box, cylinder, ellipsoid, hexa, lathe, tube


@dataclass
class Opening:
    """A hole in a wall: along it from x0 to x1 (metres from its middle), up from z0 to z1, `deep` into it."""

    kind: str
    x0: float
    x1: float
    z0: float
    z1: float
    deep: float


@dataclass
class Wall:
    """A vertical stretch of wall. Along it the local x axis runs, y points into the room."""

    start: np.ndarray  # (2,)
    end: np.ndarray
    openings: list[Opening]

    @property
    def length(self) -> float:
        return float(np.linalg.norm(self.end - self.start))

    @property
    def turn(self) -> float:
        """The angle of the local x axis."""
        return float(np.arctan2(*(self.end - self.start)[::-1]))

    @property
    def middle(self) -> np.ndarray:
        return (self.start + self.end) / 2


def outline(m: Materials) -> tuple[np.ndarray, float]:
    """A counter-clockwise floor plan, rectangular, with a corner cut out or with a chimney breast, and its height."""
    rng = m.rng
    w, d = np.clip(rng.normal([4.6, 4.2], 0.8), 3.0, 6.5)
    height, roll = m.uniform(2.4, 3.0), rng.random()
    if roll < 0.6 or min(w, d) < 3.6:
        points = [(0, 0), (w, 0), (w, d), (0, d)]
    elif roll < 0.8:
        a, b = w * m.uniform(0.2, 0.38), d * m.uniform(0.2, 0.38)
        points = [(0, 0), (w, 0), (w, d), (a, d), (a, d - b), (0, d - b)]
    else:
        a, b = w * m.uniform(0.3, 0.5), m.uniform(0.25, 0.5)
        x = m.uniform(0.2, 0.8) * (w - a)
        points = [(0, 0), (w, 0), (w, d), (x + a, d), (x + a, d - b), (x, d - b), (x, d), (0, d)]
    return np.array(points, float), height


def walls_of(points: np.ndarray) -> list[Wall]:
    return [Wall(a, b, []) for a, b in zip(points, np.roll(points, -1, 0), strict=True)]


def rectangles(points: np.ndarray) -> list[tuple[float, float, float, float]]:
    """The plan's cells between its own grid lines, as (x0, x1, y0, y1)."""
    xs, ys = np.unique(points[:, 0]), np.unique(points[:, 1])
    cells = [(a, b, c, d) for a, b in pairwise(xs) for c, d in pairwise(ys)]
    return [r for r in cells if inside(points, np.array([[(r[0] + r[1]) / 2, (r[2] + r[3]) / 2]]))[0]]


def inside(points: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Which of `where` (n, 2) lie in the plan (crossing number)."""
    x, y = where[:, 0], where[:, 1]
    result = np.zeros(len(where), bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            result ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return result


def _quad(a, b, c, d, texture=None) -> Solid:
    vertices = np.array([a, b, c, d], float)
    return Solid(vertices, np.array([[0, 1, 2], [0, 2, 3]]), vertices if texture is None else np.array(texture, float))


def wall_thing(wall: Wall, height: float, material: int, reveal: int) -> Thing:
    """The wall's inner face with holes, the reveals around them."""
    thing, half = Thing.of("wall"), wall.length / 2
    edges = sorted({-half, half, *(x for o in wall.openings for x in (o.x0, o.x1))})
    for x0, x1 in pairwise(edges):
        here = [o for o in wall.openings if o.x0 <= (x0 + x1) / 2 <= o.x1]
        spans = [(0, here[0].z0), (here[0].z1, height)] if here else [(0, height)]
        for z0, z1 in spans:
            if z1 - z0 > 1e-6:
                thing.add(material, _quad((x1, 0, z0), (x0, 0, z0), (x0, 0, z1), (x1, 0, z1)), closed=False)
    for o in wall.openings:
        thing.item(o.kind)  # annotators take the reveal for a part of the window or door
        y, x0, x1, z0, z1 = -o.deep, o.x0, o.x1, o.z0, o.z1
        thing.add(
            reveal,
            _quad((x0, 0, z0), (x0, y, z0), (x0, y, z1), (x0, 0, z1)),
            _quad((x1, y, z0), (x1, 0, z0), (x1, 0, z1), (x1, y, z1)),
            closed=False,
        )
        thing.add(
            reveal,
            _quad((x0, 0, z1), (x0, y, z1), (x1, y, z1), (x1, 0, z1)),
            _quad((x0, y, z0), (x0, 0, z0), (x1, 0, z0), (x1, y, z0)),
            closed=False,
        )
    return thing


def slab(label: str, cells, z: float, material: int, up: bool) -> Thing:
    """Floor or ceiling over the plan's cells."""
    thing = Thing.of(label)
    for x0, x1, y0, y1 in cells:
        corners = [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]
        thing.add(material, _quad(*(corners if up else corners[::-1])), closed=False)
    return thing


def baseboard(wall: Wall, material: int, high: float) -> Thing:
    """Skirting along the wall, broken at doors."""
    thing, half = Thing.of("wall"), wall.length / 2
    doors = sorted((o.x0 - 0.07, o.x1 + 0.07) for o in wall.openings if o.z0 < 0.05)
    x = -half
    for x0, x1 in [*doors, (half, half)]:
        if x0 - x > 0.02:
            thing.add(material, box(x, x0, 0, 0.014, 0, high), box(x, x0, 0, 0.009, high, high + 0.012))
        x = x1
    return thing


def _frame(x0, x1, z0, z1, width, y0, y1, sill=True):
    parts = [
        box(x0 - width, x0, y0, y1, z0, z1),
        box(x1, x1 + width, y0, y1, z0, z1),
        box(x0 - width, x1 + width, y0, y1, z1, z1 + width),
    ]
    return [*parts, box(x0 - width, x1 + width, y0, y1, z0 - width, z0)] if sill else parts


def door(m: Materials, o: Opening, paint: int) -> Thing:
    """Frame, panel with or without fields, handle with a plate."""
    thing = Thing.of("door").add(paint, *_frame(o.x0, o.x1, o.z0, o.z1, 0.06, -0.01, 0.018, sill=False))
    leaf = paint if m.rng.random() < 0.5 else m.wood(m.rng.integers(3))
    y0, y1 = -o.deep, -o.deep + 0.035
    thing.add(leaf, box(o.x0, o.x1, y0, y1, 0.006, o.z1))
    x, w = o.x0, o.x1 - o.x0
    style = m.rng.integers(3)
    if style:
        fields = [(0.12, 0.95), (1.08, 1.88)] if style == 1 else [(0.12, 0.55), (0.67, 1.12), (1.24, 1.88)]
        columns = 1 if m.rng.random() < 0.4 else 2
        for z0, z1 in fields:
            for k in range(columns):
                a, b = (
                    x + w * (k / columns) + 0.1 - 0.03 * k,
                    x + w * ((k + 1) / columns) - 0.1 + 0.03 * (columns - 1 - k),
                )
                thing.add(leaf, box(a, b, y1 - 0.002, y1 + 0.012, z0, min(z1, o.z1 - 0.1), bevel=0.01))
    side = m.rng.choice([-1, 1])
    hx = (o.x0 + o.x1) / 2 + side * (w / 2 - 0.07)
    metal = [m.metal, m.brass, m.dark][m.rng.integers(3)]
    thing.add(metal, box(hx - 0.02, hx + 0.02, y1, y1 + 0.006, 0.93, 1.12))
    return thing.add(
        metal, tube([(hx, y1, 1.05), (hx, y1 + 0.05, 1.05), (hx - side * 0.11, y1 + 0.05, 1.05)], 0.009, 8)
    )


def window(m: Materials, o: Opening, paint: int, daylight: float, sky: int) -> Thing:
    """Casing, sashes with glazing bars, panes that show the outdoors, a sill. Its light shines inwards."""
    thing = Thing.of("window").add(paint, *_frame(o.x0, o.x1, o.z0, o.z1, 0.055, -0.005, 0.02, sill=o.z0 < 0.1))
    if o.z0 >= 0.1:
        thing.add(paint, box(o.x0 - 0.09, o.x1 + 0.09, -o.deep + 0.03, 0.07, o.z0 - 0.03, o.z0, bevel=0.006))
    y = -o.deep
    thing.add(sky, box(o.x0, o.x1, y, y + 0.006, o.z0, o.z1))
    bar, columns = m.uniform(0.03, 0.055), max(1, round((o.x1 - o.x0) / m.uniform(0.55, 0.9)))
    rows = int(m.rng.choice([1, 1, 2]))
    for k in range(columns + 1):
        x = o.x0 + (o.x1 - o.x0) * k / columns
        a, b = (
            max(x - bar / 2 - (bar / 2 if k == columns else 0), o.x0),
            min(x + bar / 2 + (bar / 2 if k == 0 else 0), o.x1),
        )
        thing.add(paint, box(a, b, y + 0.004, y + 0.045, o.z0, o.z1))
    for k in range(rows + 1):
        z = o.z0 + (o.z1 - o.z0) * k / rows
        a, b = (
            max(z - bar / 2 - (bar / 2 if k == rows else 0), o.z0),
            min(z + bar / 2 + (bar / 2 if k == 0 else 0), o.z1),
        )
        thing.add(paint, box(o.x0, o.x1, y + 0.004, y + 0.042, a, b))
    if daylight > 0:
        half = np.array([(o.x1 - o.x0) / 2, 0, 0]), np.array([0, 0, (o.z1 - o.z0) / 2])
        centre = np.array([(o.x0 + o.x1) / 2, y + 0.06, (o.z0 + o.z1) / 2])
        area = (o.x1 - o.x0) * (o.z1 - o.z0)
        cool = np.array([0.86, 0.95, 1.12])
        # u x v must point into the room (+y).
        thing.lights.append(Light(centre, half[1], half[0], cool * daylight * area))
        if m.rng.random() < 0.35:
            sun = np.array([m.uniform(-0.9, 0.9), -1.0, m.uniform(0.5, 1.0)])
            strength = daylight * m.uniform(5, 12) * np.array([1.1, 0.96, 0.75])
            thing.lights.append(Light(centre, half[1], half[0], strength, sun=sun / np.linalg.norm(sun)))
    return thing


def blinds(m: Materials, o: Opening) -> Thing:
    """Slats across the window, let down some way, with a box on top and two cords."""
    skin = m.white if m.rng.random() < 0.6 else m.wood() if m.rng.random() < 0.6 else m.paint((0.4, 0.9))
    thing, x0, x1 = Thing.of("blinds"), o.x0 + 0.01, o.x1 - 0.01
    low = o.z1 - (o.z1 - o.z0) * (m.uniform(0.3, 0.98) if m.rng.random() < 0.7 else 0.98)
    if m.rng.random() < 0.15:  # vertical louvres
        for x in np.arange(x0 + 0.04, x1 - 0.04, 0.075):
            thing.add(skin, box(-0.04, 0.04, -0.001, 0.001, o.z0 + 0.02, o.z1 - 0.03).turned(z=0.9).moved(x=x, y=-0.0))
        return thing.add(skin, box(x0, x1, -0.02, 0.02, o.z1 - 0.035, o.z1))
    y, tilt, pitch = -min(o.deep * 0.4, 0.04), m.uniform(-0.9, 0.9), m.uniform(0.034, 0.05)
    for z in np.arange(o.z1 - 0.05, low, -pitch):
        thing.add(skin, box(x0, x1, -0.02, 0.02, -0.001, 0.001).turned(x=tilt).moved(y=y, z=z))
    thing.add(
        skin,
        box(x0, x1, y - 0.02, y + 0.02, o.z1 - 0.035, o.z1),
        box(x0, x1, y - 0.02, y + 0.02, low - 0.025, low - 0.005),
    )
    return thing.add(
        skin, *(box(x - 0.002, x + 0.002, y - 0.002, y + 0.002, low, o.z1) for x in (x0 + 0.12, x1 - 0.12))
    )


def curtains(m: Materials, o: Opening, height: float) -> Thing:
    """A rod with finials and one folded cloth on each side of the window."""
    cloth, metal = m.fabric((0.3, 0.92), 0.5), [m.metal, m.brass, m.dark, m.wood(0)][m.rng.integers(4)]
    low = 0.03 if m.rng.random() < 0.6 or o.z0 < 0.3 else o.z0 - 0.15
    top, part = min(o.z1 + 0.12, height - 0.06), (o.x1 - o.x0) * m.uniform(0.22, 0.48)
    out, thing = 0.1, Thing.of("curtain")
    for side, x in ((-1, o.x0 - 0.1), (1, o.x1 + 0.1)):
        centre = x - side * part / 2
        solid = small.folds(m, part, top - low, m.uniform(0.025, 0.045), max(2, int(part * m.uniform(8, 13))))
        thing.add(cloth, solid.moved(centre, 0.065, low))
        if side < 0:
            thing.item("curtain")
    thing.item("otherprop").add(
        metal, tube([(o.x0 - out - 0.06, 0.1, top + 0.015), (o.x1 + out + 0.06, 0.1, top + 0.015)], 0.012, 8)
    )
    for x in (o.x0 - out - 0.08, o.x1 + out + 0.08):
        thing.add(metal, ellipsoid(x, 0.1, top + 0.015, 0.028, 0.028, 0.028, n=10, rings=7))
        thing.add(metal, box(x * 0.98 - 0.008, x * 0.98 + 0.008, 0, 0.1, top + 0.005, top + 0.02))
    return thing


def picture(m: Materials) -> Thing:
    """A frame of four mitred bars, a mount and a painting, or a bare poster."""
    w, h = m.uniform(0.25, 0.85), m.uniform(0.3, 0.75)
    art = m.picture()
    thing = Thing.of("picture")
    if m.rng.random() < 0.2:
        return thing.add(art, box(-w / 2, w / 2, 0.001, 0.006, 0, h))
    bar, frame = m.uniform(0.015, 0.05), [m.wood(0), m.dark, m.brass, m.white, m.wood()][m.rng.integers(5)]
    thing.add(frame, *_frame(-w / 2 + bar, w / 2 - bar, bar, h - bar, bar, 0.0, 0.028))
    mount = m.uniform(0.03, 0.1) if m.rng.random() < 0.6 else 0.0
    if mount:
        thing.add(m.white, box(-w / 2 + bar, w / 2 - bar, 0.0, 0.012, bar, h - bar))
    e = bar + mount
    return thing.add(art, box(-w / 2 + e, w / 2 - e, 0.001, 0.015, e, h - e))


def mirror(m: Materials, low: bool = False) -> Thing:
    w, h = (m.uniform(0.4, 0.6), m.uniform(1.2, 1.5)) if low else (m.uniform(0.45, 1.1), m.uniform(0.5, 0.9))
    glass = m.add(kinds.PLAIN, (0.3, 0.31, 0.31), specular=0.0, reflect=0.85)
    thing, frame = Thing.of("mirror"), [m.wood(0), m.dark, m.metal, m.white, m.brass][m.rng.integers(5)]
    if not low and m.rng.random() < 0.3:
        r = w / 2
        ring = lathe([(r - 0.03, 0), (r, 0), (r, 0.02), (r - 0.03, 0.02)], n=32, closed=True).turned(x=-np.pi / 2)
        return thing.add(frame, ring.moved(z=r)).add(
            glass, lathe([(r - 0.02, 0), (r - 0.02, 0.01)], n=32).turned(x=-np.pi / 2).moved(z=r)
        )
    bar = m.uniform(0.015, 0.05)
    thing.add(frame, *_frame(-w / 2 + bar, w / 2 - bar, bar, h - bar, bar, 0.0, 0.025))
    return thing.add(glass, box(-w / 2 + bar, w / 2 - bar, 0.0, 0.012, bar, h - bar))


def whiteboard(m: Materials) -> Thing:
    """White or green, with a metal frame, a tray, writing and markers."""
    w, h, green = m.uniform(1.4, 2.6), m.uniform(0.95, 1.2), m.rng.random() < 0.15
    ground, ink = ((0.12, 0.25, 0.2), (0.85, 0.87, 0.82)) if green else ((0.95, 0.95, 0.96), (0.15, 0.2, 0.5))
    face = m.add(
        kinds.TEXT, ground, ink, scale=m.uniform(7, 13), specular=0.3, shine=60, reflect=0.04, p0=m.uniform(0.3, 0.9)
    )
    thing = Thing.of("whiteboard").add(m.metal, *_frame(-w / 2 + 0.02, w / 2 - 0.02, 0.02, h - 0.02, 0.02, 0, 0.02))
    thing.add(face, box(-w / 2 + 0.02, w / 2 - 0.02, 0.0, 0.012, 0.02, h - 0.02))
    thing.add(m.metal, box(-w / 2 + 0.1, w / 2 - 0.1, 0.0, 0.08, -0.01, 0.0))
    for k in range(3):
        x = m.uniform(-w / 3, w / 3)
        thing.item("otherprop").add(
            m.paint((0.4, 0.9)), tube([(x, 0.045, 0.009), (x + 0.12, 0.05 + 0.005 * k, 0.009)], 0.008, 7)
        )
    return thing


def rug(m: Materials, w: float, d: float) -> Thing:
    """A woven rug, patterned with a border, plain or striped; 8 to 15 mm thick."""
    a, b, c = m.colour((0.2, 0.75), (0.25, 0.7)), m.colour((0.1, 0.6), (0.3, 0.9)), m.colour((0.1, 0.8), (0.1, 0.8))
    kind = int(m.rng.choice([kinds.RUG, kinds.RUG, kinds.CARPET, kinds.STRIPES, kinds.CHECKER]))
    half = sorted((w / 2, d / 2))[::-1]
    skin = m.add(kind, a, b, c, scale=m.uniform(2.0, 5.0), p0=half[0], p1=half[1])
    return Thing.of("floor mat").add(skin, box(-w / 2, w / 2, 0, d, 0.0, m.uniform(0.008, 0.015), bevel=0.004))


def radiator(m: Materials) -> Thing:
    thing, w, h = Thing.of("otherfurniture"), m.uniform(0.6, 1.2), m.uniform(0.5, 0.6)
    for x in np.arange(-w / 2, w / 2, 0.06):
        thing.add(m.white, box(x, x + 0.045, 0.03, 0.11, 0.12, h + 0.12, bevel=0.012))
    return thing.add(
        m.white,
        tube([(-w / 2, 0.07, 0.18), (w / 2, 0.07, 0.18)], 0.02, 8),
        tube([(w / 2 - 0.03, 0.07, 0), (w / 2 - 0.03, 0.07, 0.18)], 0.012, 6),
    )


def fireplace(m: Materials) -> Thing:
    """Surround, mantel shelf, dark hearth with logs."""
    thing, w, h = Thing.of("otherstructure"), m.uniform(1.2, 1.6), m.uniform(1.0, 1.2)
    stone = (
        m.add(kinds.BRICK, (0.55, 0.28, 0.2), (0.42, 0.2, 0.15), (0.7, 0.68, 0.64), scale=4.5, p0=0.006, p1=2.8)
        if m.rng.random() < 0.6
        else m.wood()
    )
    thing.add(
        stone,
        box(-w / 2, -w * 0.28, 0, 0.3, 0, h),
        box(w * 0.28, w / 2, 0, 0.3, 0, h),
        box(-w * 0.28, w * 0.28, 0, 0.3, h * 0.7, h),
    )
    thing.add(m.dark, box(-w * 0.28, w * 0.28, 0, 0.04, 0.03, h * 0.7), box(-w * 0.28, w * 0.28, 0.0, 0.34, 0, 0.03))
    thing.add(m.wood(0), box(-w / 2 - 0.08, w / 2 + 0.08, 0, 0.38, h, h + 0.06, bevel=0.01))
    for k in range(3):
        thing.add(
            m.wood(),
            tube(
                [
                    (-0.2 + 0.05 * k, 0.14 + 0.05 * (k % 2), 0.075 + 0.06 * (k == 2)),
                    (0.2, 0.16 + 0.04 * (k % 2), 0.075 + 0.07 * (k == 2)),
                ],
                0.045,
                9,
            ),
        )
    return thing


def ceiling_light(m: Materials, strength: float, office: bool) -> Thing:
    """A flat panel, a glass dome, or a pendant; hanging down from z = 0."""
    thing, on, style = Thing.of("otherstructure"), strength > 0, m.rng.integers(3)
    glow = m.add(kinds.SHADE, (1.0, 0.95, 0.86), emit=5.0 if on else 0.0)
    warm = np.array([1.0, 0.9, 0.76]) if not office else np.array([0.97, 1.0, 0.98])
    if office:
        a, b = (0.6, 0.15) if style else (0.3, 0.3)
        thing.add(m.white, *_frame_flat(a, b)).add(glow, box(-a, a, -b, b, -0.03, -0.012))
        half, drop = (a, b), 0.06
    elif style == 0:
        r = m.uniform(0.15, 0.24)
        thing.add(m.metal, cylinder(0, 0, -0.02, 0, r * 1.05, n=24)).add(
            glow, lathe([(0.02, -0.12), (r * 0.6, -0.1), (r * 0.95, -0.05), (r, -0.02)], n=24)
        )
        half, drop = (r * 0.8, r * 0.8), 0.16
    else:
        r, low = m.uniform(0.14, 0.25), m.uniform(0.45, 0.75)
        thing.add(m.dark, tube([(0, 0, -low + 0.1), (0, 0, 0)], 0.005, 6), cylinder(0, 0, -0.03, 0, 0.05))
        skin = m.paint((0.3, 0.95), 0.3)
        thing.add(
            skin, lathe([(r, -low), (0.05, -low + 0.2), (0.03, -low + 0.2), (r - 0.012, -low)], n=24, closed=True)
        )
        thing.add(glow, ellipsoid(0, 0, -low + 0.06, 0.045, 0.045, 0.055))
        half, drop = (r * 0.6, r * 0.6), low + 0.03
    if on:
        # u x v points down.
        thing.lights.append(
            Light(np.array([0, 0, -drop]), np.array([0, half[1], 0]), np.array([half[0], 0, 0]), warm * strength)
        )
    return thing


def _frame_flat(a, b, t=0.03):
    return [
        box(-a - t, a + t, -b - t, -b, -0.04, 0),
        box(-a - t, a + t, b, b + t, -0.04, 0),
        box(-a - t, -a, -b, b, -0.04, 0),
        box(a, a + t, -b, b, -0.04, 0),
    ]


def column(m: Materials, height: float) -> Thing:
    thing, r, z = Thing.of("otherstructure"), m.uniform(0.14, 0.2), height
    skin = m.white
    thing.add(
        skin,
        cylinder(0, r + 0.03, 0.12, z - 0.12, r, r * 0.9, n=24),
        box(-r - 0.03, r + 0.03, 0, 2 * r + 0.06, 0, 0.12, bevel=0.01),
    )
    top = hexa([(-r, 0.03, z - 0.12), (r, 0.03, z - 0.12), (r, 0.03 + 2 * r, z - 0.12), (-r, 0.03 + 2 * r, z - 0.12)],
               [(-r - 0.04, 0, z), (r + 0.04, 0, z), (r + 0.04, 2 * r + 0.06, z),
               (-r - 0.04, 2 * r + 0.06, z)])  # fmt: skip
    return thing.add(skin, top)
