"""The large pieces: seats, beds, tables and cases. Each maker draws its own proportions, style and
colours from the room's `Materials` and returns a `Thing` with its back on y = 0, facing +y."""

from itertools import pairwise

import numpy as np

from enfilade.data import room_objects as small
from enfilade.data import room_wares as wares
from enfilade.data.room_materials import MARBLE, PLAIN, WOOD, Materials
from enfilade.data.room_mesh import Thing, Top, box, ellipsoid, hexa, lathe, prism, tube
from enfilade.data.room_seats import legs


def _knob(m: Materials, thing: Thing, metal: int, x, y, z, kind: int, width=0.1, upright=False):
    """A knob, a bar or a bow on a front at y."""
    if kind == 0:
        thing.add(
            metal,
            ellipsoid(x, y + 0.014, z, 0.014, 0.014, 0.014, n=8, rings=6),
            tube([(x, y, z), (x, y + 0.012, z)], 0.006, 6),
        )
    else:
        dx, dz = (0, width / 2) if upright else (width / 2, 0)
        path = [
            (x - dx, y - 0.002, z - dz),
            (x - dx, y + 0.025, z - dz),
            (x + dx, y + 0.025, z + dz),
            (x + dx, y - 0.002, z + dz),
        ]
        thing.add(metal, tube(path, 0.006, 6))


def front(m: Materials, thing: Thing, wood: int, metal: int, x0, x1, z0, z1, y, style: int, handle: int, side=0):
    """A door (side -1 or 1: where its handle is) or a drawer front (side 0), plain or with a raised or sunk panel."""
    gap = 0.003
    x0, x1, z0, z1 = x0 + gap, x1 - gap, z0 + gap, z1 - gap
    thing.add(wood, box(x0, x1, y - 0.004, y + 0.016, z0, z1, bevel=0.003))
    border = min(0.06, 0.25 * min(x1 - x0, z1 - z0))
    if style == 1 and min(x1 - x0, z1 - z0) > 0.12:
        thing.add(wood, box(x0 + border, x1 - border, y + 0.008, y + 0.023, z0 + border, z1 - border, bevel=0.008))
    elif style == 2 and min(x1 - x0, z1 - z0) > 0.12:
        for a, b, c, d in ((x0, x1, z0, z0 + border), (x0, x1, z1 - border, z1),
        (x0, x0 + border, z0 + border, z1 - border),
                           (x1 - border, x1, z0 + border, z1 - border)):  # fmt: skip
            thing.add(wood, box(a, b, y + 0.01, y + 0.026, c, d))
    front = y + (0.016, 0.023, 0.026)[style]
    if side:
        _knob(m, thing, metal, x1 - 0.035 if side > 0 else x0 + 0.035, front, z0 + 0.55 * (z1 - z0), handle, 0.12, True)
    elif x1 - x0 > 0.75:
        for x in (0.75 * x0 + 0.25 * x1, 0.25 * x0 + 0.75 * x1):
            _knob(m, thing, metal, x, front, (z0 + z1) / 2, handle)
    else:
        _knob(m, thing, metal, (x0 + x1) / 2, front, (z0 + z1) / 2, handle)


def case(m: Materials, label: str, width, depth, height, rows, columns, wood=None, foot=None, doors=()) -> Thing:
    """A body of `rows` x `columns` fronts; the rows whose number is in `doors` are doors, the others are drawers."""
    rng = m.rng
    wood = m.wood(rng.integers(3)) if wood is None else wood
    top_wood = m.wood() if rng.random() < 0.2 else wood
    metal = [m.metal, m.brass, m.dark][rng.integers(3)]
    style, handle = int(rng.integers(3)), int(rng.integers(2))
    thing = Thing.of(label)
    foot = rng.choice([0.06, 0.1, 0.14]) if foot is None else foot
    body = depth - 0.02
    if foot > 0.08:
        thing.add(wood, *legs(-width / 2 + 0.02, width / 2 - 0.02, 0.02, body - 0.02, foot, 0.045, 0.6))
    else:
        thing.add(m.dark, box(-width / 2 + 0.02, width / 2 - 0.02, 0.01, body - 0.04, 0, foot))
    over = m.uniform(0.0, 0.025)
    thing.add(wood, box(-width / 2, width / 2, 0, body, foot, height - 0.03))
    thing.add(top_wood, box(-width / 2 - over, width / 2 + over, 0, depth + over, height - 0.03, height, bevel=0.006))
    share = rng.uniform(0.8, 1.25, rows)
    share[list(doors)] *= 2.2
    edges = foot + 0.015 + np.concatenate([[0], np.cumsum(share / share.sum())]) * (height - 0.05 - foot)
    for row in range(rows):
        for column in range(columns):
            x0 = -width / 2 + 0.01 + column * (width - 0.02) / columns
            side = 0 if row not in doors else (1 if column % 2 == 0 and columns > 1 else -1)
            front(
                m,
                thing,
                wood,
                metal,
                x0,
                x0 + (width - 0.02) / columns,
                edges[row],
                edges[row + 1],
                body,
                style,
                handle,
                side,
            )
    thing.tops.append(Top(-width / 2, width / 2, 0.02, depth, height, 0.6, "case"))
    return thing


def dresser(m):
    return case(
        m,
        "dresser",
        m.uniform(0.8, 1.5),
        m.uniform(0.42, 0.55),
        m.uniform(0.75, 1.25),
        int(m.rng.integers(3, 6)),
        int(m.rng.integers(1, 3)),
    )


def night_stand(m):
    rows = int(m.rng.integers(1, 4))
    thing = case(m, "night stand", m.uniform(0.38, 0.6), m.uniform(0.35, 0.45), m.uniform(0.45, 0.68), rows, 1)
    thing.tops[0].use = "night"
    return thing


def cabinet(m):
    """A wardrobe or a sideboard."""
    rng = m.rng
    tall = rng.random() < 0.45
    width, depth = (m.uniform(0.8, 1.8), m.uniform(0.5, 0.62)) if tall else (m.uniform(0.7, 1.6), m.uniform(0.38, 0.5))
    height, rows = (m.uniform(1.7, 2.2), rng.integers(1, 3)) if tall else (m.uniform(0.7, 1.3), rng.integers(1, 4))
    row_of_doors = 0 if rng.random() < 0.6 else int(rows) - 1
    return case(m, "cabinet", width, depth, height, int(rows), int(rng.integers(2, 4)), doors=(row_of_doors,))


def file_cabinet(m):
    return case(
        m,
        "cabinet",
        m.uniform(0.4, 0.48),
        m.uniform(0.5, 0.62),
        m.uniform(0.7, 1.35),
        int(m.rng.integers(2, 5)),
        1,
        wood=m.add(PLAIN, m.grey(0.3, 0.75), specular=0.3),
        foot=0.02,
    )


def bookshelf(m):
    """Open case with shelves, and books standing, leaning and lying on them."""
    rng = m.rng
    width, depth, height = m.uniform(0.6, 1.3), m.uniform(0.24, 0.34), m.uniform(0.9, 2.1)
    wood = m.wood(rng.integers(3))
    thing, t = Thing.of("bookshelf"), m.uniform(0.018, 0.03)
    thing.add(
        wood, box(-width / 2, -width / 2 + t, 0, depth, 0, height), box(width / 2 - t, width / 2, 0, depth, 0, height)
    )
    thing.add(wood, box(-width / 2 + t, width / 2 - t, 0, 0.012, 0, height))
    levels = np.linspace(0.05, height - t, max(3, round(height / m.uniform(0.3, 0.38)) + 1))
    for z in levels:
        thing.add(wood, box(-width / 2 + t, width / 2 - t, 0.012, depth - 0.003, z, z + t))
    thing.add(wood, box(-width / 2 + t, width / 2 - t, depth - 0.05, depth - 0.03, 0, 0.05))
    full = m.uniform(0.5, 1.0)
    for z, above in pairwise(levels):
        _fill_shelf(m, thing, -width / 2 + t, width / 2 - t, 0.02, depth - 0.01, z + t, above - z - t, full)
    thing.tops.append(Top(-width / 2 + 0.02, width / 2 - 0.02, 0.02, depth, height, 0.4, "case"))
    return thing


SHELVED = {
    "bath": (small.towel_pile, wares.bottle, wares.bottle, wares.cup),
    "kitchen": (wares.bowl, wares.bottle, wares.cup, wares.plate, wares.vase),
}


def _fill_shelf(m, thing, x0, x1, y0, y1, z, room, full, use="books"):
    """Things on one board: a row of books, a box, or what a bathroom or a kitchen keeps there."""
    rng = m.rng
    if rng.random() > full + 0.15:
        return
    roll = rng.random() if use == "books" else 1.0
    if roll < 0.75:
        stop = x0 + (x1 - x0) * (1.0 if rng.random() < 0.4 else rng.uniform(0.4, 0.95))
        thing.include(small.book_row(m, x0 + 0.004, stop, y0, y1, room), z=z)
        x0 = stop + 0.03
    elif roll < 0.85:
        thing.include(
            small.box_carton(m, width=min(0.3, x1 - x0 - 0.04), depth=y1 - y0 - 0.03, height=room * 0.7),
            x=(x0 + x1) / 2,
            y=y0 + 0.01,
            z=z,
        )
        return
    while x1 - x0 > 0.12:
        prop = wares.trinket(m, min(room * 0.85, 0.3), min(0.2, x1 - x0, y1 - y0))
        if use != "books" and rng.random() < 0.8:
            makers = SHELVED[use]
            prop = makers[rng.integers(len(makers))](m)
        low, high = prop.bounds
        if high[2] > room or high[1] - low[1] > y1 - y0:
            x0 += 0.05
            continue
        if x0 + high[0] - low[0] > x1:
            return
        thing.include(prop, x=x0 - low[0] + 0.01, y=(y0 + y1) / 2 - (low[1] + high[1]) / 2, z=z)
        x0 += high[0] - low[0] + rng.uniform(0.03, 0.2)


def shelves(m, use="books"):
    """A metal or wooden rack on posts, or boards on brackets, with mixed things."""
    rng = m.rng
    width, depth, height = m.uniform(0.7, 1.3), m.uniform(0.28, 0.42), m.uniform(1.2, 1.9)
    thing = Thing.of("shelves")
    board, post = (m.metal, m.metal) if rng.random() < 0.4 else (m.wood(), m.dark if rng.random() < 0.5 else m.wood(0))
    for x in (-width / 2 + 0.015, width / 2 - 0.015):
        for y in (0.02, depth - 0.015):
            thing.add(post, tube([(x, y, 0), (x, y, height)], 0.013, 8))
    levels = np.linspace(0.12, height - 0.04, int(rng.integers(3, 6)))
    for z in levels:
        thing.add(board, box(-width / 2, width / 2, 0, depth, z, z + 0.02, bevel=0.003))
    for z, above in zip(levels, [*levels[1:], levels[-1] + 0.35], strict=True):
        _fill_shelf(
            m, thing, -width / 2 + 0.03, width / 2 - 0.03, 0.02, depth - 0.01, z + 0.02, above - z - 0.03, 0.8, use
        )
    return thing


def wall_shelf(m, use="books"):
    """One or two boards on brackets, hung by the layout."""
    width, depth = m.uniform(0.6, 1.2), m.uniform(0.18, 0.26)
    thing, wood = Thing.of("shelves"), m.wood(m.rng.integers(3))
    for z in (0.0, 0.36)[: m.rng.integers(1, 3)]:
        thing.add(wood, box(-width / 2, width / 2, 0, depth, z, z + 0.025, bevel=0.003))
        for x in (-width * 0.35, width * 0.35):
            thing.add(m.metal, hexa([(x - 0.01, 0, z - 0.12), (x + 0.01, 0, z - 0.12), (x + 0.01, 0.01, z - 0.12),
            (x - 0.01, 0.01, z - 0.12)],
                                    [(x - 0.01, 0, z), (x + 0.01, 0, z), (x + 0.01, depth * 0.8, z),
                                    (x - 0.01, depth * 0.8, z)]))  # fmt: skip
        _fill_shelf(m, thing, -width / 2 + 0.01, width / 2 - 0.01, 0.01, depth - 0.01, z + 0.025, 0.3, 1.0, use)
    return thing


def table(m, width=None, depth=None, height=None, label="table"):
    """Rectangular or round, on four legs, trestles or a pedestal; wood, white or glass top."""
    rng = m.rng
    width = m.uniform(1.1, 1.9) if width is None else width
    depth = m.uniform(0.75, 0.98) if depth is None else depth
    height = m.uniform(0.71, 0.77) if height is None else height
    wood = m.wood(rng.integers(3))
    top = (
        wood
        if rng.random() < 0.7
        else [m.white, m.add(MARBLE, (0.88, 0.87, 0.85), (0.45, 0.44, 0.44), specular=0.4, reflect=0.05), m.dark][
            rng.integers(3)
        ]
    )
    thick, thing = m.uniform(0.022, 0.045), Thing.of(label)
    style = rng.random()
    if style < 0.25 and label == "table":  # round, on a pedestal
        radius = min(width, 1.3) / 2
        thing.add(
            top,
            lathe(
                [
                    (radius * 0.97, height - thick),
                    (radius, height - thick * 0.6),
                    (radius, height - 0.004),
                    (radius - 0.006, height),
                ],
                0,
                radius,
                n=36,
            ),
        )
        thing.add(
            wood,
            lathe(
                [
                    (0.28, 0),
                    (0.27, 0.03),
                    (0.06, 0.08),
                    (0.05, 0.3),
                    (0.075, 0.45),
                    (0.05, height - 0.1),
                    (0.16, height - thick),
                ],
                0,
                radius,
                n=16,
            ),
        )
        thing.tops.append(Top(-radius * 0.68, radius * 0.68, radius * 0.32, radius * 1.68, height, 0.5, "table"))
        return thing
    thing.add(top, box(-width / 2, width / 2, 0, depth, height - thick, height, bevel=0.006))
    leg = m.uniform(0.04, 0.085)
    inset = m.uniform(0.01, 0.08)
    if style < 0.85:
        kind = "round" if rng.random() < 0.3 else "square"
        thing.add(
            wood,
            *legs(
                -width / 2 + inset,
                width / 2 - inset,
                inset,
                depth - inset,
                height - thick,
                leg,
                m.uniform(0.5, 1.0),
                0.0,
                kind,
            ),
        )
        if rng.random() < 0.75:
            z0, z1, a = height - thick - m.uniform(0.06, 0.11), height - thick, inset + leg * 0.3
            x, y = width / 2 - a, depth - a
            thing.add(wood, box(-x, x, a, a + 0.018, z0, z1), box(-x, x, y - 0.018, y, z0, z1))
            thing.add(wood, box(-x, -x + 0.018, a, y, z0, z1), box(x - 0.018, x, a, y, z0, z1))
        if rng.random() < 0.25 and label == "table" and height < 0.6:
            thing.add(wood, box(-width / 2 + inset, width / 2 - inset, inset, depth - inset, 0.12, 0.14))
    else:
        for x in (-width * 0.36, width * 0.36):
            thing.add(
                wood,
                box(x - 0.04, x + 0.04, depth * 0.1, depth * 0.9, 0, 0.05, bevel=0.01),
                box(x - 0.03, x + 0.03, depth * 0.35, depth * 0.65, 0.05, height - thick),
            )
        thing.add(wood, box(-width * 0.36, width * 0.36, depth * 0.47, depth * 0.53, 0.15, 0.22))
    thing.tops.append(Top(-width / 2 + 0.05, width / 2 - 0.05, 0.05, depth - 0.05, height, 0.5, "table"))
    return thing


def coffee_table(m):
    thing = table(m, m.uniform(0.8, 1.25), m.uniform(0.5, 0.7), m.uniform(0.36, 0.48))
    thing.tops[0].use = "coffee"
    return thing


def side_table(m):
    thing = table(m, m.uniform(0.42, 0.6), m.uniform(0.4, 0.55), m.uniform(0.5, 0.65))
    thing.tops[0].use = "night"
    return thing


def desk(m):
    """A top, a pedestal of drawers on one or both sides, panel or legs, sometimes a modesty board."""
    rng = m.rng
    width, depth, height = m.uniform(1.1, 1.7), m.uniform(0.58, 0.8), m.uniform(0.72, 0.76)
    wood, metal = m.wood(rng.integers(3)), [m.metal, m.dark][rng.integers(2)]
    thing = Thing.of("desk")
    thing.add(wood, box(-width / 2, width / 2, 0, depth, height - 0.035, height, bevel=0.006))
    sides = [(-1,), (1,), (-1, 1)][rng.integers(3)]
    style, handle = int(rng.integers(3)), int(rng.integers(2))
    for side in (-1, 1):
        if side in sides:
            x0, x1 = sorted((side * (width / 2 - 0.03), side * (width / 2 - 0.03 - 0.38)))
            thing.add(wood, box(x0, x1, 0.04, depth - 0.04, 0.05, height - 0.035))
            thing.add(m.dark, box(x0 + 0.02, x1 - 0.02, 0.06, depth - 0.08, 0, 0.05))
            edges = np.linspace(0.06, height - 0.05, int(rng.integers(3, 5)))
            for z0, z1 in pairwise(edges):
                front(m, thing, wood, metal, x0, x1, z0, z1, depth - 0.04, style, handle)
        else:
            x = side * (width / 2 - 0.04)
            if rng.random() < 0.5:
                thing.add(wood, box(x - 0.015, x + 0.015, 0.03, depth - 0.03, 0, height - 0.035))
            else:
                thing.add(metal, *(tube([(x, y, 0), (x, y, height - 0.035)], 0.02, 8) for y in (0.06, depth - 0.06)))
    if rng.random() < 0.5:
        thing.add(wood, box(-width / 2 + 0.06, width / 2 - 0.06, 0.08, 0.1, height * 0.4, height - 0.035))
    thing.tops.append(Top(-width / 2 + 0.04, width / 2 - 0.04, 0.03, depth - 0.05, height, 0.6, "desk"))
    return thing


def television(m):
    """A flat set on a low stand with shelves or doors."""
    rng = m.rng
    width = m.uniform(1.0, 1.7)
    thing = case(
        m, "cabinet", width, m.uniform(0.38, 0.48), m.uniform(0.42, 0.6), 1, int(rng.integers(2, 4)), doors=(0,)
    )
    top = thing.tops.pop()
    screen = min(width * m.uniform(0.6, 0.9), 1.3)
    thing.include(wares.screen(m, screen, "television"), y=0.16, z=top.z)
    if rng.random() < 0.6:
        thing.item("otherprop").add(
            m.dark, box(width * 0.1, width * 0.36, 0.28, 0.38, top.z, top.z + 0.05, bevel=0.004)
        )
    return thing


def piano(m):
    """An upright piano with its keys."""
    wood = m.add(WOOD, (0.2, 0.1, 0.05), (0.1, 0.05, 0.03), specular=0.5, shine=60, reflect=0.05)
    thing, w, h = Thing.of("otherfurniture"), 1.48, m.uniform(1.1, 1.28)
    thing.add(
        wood,
        box(-w / 2, w / 2, 0, 0.3, 0, h, bevel=0.01),
        box(-w / 2 - 0.02, w / 2 + 0.02, -0.0, 0.33, h, h + 0.03, bevel=0.008),
    )
    for x0, x1 in ((-w / 2, -w / 2 + 0.05), (w / 2 - 0.05, w / 2)):
        thing.add(wood, box(x0, x1, 0.3, 0.58, 0, 0.78, bevel=0.01))
    thing.add(wood, box(-w / 2 + 0.05, w / 2 - 0.05, 0.3, 0.58, 0.6, 0.7))
    thing.add(m.white, box(-w / 2 + 0.06, w / 2 - 0.06, 0.4, 0.56, 0.7, 0.722))
    for k in range(50):
        if k % 7 not in (2, 6):
            x = -w / 2 + 0.085 + k * (w - 0.14) / 50
            thing.add(m.dark, box(x - 0.006, x + 0.006, 0.4, 0.49, 0.722, 0.735))
    thing.tops.append(Top(-w / 2 + 0.1, w / 2 - 0.1, 0.03, 0.28, h + 0.03, 0.4, "case"))
    return thing


def podium(m):
    """A podium for classrooms."""
    thing, wood = Thing.of("otherfurniture"), m.wood()
    thing.add(wood, box(-0.3, 0.3, 0, 0.4, 0, 1.0, bevel=0.01))
    top = prism([(-0.33, -0.03), (0.33, -0.03), (0.33, 0.47), (-0.33, 0.47)], 1.0, 1.03)
    thing.add(wood, top.turned(x=-0.15, about=(0, 0.2, 1.0)).moved(z=0.04))
    return thing
