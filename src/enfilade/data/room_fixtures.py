"""Kitchen and bathroom: fridge, worktop with sink and hob, washbasin, toilet, bathtub. As `room_furniture`."""

from itertools import pairwise

import numpy as np

from enfilade.data import room_objects as small
from enfilade.data import room_wares as wares
from enfilade.data.room_furniture import case, front, shelves, wall_shelf
from enfilade.data.room_materials import DOTS, FLORAL, GRANITE, PLAIN, STRIPES
from enfilade.data.room_mesh import Thing, Top, box, cylinder, hexa, lathe, tube


def refrigerator(m):
    """Two doors on a body, with handles; the freezer above or below."""
    width, depth, height = m.uniform(0.58, 0.85), m.uniform(0.6, 0.75), m.uniform(1.5, 1.85)
    skin = m.white if m.rng.random() < 0.5 else m.add(PLAIN, m.grey(0.45, 0.7), specular=0.5, shine=40, reflect=0.05)
    thing, split = Thing.of("refridgerator"), m.uniform(0.3, 0.42)
    split = height * (split if m.rng.random() < 0.5 else 1 - split)
    thing.add(m.dark, box(-width / 2 + 0.02, width / 2 - 0.02, 0.03, depth - 0.1, 0, 0.06))
    thing.add(skin, box(-width / 2, width / 2, 0.02, depth - 0.06, 0.06, height, bevel=0.008))
    side = m.rng.choice([-1, 1])
    for z0, z1 in ((0.07, split - 0.005), (split + 0.005, height)):
        thing.add(skin, box(-width / 2, width / 2, depth - 0.055, depth, z0, z1, bevel=0.015))
        x, middle = side * (width / 2 - 0.06), (z1 - 0.25 if z0 < 0.1 else z0 + 0.22)
        thing.add(
            m.metal,
            tube(
                [
                    (x, depth, middle - 0.16),
                    (x, depth + 0.04, middle - 0.15),
                    (x, depth + 0.04, middle + 0.15),
                    (x, depth, middle + 0.16),
                ],
                0.011,
                8,
            ),
        )
    if m.rng.random() < 0.5:
        for _ in range(int(m.rng.integers(1, 4))):
            x, z = (
                m.uniform(-width * 0.3, width * 0.3),
                m.uniform(split, height - 0.3) if split < height / 2 else m.uniform(0.5, split - 0.3),
            )
            thing.include(small.paper_pinned(m), x=x, y=depth, z=z)
    thing.tops.append(Top(-width / 2 + 0.05, width / 2 - 0.05, 0.1, depth - 0.1, height, 0.35, "case"))
    return thing


def counter(m, width=None):
    """A kitchen run: base doors and drawers under a worktop with a sink and a tap, a hob with an oven, wall
    cupboards above, and a splash-back of tiles."""
    rng = m.rng
    width = m.uniform(1.6, 3.0) if width is None else width
    depth, height = 0.62, m.uniform(0.86, 0.92)
    wood = m.wood(rng.integers(3)) if rng.random() < 0.7 else m.paint((0.5, 0.95))
    stone = m.add(GRANITE, m.grey(0.15, 0.7), m.grey(0.1, 0.5), m.grey(0.3, 0.9), specular=0.5, shine=60, reflect=0.06)
    if rng.random() < 0.35:
        stone = m.wood()
    metal = [m.metal, m.brass, m.dark][rng.integers(3)]
    style, handle = int(rng.integers(3)), int(rng.integers(2))
    thing = Thing.of("counter")
    sink_x, sink_half, hob = m.uniform(-width * 0.3, width * 0.1), 0.27, width > 1.9 and rng.random() < 0.75
    hole = (sink_x - sink_half, sink_x + sink_half, 0.13, 0.5)
    for x0, x1, y0, y1 in (
        (-width / 2, hole[0], 0, depth),
        (hole[1], width / 2, 0, depth),
        (hole[0], hole[1], 0, hole[2]),
        (hole[0], hole[1], hole[3], depth),
    ):
        thing.add(stone, box(x0, x1, y0, y1, height - 0.035, height))
    thing.add(stone, box(-width / 2, width / 2, 0, 0.02, height, height + 0.08))
    base = thing.item("cabinet")
    hob_x = width / 2 - 0.33
    end = hob_x - 0.3 if hob else width / 2
    base.add(m.dark, box(-width / 2, end, 0.05, depth - 0.1, 0, 0.09))
    # The sink hangs in the body, which therefore stops below it.
    base.add(wood, box(-width / 2, end, 0.0, depth - 0.04, 0.09, height - 0.21))
    for x0, x1 in ((-width / 2, hole[0] - 0.005), (hole[1] + 0.005, end)):
        base.add(wood, box(x0, x1, 0.0, depth - 0.04, height - 0.21, height - 0.035))
    base.add(wood, box(hole[0] - 0.005, hole[1] + 0.005, hole[3] + 0.02, depth - 0.04, height - 0.21, height - 0.035))
    count = max(2, round((end + width / 2) / 0.48))
    for k in range(count):
        x0, x1 = (np.array([k, k + 1]) / count) * (end + width / 2) - width / 2
        drawers = rng.random() < 0.3
        rows = [0.1, 0.35, 0.6, height - 0.04] if drawers else [0.1, height - 0.2, height - 0.04]
        for r, (z0, z1) in enumerate(pairwise(rows)):
            front(
                m,
                thing,
                wood,
                metal,
                x0,
                x1,
                z0,
                z1,
                depth - 0.04,
                style,
                handle,
                0 if drawers or r else (1 if k % 2 == 0 else -1),
            )
    thing.item("sink").add(m.chrome if rng.random() < 0.7 else m.ceramic, *_basin(hole, height + 0.004, 0.17))
    thing.add(
        m.chrome,
        tube(
            [
                (sink_x, 0.09, height),
                (sink_x, 0.09, height + 0.22),
                (sink_x, 0.13, height + 0.28),
                (sink_x, 0.2, height + 0.28),
                (sink_x, 0.235, height + 0.22),
            ],
            0.013,
            10,
        ),
        cylinder(sink_x, 0.09, height, height + 0.04, 0.025),
    )
    if hob:
        thing.include(wares.stove(m, height), x=hob_x)
    free = [(-width / 2 + 0.05, hole[0] - 0.06), (hole[1] + 0.06, end - 0.04)]
    thing.tops += [Top(x0, x1, 0.05, depth - 0.08, height, 0.42, "kitchen") for x0, x1 in free if x1 - x0 > 0.15]
    if rng.random() < 0.8:
        z0, z1, deep = height + m.uniform(0.48, 0.56), min(2.3, height + 1.3), 0.33
        thing.item("cabinet").add(wood, box(-width / 2, width / 2, 0, deep - 0.02, z0, z1))
        count = max(2, round(width / 0.45))
        for k in range(count):
            x0, x1 = (np.array([k, k + 1]) / count) * width - width / 2
            front(
                m,
                thing,
                wood,
                metal,
                x0,
                x1,
                z0 + 0.005,
                z1 - 0.005,
                deep - 0.02,
                style,
                handle,
                1 if k % 2 == 0 else -1,
            )
    return thing


def _basin(hole, z, deep, wall=0.012):
    """Rim, four sides and the bottom of a rectangular bowl hanging in a hole."""
    x0, x1, y0, y1 = hole
    rim = [box(x0 - 0.015, x1 + 0.015, y0 - 0.015, y0 + wall, z - 0.006, z), box(x0 - 0.015, x1 + 0.015, y1 - wall,
    y1 + 0.015, z - 0.006, z),
           box(x0 - 0.015, x0 + wall, y0 + wall, y1 - wall, z - 0.006, z), box(x1 - wall, x1 + 0.015, y0 + wall,
           y1 - wall, z - 0.006, z)]  # fmt: skip
    sides = [box(x0, x1, y0, y0 + wall, z - deep, z - 0.006), box(x0, x1, y1 - wall, y1, z - deep, z - 0.006),
             box(x0, x0 + wall, y0 + wall, y1 - wall, z - deep, z - 0.006), box(x1 - wall, x1, y0 + wall, y1 - wall,
             z - deep, z - 0.006)]  # fmt: skip
    return [*rim, *sides, box(x0 + wall, x1 - wall, y0 + wall, y1 - wall, z - deep, z - deep + wall)]


def washbasin(m):
    """A bathroom sink on a pedestal or on a vanity cabinet."""
    rng = m.rng
    if rng.random() < 0.5:
        thing, h = Thing.of("sink"), m.uniform(0.8, 0.88)
        thing.add(m.ceramic, lathe([(0.13, 0), (0.08, 0.12), (0.075, 0.5), (0.12, h - 0.18)], 0, 0.2, n=18))
        bowl = [(0.1, -0.17), (0.24, -0.08), (0.275, 0.0), (0.25, 0.005), (0.2, -0.07), (0.06, -0.12)]
        solid = lathe(bowl, n=24, closed=True)
        thing.add(m.ceramic, solid._replace(vertices=solid.vertices * [1.05, 0.82, 1] + [0, 0.24, h]))
        thing.add(
            m.ceramic,
            box(-0.26, 0.26, 0, 0.06, h - 0.1, h + 0.02, bevel=0.015),
            cylinder(0, 0.24, h - 0.17, h - 0.115, 0.085),
        )
        tap_y, tap_z = 0.05, h + 0.02
    else:
        width, depth, h = m.uniform(0.6, 1.2), 0.5, m.uniform(0.8, 0.88)
        thing = case(m, "cabinet", width, depth, h - 0.05, 1, 2, doors=(0,))
        thing.tops.clear()
        thing.item("sink").add(m.ceramic, *_slab(width, depth, h, 0.3, 0.1))
        tap_y, tap_z = 0.06, h
        if width > 0.8:
            thing.tops.append(Top(0.28, width / 2 - 0.02, 0.05, depth - 0.05, h, 0.3, "bath"))
    thing.add(
        m.chrome,
        tube(
            [
                (0, tap_y, tap_z),
                (0, tap_y, tap_z + 0.12),
                (0, tap_y + 0.05, tap_z + 0.16),
                (0, tap_y + 0.13, tap_z + 0.13),
            ],
            0.014,
            10,
        ),
    )
    return thing


def _slab(width, depth, h, wide, deep):
    """A ceramic top with a rectangular bowl sunk in it."""
    x, y0, y1, low = wide / 1.4, 0.12, depth - 0.06, h - 0.05
    return [box(-width / 2, -x, 0, depth + 0.01, low, h, bevel=0.01), box(x, width / 2, 0, depth + 0.01, low, h,
    bevel=0.01), box(-x, x, 0, y0, low, h),
            box(-x, x, y1, depth + 0.01, low, h), box(-x, x, y0, y1, low, low + 0.008)]  # fmt: skip


def toilet(m):
    """Foot, bowl, seat, open or closed lid, cistern with a button."""
    thing, h = Thing.of("toilet"), m.uniform(0.38, 0.43)
    white, y = m.ceramic, 0.45

    def oval(profile, closed=False):
        solid = lathe(profile, n=24, closed=closed)
        return solid._replace(vertices=solid.vertices * [0.9, 1.18, 1] + [0, y, 0])

    thing.add(white, oval([(0.15, 0), (0.12, 0.06), (0.11, 0.18), (0.17, h - 0.1), (0.2, h - 0.02)]))
    thing.add(
        white,
        oval(
            [(0.19, h - 0.03), (0.205, h - 0.01), (0.205, h + 0.012), (0.13, h + 0.012), (0.12, h - 0.02)], closed=True
        ),
    )
    thing.add(white, box(-0.13, 0.13, 0.12, 0.32, 0.0, h - 0.03, bevel=0.02))
    if m.rng.random() < 0.5:
        thing.add(white, oval([(0.2, h + 0.014), (0.205, h + 0.022), (0.19, h + 0.04), (0.05, h + 0.048)]))
    else:
        solid = oval([(0.2, h + 0.014), (0.2, h + 0.034)])
        thing.add(white, solid.turned(x=1.45, about=(0, 0.235, h + 0.02)))
    top = m.uniform(0.74, 0.84)
    thing.add(
        white,
        box(-0.2, 0.2, 0.005, 0.18, h - 0.02, top - 0.03, bevel=0.02),
        box(-0.21, 0.21, 0, 0.19, top - 0.03, top, bevel=0.01),
    )
    thing.add(m.chrome, cylinder(0, 0.1, top, top + 0.01, 0.025))
    thing.tops.append(Top(-0.17, -0.04, 0.04, 0.16, top, 0.3, "bath"))
    return thing


def bathtub(m):
    """A tub along the wall, with taps, and mostly a shower curtain on a rod along its front."""
    rng = m.rng
    length, width, h = m.uniform(1.5, 1.75), m.uniform(0.7, 0.8), m.uniform(0.5, 0.58)
    thing, white = Thing.of("bathtub"), m.ceramic
    wall = 0.06
    x, y = length / 2, width
    thing.add(white, box(-x, x, 0, wall, 0, h, bevel=0.015), box(-x, x, y - wall, y, 0, h, bevel=0.015))
    thing.add(
        white,
        box(-x, -x + 0.1, wall - 0.01, y - wall + 0.01, 0, h, bevel=0.015),
        box(x - 0.16, x, wall - 0.01, y - wall + 0.01, 0, h, bevel=0.015),
    )
    thing.add(white, box(-x + 0.1, x - 0.16, wall, y - wall, 0, 0.14))
    slope = [(x - 0.45, wall, 0.14), (x - 0.16, wall, 0.14), (x - 0.16, y - wall, 0.14), (x - 0.45, y - wall, 0.14)]
    thing.add(
        white,
        hexa(
            slope,
            [(x - 0.2, a[1], h - 0.01) if k in (0, 3) else (x - 0.15, a[1], h - 0.01) for k, a in enumerate(slope)],
        ),
    )
    thing.add(
        m.chrome,
        tube([(-x + 0.03, y / 2, h + 0.12), (-x + 0.16, y / 2, h + 0.12), (-x + 0.18, y / 2, h + 0.08)], 0.018, 8),
    )
    thing.tops.append(Top(-x * 0.6, x * 0.3, 0.002, wall, h, 0.3, "rim"))
    if rng.random() < 0.8:
        thing.add(m.chrome, tube([(-x, y - 0.03, 1.98), (x, y - 0.03, 1.98)], 0.012, 8))
        part = m.uniform(0.25, 0.55) * length
        a, b, c = m.colour((0.02, 0.5), (0.6, 0.98)), m.colour((0.3, 0.8), (0.4, 0.9)), m.colour((0.3, 0.8), (0.4, 0.9))
        kind = int(rng.choice([DOTS, FLORAL, STRIPES, PLAIN]))
        cloth = m.add(kind, a, b, c, scale=m.uniform(4, 9))
        side = rng.choice([-1, 1])
        centre = side * (x - part / 2)
        thing.item("shower curtain").add(
            cloth, small.folds(m, part, 1.66, 0.035, int(part * 9)).moved(centre, y + 0.01, 0.3)
        )
    return thing


def towel_rack(m):
    return shelves(m, "bath")


def towel_board(m):
    return wall_shelf(m, "bath")


def larder(m):
    return shelves(m, "kitchen")
