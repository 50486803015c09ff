"""Seats and beds. As `room_furniture`."""

import numpy as np

from enfilade.data import room_objects as small
from enfilade.data.room_mesh import Thing, Top, box, cushion, cylinder, ellipsoid, hexa, lathe, sheet, tube


def legs(x0, x1, y0, y1, z, width, taper=0.6, splay=0.0, kind="square"):
    """Four legs under the rectangle, thinner at the floor."""
    out = []
    for x, sx in ((x0 + width / 2, -1), (x1 - width / 2, 1)):
        for y, sy in ((y0 + width / 2, -1), (y1 - width / 2, 1)):
            if kind == "round":
                out.append(tube([(x + sx * splay, y + sy * splay, 0), (x, y, z)], [width * taper / 2, width / 2], 10))
                continue
            a, b = width * taper / 2, width / 2
            fx, fy = x + sx * splay, y + sy * splay
            foot = [(fx - a, fy - a, 0), (fx + a, fy - a, 0), (fx + a, fy + a, 0), (fx - a, fy + a, 0)]
            head = [(x - b, y - b, z), (x + b, y - b, z), (x + b, y + b, z), (x - b, y + b, z)]
            out.append(hexa(foot, head))
    return out


def chair(m, wood=None, seat=None):
    """Four legs, rungs, a seat with or without a pad, and one of four backs; sometimes arms."""
    rng = m.rng
    wood = m.wood(rng.integers(3)) if wood is None else wood
    seat = m.fabric() if seat is None else seat
    width, depth, level = m.uniform(0.4, 0.5), m.uniform(0.4, 0.48), m.uniform(0.42, 0.47)
    height, leg, lean = m.uniform(0.8, 1.05), m.uniform(0.03, 0.042), m.uniform(0.04, 0.1)
    style, round_legs = int(rng.integers(4)), rng.random() < 0.4
    thing = Thing.of("chair")
    y0 = lean  # the back leans towards y = 0
    kind = "round" if round_legs else "square"
    thing.add(
        wood,
        *legs(-width / 2, width / 2, y0, y0 + depth, level - 0.03, leg, 0.65, 0.01 if not round_legs else 0.03, kind),
    )
    thing.add(wood, box(-width / 2, width / 2, y0, y0 + depth, level - 0.04, level - 0.012, bevel=0.008))
    if rng.random() < 0.6:
        thing.add(
            seat,
            cushion(
                -width / 2 + 0.01, width / 2 - 0.01, y0 + 0.015, y0 + depth - 0.005, level - 0.015, level + 0.035, 0.3
            ),
        )
    if rng.random() < 0.6:  # rungs
        z = m.uniform(0.12, 0.22)
        for x in (-width / 2 + leg / 2, width / 2 - leg / 2):
            thing.add(wood, tube([(x, y0 + leg / 2, z), (x, y0 + depth - leg / 2, z)], 0.01, 6))
        thing.add(
            wood, tube([(-width / 2 + leg / 2, y0 + depth / 2, z), (width / 2 - leg / 2, y0 + depth / 2, z)], 0.01, 6)
        )
    posts = [
        [(x, y0 + leg / 2, level - 0.04), (x, y0 * 0.55 + 0.012, (level + height) / 2), (x, 0.016, height)]
        for x in (-width / 2 + leg / 2, width / 2 - leg / 2)
    ]
    for path in posts:
        thing.add(wood, tube(path, [leg * 0.5, leg * 0.45, leg * 0.38], 8))

    def back_y(z):
        return np.interp(z, [level, height], [y0 + leg / 2, 0.016])

    inner = width - 2 * leg
    if style == 0:  # slats across
        for z in np.linspace(level + 0.14, height - 0.03, int(rng.integers(2, 5))):
            y = back_y(z)
            thing.add(
                wood, box(-inner / 2 - 0.01, inner / 2 + 0.01, y - 0.009, y + 0.009, z - 0.028, z + 0.028, bevel=0.004)
            )
    elif style == 1:  # spindles
        thing.add(wood, box(-width / 2, width / 2, 0.004, 0.034, height - 0.06, height + 0.005, bevel=0.008))
        for x in np.linspace(-inner / 2 + 0.02, inner / 2 - 0.02, int(rng.integers(3, 7))):
            thing.add(wood, tube([(x, y0 + leg / 2, level - 0.01), (x, 0.018, height - 0.04)], 0.008, 6))
    else:  # a board or a padded panel
        z0, z1 = level + m.uniform(0.06, 0.2), height
        material = seat if style == 2 else wood
        thick = 0.022 if style == 2 else 0.01
        a, b = back_y(z0), back_y(z1)
        thing.add(material, hexa([(-inner / 2, a - thick, z0), (inner / 2, a - thick, z0),
        (inner / 2, a + thick, z0), (-inner / 2, a + thick, z0)],
                                 [(-inner / 2, b - thick, z1), (inner / 2, b - thick, z1),
                                 (inner / 2, b + thick, z1), (-inner / 2, b + thick, z1)]))  # fmt: skip
    if rng.random() < 0.25:
        for x in (-width / 2 + 0.012, width / 2 - 0.012):
            z = level + 0.2
            thing.add(
                wood,
                tube([(x, back_y(z), z), (x, y0 + depth * 0.8, z), (x, y0 + depth * 0.82, level - 0.02)], 0.014, 8),
            )
    thing.tops.append(Top(-0.15, 0.15, y0 + 0.08, y0 + depth - 0.05, level + 0.036, 0.3, "seat"))
    return thing


def office_chair(m):
    seat, thing = m.fabric(plain=0.9), Thing.of("chair")
    level, y = m.uniform(0.44, 0.52), 0.32
    for k in range(5):
        a = k * 2 * np.pi / 5 + 0.3
        x1, y1 = 0.28 * np.cos(a), y + 0.28 * np.sin(a)
        thing.add(
            m.dark,
            tube([(0, y, 0.1), (x1, y1, 0.07)], [0.024, 0.015], 8),
            ellipsoid(x1, y1, 0.03, 0.03, 0.03, 0.03, n=10, rings=7),
        )
    thing.add(m.metal, cylinder(0, y, 0.08, level - 0.03, 0.025))
    thing.add(seat, cushion(-0.24, 0.24, y - 0.23, y + 0.24, level - 0.04, level + 0.05, 0.4))
    thing.add(m.dark, tube([(0, y - 0.1, level - 0.03), (0, 0.06, level), (0, 0.05, level + 0.25)], 0.018, 8))
    high = m.uniform(0.45, 0.7)
    thing.add(seat, cushion(-0.22, 0.22, -0.035, 0.035, 0, high, 0.45).turned(x=0.1).moved(y=0.11, z=level + 0.12))
    if m.rng.random() < 0.7:
        for x in (-0.27, 0.27):
            thing.add(
                m.dark,
                tube([(x * 0.85, y, level - 0.02), (x, y, level), (x, y, level + 0.2)], 0.014, 8),
                box(x - 0.03, x + 0.03, y - 0.12, y + 0.13, level + 0.2, level + 0.23, bevel=0.01),
            )
    return thing


def sofa(m, seats: int | None = None):
    """Base, arms, back, one seat and back cushion for each place, and throw pillows. One seat makes an armchair."""
    rng = m.rng
    seats = int(rng.choice([2, 3, 3])) if seats is None else seats
    cloth = m.fabric(plain=0.75)
    arm, depth, level = m.uniform(0.12, 0.24), m.uniform(0.8, 0.98), m.uniform(0.4, 0.46)
    width = seats * m.uniform(0.56, 0.72) + 2 * arm
    high, arm_high, foot = m.uniform(0.74, 0.95), m.uniform(0.54, 0.66), m.uniform(0.05, 0.14)
    thing = Thing.of("sofa" if seats > 1 else "chair")
    thing.add(m.wood(0), *legs(-width / 2 + 0.03, width / 2 - 0.03, 0.04, depth - 0.03, foot, 0.06, 0.6, 0.0, "round"))
    thing.add(cloth, box(-width / 2 + 0.01, width / 2 - 0.01, 0.02, depth - 0.02, foot, level - 0.12, bevel=0.02))
    thing.add(cloth, box(-width / 2 + arm * 0.6, width / 2 - arm * 0.6, 0, 0.22, foot, high - 0.03, bevel=0.05))
    rolled = rng.random() < 0.4
    for side in (-1, 1):
        x = side * (width / 2 - arm / 2)
        thing.add(
            cloth,
            box(x - arm / 2, x + arm / 2, 0.01, depth, foot + 0.01, arm_high - (arm / 2 if rolled else 0), bevel=0.03),
        )
        if rolled:
            thing.add(
                cloth, tube([(x, 0.01, arm_high - arm / 2), (x, depth + 0.01, arm_high - arm / 2)], arm * 0.56, 14)
            )
    inner = width - 2 * arm
    each = inner / seats
    tilt = m.uniform(0.08, 0.2)
    for k in range(seats):
        x0 = -inner / 2 + k * each
        thing.add(cloth, cushion(x0 + 0.004, x0 + each - 0.004, 0.17, depth + 0.012, level - 0.13, level + 0.02, 0.22))
        thing.add(
            cloth,
            cushion(x0 + 0.006, x0 + each - 0.006, -0.09, 0.09, 0, high - level + 0.04, 0.28)
            .turned(x=tilt)
            .moved(y=0.27, z=level + 0.005),
        )
    if seats > 1:
        for _ in range(int(rng.integers(0, 4))):
            k = rng.integers(seats)
            x = -inner / 2 + (k + 0.5) * each + rng.uniform(-0.05, 0.05)
            pillow = small.pillow(m, upright=True)
            thing.include(pillow, x=x, y=0.4, z=level + 0.012)
    if rng.random() < 0.2 * seats:
        thing.tops.append(Top(-inner / 2, inner / 2, 0.5, depth - 0.08, level + 0.02, 0.4, "seat"))
    return thing


def armchair(m):
    return sofa(m, 1)


def bed(m):
    """Frame, mattress, headboard of three kinds, sometimes a footboard, a draped blanket, pillows. The head is at
    the wall."""
    rng = m.rng
    width, length = float(rng.choice([0.95, 1.2, 1.45, 1.65, 1.85])), m.uniform(1.95, 2.1)
    wood, linen, cover = m.wood(rng.integers(3)), m.fabric((0.6, 0.95), 0.7), m.fabric()
    level = m.uniform(0.42, 0.62)  # top of the mattress
    thick, thing = m.uniform(0.18, 0.26), Thing.of("bed")
    high = m.uniform(0.85, 1.25)
    y0 = 0.06
    if rng.random() < 0.6:
        thing.add(
            wood,
            box(
                -width / 2 - 0.03,
                width / 2 + 0.03,
                y0,
                y0 + length,
                level - thick - 0.1,
                level - thick + 0.02,
                bevel=0.008,
            ),
        )
        thing.add(wood, *legs(-width / 2, width / 2, y0 + 0.03, y0 + length - 0.03, level - thick - 0.09, 0.07, 0.8))
    else:
        thing.add(
            m.fabric(plain=0.8),
            box(-width / 2 - 0.005, width / 2 + 0.005, y0, y0 + length, 0.04, level - thick + 0.01, bevel=0.015),
        )
        thing.add(m.dark, box(-width / 2 + 0.1, width / 2 - 0.1, y0 + 0.1, y0 + length - 0.1, 0, 0.05))
    thing.add(linen, cushion(-width / 2, width / 2, y0 + 0.005, y0 + length, level - thick, level, 0.15))
    style = int(rng.integers(4))
    metal = [m.brass, m.dark, m.white][rng.integers(3)]
    if style == 0:
        thing.add(wood, box(-width / 2 - 0.05, width / 2 + 0.05, 0.0, 0.05, 0, high, bevel=0.012))
        thing.add(wood, box(-width / 2 + 0.06, width / 2 - 0.06, 0.045, 0.062, level + 0.08, high - 0.08, bevel=0.008))
    elif style == 1:  # padded
        cloth, count = m.fabric(plain=0.8), int(rng.integers(2, 6))
        for k in range(count):
            x0 = -width / 2 - 0.03 + k * (width + 0.06) / count
            thing.add(cloth, cushion(x0 + 0.002, x0 + (width + 0.06) / count - 0.002, 0, 0.09, 0.15, high, 0.25))
    elif style == 2:  # bars
        for z in (level + 0.02, high):
            thing.add(
                metal,
                tube([(-width / 2, 0.025, z), (0, 0.025, z + 0.06 * (z == high)), (width / 2, 0.025, z)], 0.016, 8),
            )
        for x in (-width / 2, width / 2):
            thing.add(
                metal,
                tube([(x, 0.025, 0), (x, 0.025, high + 0.02)], 0.022, 10),
                ellipsoid(x, 0.025, high + 0.04, 0.03, 0.03, 0.03, n=10, rings=7),
            )
        for x in np.linspace(-width / 2, width / 2, int(rng.integers(5, 11)))[1:-1]:
            thing.add(metal, tube([(x, 0.025, level - 0.1), (x, 0.025, high + 0.02)], 0.009, 6))
    if rng.random() < 0.35 and style != 1:
        top = m.uniform(0.6, 0.8)
        if style == 2:
            y = y0 + length + 0.03
            thing.add(metal, tube([(-width / 2, y, top), (width / 2, y, top)], 0.016, 8))
            for x in np.linspace(-width / 2, width / 2, 7):
                thing.add(metal, tube([(x, y, 0), (x, y, top)], 0.012, 6))
        else:
            thing.add(
                wood,
                box(
                    -width / 2 - 0.04, width / 2 + 0.04, y0 + length + 0.005, y0 + length + 0.05, 0.02, top, bevel=0.012
                ),
            )
    rows = 1 if rng.random() < 0.7 else 2
    if rng.random() < 0.9:
        start = y0 + length * (m.uniform(0.28, 0.5) if rng.random() < 0.75 else 0.7)
        drop = m.uniform(0.15, min(0.42, level - 0.08))
        if rng.random() < 0.12:
            start = y0 + 0.03
        thing.add(cover, _blanket(m, width, start, y0 + length, level, drop))
    count = 1 if width < 1.3 else 2
    for row in range(rows):
        for k in range(count):
            x = (k - (count - 1) / 2) * width / count
            pillow = small.pillow(m, material=linen if row == 0 and rng.random() < 0.5 else None)
            thing.include(
                pillow,
                x=x + rng.uniform(-0.03, 0.03),
                y=y0 + 0.07 + 0.28 * row,
                z=level - 0.01,
                turn=rng.uniform(-0.1, 0.1),
            )
    thing.tops.append(
        Top(-width * 0.4, width * 0.4, y0 + 0.75 + 0.2 * rows, y0 + length - 0.15, level + 0.035, 0.4, "bed")
    )
    return thing


def _blanket(m, width, y0, y1, level, drop):
    """A cover over the bed's width, hanging down on both sides and over the foot, with soft wrinkles."""
    rng, over = m.rng, 0.025
    half = width / 2 + over
    profile = np.array(
        [
            (-half - 0.012, level - drop),
            (-half - 0.006, level - drop * 0.5),
            (-half, level - 0.03),
            (-half + 0.035, level + 0.022),
        ]
    )
    across = np.linspace(-half + 0.035, half - 0.035, 18)[1:-1]
    left = np.concatenate([profile, np.stack([across, np.full(16, level + 0.024)], 1), profile[::-1] * [-1, 1]])
    ys = np.concatenate([np.linspace(y0, y1 - 0.02, 22), [y1 + 0.015, y1 + 0.022, y1 + 0.028]])
    lower = np.concatenate([np.zeros(22), [0.03, drop * 0.5, drop]])
    grid = np.empty((len(ys), len(left), 3))
    grid[..., 0], grid[..., 1] = left[:, 0], ys[:, None]
    grid[..., 2] = np.minimum(left[:, 1], level + 0.024 - lower[:, None])
    grid[..., 2] = np.maximum(grid[..., 2], level - drop)
    phase, waves = rng.uniform(0, 6.3, 3), rng.uniform(4, 11, 3)
    wrinkle = sum(
        np.sin(grid[..., 0] * a + grid[..., 1] * b + p) for a, b, p in zip(waves, waves[::-1], phase, strict=True)
    )
    grid[..., 2] += 0.006 * (wrinkle + 3) * (grid[..., 2] > level)
    girth = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(left, axis=0), axis=1))])
    length = ys + lower
    texture = np.stack([*np.meshgrid(length, girth, indexing="ij"), np.zeros(grid.shape[:2])], -1)
    return sheet(grid, 0.018, texture)


def bench(m):
    """A storage bench, an ottoman or a stool."""
    rng, roll = m.rng, m.rng.random()
    thing = Thing.of("otherfurniture")
    if roll < 0.5:
        width, depth, h = m.uniform(0.45, 1.1), m.uniform(0.4, 0.55), m.uniform(0.38, 0.46)
        cloth = m.fabric()
        thing.add(m.wood(0), *legs(-width / 2, width / 2, 0, depth, 0.1, 0.05))
        thing.add(
            cloth,
            box(-width / 2, width / 2, 0, depth, 0.09, h - 0.06, bevel=0.02),
            cushion(-width / 2, width / 2, 0, depth, h - 0.09, h, 0.2),
        )
        thing.tops.append(Top(-width / 2 + 0.05, width / 2 - 0.05, 0.05, depth - 0.05, h, 0.4, "seat"))
    else:
        radius, h, wood = m.uniform(0.15, 0.19), m.uniform(0.42, 0.7), m.wood(rng.integers(3))
        thing.add(wood, lathe([(radius, h - 0.035), (radius, h - 0.005), (radius - 0.01, h)], 0, 0.2, n=20))
        thing.add(wood, *legs(-0.11, 0.11, 0.09, 0.31, h - 0.03, 0.035, 0.7, 0.06, "round"))
        ring = np.linspace(0, 2 * np.pi, 13)
        thing.add(
            m.metal, tube(np.stack([0.15 * np.cos(ring), 0.2 + 0.15 * np.sin(ring), np.full(13, 0.2)], 1), 0.008, 6)
        )
    return thing
