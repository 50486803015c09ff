"""The small pieces: books, pillows, lamps, clutter, people, and what hangs on walls and windows. As in
`room_furniture`, a maker draws its own style and returns a `Thing` with its back on y = 0, facing +y."""

import numpy as np

from enfilade.data.room_materials import PLAIN, SPINE, TEXT, WEAVE, Materials
from enfilade.data.room_mesh import (
    Solid,
    Thing,
    Top,
    box,
    cushion,
    cylinder,
    ellipsoid,
    hexa,
    lathe,
    sheet,
    tube,
)


def folds(m: Materials, width, height, depth, count, thickness=0.006) -> Solid:
    """A hanging cloth with vertical folds, facing +y, middle of its lower edge at the origin."""
    columns, phase = max(12, count * 8), m.uniform(0, 6)
    u = np.linspace(0, 1, columns)
    v = np.linspace(0, 1, 6)
    wave = np.sin(2 * np.pi * count * u + phase + 0.7 * np.sin(2 * np.pi * u * 2.3 + phase))
    grow = depth * (0.45 + 0.55 * (1 - v))[:, None]
    grid = np.empty((6, columns, 3))
    grid[..., 0] = width / 2 - u * width
    grid[..., 1] = depth + 0.01 + grow * wave
    grid[..., 2] = (v * height)[:, None]
    texture = np.stack([np.broadcast_to(u * width * 1.4, (6, columns)), grid[..., 2], np.zeros((6, columns))], -1)
    return sheet(grid, thickness, texture)


def pillow(m, material=None, upright=False):
    material = m.fabric(plain=0.6) if material is None else material
    thing = Thing.of("pillow")
    if upright:
        s = m.uniform(0.36, 0.5)
        solid = ellipsoid(0, 0, s / 2, s / 2, 0.07, s / 2, n=24, rings=13, power=0.6)
        return thing.add(
            material, solid.turned(x=m.uniform(0.25, 0.45), y=m.uniform(-0.15, 0.15)).moved(y=0.12, z=0.02)
        )
    w, d = m.uniform(0.5, 0.68), m.uniform(0.34, 0.42)
    solid = ellipsoid(0, 0, 0, w / 2, d / 2, m.uniform(0.07, 0.1), n=24, rings=13, power=0.55)
    return thing.add(material, solid.turned(x=m.uniform(0.05, 0.3)).moved(y=d / 2, z=0.1))


def _book(m, thick, depth, height):
    """One book standing with its spine at +y: cover boards, spine and a paper block set back from the edges."""
    cover = m.add(
        SPINE,
        m.colour((0.2, 0.9), (0.12, 0.85)) if m.rng.random() < 0.8 else m.grey(0.1, 0.95),
        m.colour((0.1, 0.8), (0.5, 0.95)),
        p0=height / 2,
    )
    paper = m.white
    board = min(0.004, thick * 0.2)
    if thick < 0.012:
        return [(cover, box(0, thick, 0, depth, 0, height))]
    return [
        (cover, box(0, thick, depth - 0.006, depth, 0, height)),
        (cover, box(0, board, 0, depth - 0.006, 0, height)),
        (cover, box(thick - board, thick, 0, depth - 0.006, 0, height)),
        (paper, box(board, thick - board, 0.006, depth - 0.006, 0.004, height - 0.004)),
    ]


def book_row(m, x0, x1, y0, y1, room):
    """Books side by side from x0 to x1, spines towards +y, each its own object; the last may lean, and some lie."""
    rng, thing = m.rng, Thing()
    base = min(room * 0.88, m.uniform(0.2, 0.27))
    while x1 - x0 > 0.05:
        thick = float(np.clip(rng.lognormal(-3.6, 0.45), 0.01, 0.065))
        height = min(base * rng.uniform(0.75, 1.08), room - 0.01)
        depth = min(y1 - y0, height * rng.uniform(0.62, 0.78))
        if x0 + thick > x1:
            break
        back = y1 - depth - rng.uniform(0, min(0.03, y1 - y0 - depth + 1e-6))
        lean = rng.uniform(0.1, 0.3) if rng.random() < 0.03 and x1 - x0 > 0.15 else 0.0
        thing.item("books")
        for material, solid in _book(m, thick, depth, height):
            solid = solid.turned(y=-lean, about=(thick, 0, 0)) if lean else solid
            thing.add(material, solid.moved(x0 + height * np.sin(lean), back, thick * np.sin(lean) * 0 + 0.0))
        x0 += thick + 0.001 + height * np.sin(lean)
        if rng.random() < 0.04:
            x0 += rng.uniform(0.03, 0.12)
    return thing


def book_pile(m, count=None):
    """Lying books, largest below."""
    thing, z, size = Thing(), 0.0, m.uniform(0.2, 0.3)
    for _ in range(int(m.rng.integers(1, 6)) if count is None else count):
        thick, turn = m.uniform(0.012, 0.045), m.uniform(-0.3, 0.3)
        depth = size * 0.7
        thing.item("books")
        for material, solid in _book(m, thick, depth, size):
            lying = solid.moved(0, -depth / 2, -size / 2).turned(y=np.pi / 2).moved(0, 0, thick).turned(z=turn)
            thing.add(material, lying.moved(0, 0.13, z))
        z += thick
        size *= m.uniform(0.85, 1.0)
    return thing


def paper(m):
    """One to four sheets, slightly turned."""
    thing = Thing.of("paper")
    sheet_paper = m.add(TEXT, (0.95, 0.95, 0.93), (0.2, 0.2, 0.22), scale=90.0, p0=0.2)
    for k in range(int(m.rng.integers(1, 5))):
        solid = box(-0.105, 0.105, -0.148, 0.148, 0.0005 + 0.0012 * k, 0.0015 + 0.0012 * k).turned(
            z=m.uniform(-0.5, 0.5)
        )
        thing.add(sheet_paper, solid.moved(m.uniform(-0.03, 0.03), 0.16 + m.uniform(-0.03, 0.03)))
    return thing


def paper_pinned(m):
    """A sheet on a vertical front."""
    w, h = m.uniform(0.12, 0.25), m.uniform(0.15, 0.3)
    a = (0.95, 0.95, 0.92) if m.rng.random() < 0.7 else m.colour((0.2, 0.5), (0.8, 0.95))
    material = m.add(TEXT, a, (0.2, 0.2, 0.25), scale=60.0, p0=0.2) if m.rng.random() < 0.7 else m.picture()
    return Thing.of("paper").add(material, box(-w / 2, w / 2, 0.001, 0.003, 0, h).turned(y=m.uniform(-0.06, 0.06)))


def box_carton(m, width=None, depth=None, height=None):
    """A cardboard or coloured box: closed with tape, or open with four flaps."""
    rng = m.rng
    w = m.uniform(0.22, 0.5) if width is None else width
    d = m.uniform(0.2, 0.4) if depth is None else depth
    h = m.uniform(0.14, 0.4) if height is None else height
    card = m.add(PLAIN, (0.66, 0.5, 0.33)) if rng.random() < 0.6 else m.paint()
    thing, t = Thing.of("box"), 0.006
    if rng.random() < 0.6 or width is not None:
        thing.add(card, box(-w / 2, w / 2, 0, d, 0, h, bevel=0.003))
        if rng.random() < 0.6:
            tape = m.add(PLAIN, (0.8, 0.72, 0.5), specular=0.3)
            thing.add(tape, box(-w / 2 - 0.001, w / 2 + 0.001, d / 2 - 0.025, d / 2 + 0.025, h * 0.75, h + 0.001))
        else:
            thing.add(
                card, box(-w / 2 - 0.006, w / 2 + 0.006, -0.0, d + 0.006, h - min(0.06, h / 3), h + 0.006, bevel=0.003)
            )
        thing.tops.append(Top(-w / 2 + 0.03, w / 2 - 0.03, 0.03, d - 0.03, h + 0.006, 0.3, "box"))
        return thing
    thing.add(card, box(-w / 2, w / 2, 0, t, 0, h), box(-w / 2, w / 2, d - t, d, 0, h), box(-w / 2, -w / 2 + t, t,
    d - t, 0, h),
              box(w / 2 - t, w / 2, t, d - t, 0, h), box(-w / 2 + t, w / 2 - t, t, d - t, 0, t))  # fmt: skip
    flap = d * 0.42
    for side in (-1, 1):
        angle = m.uniform(0.3, 1.3)
        solid = box(-w / 2, w / 2, 0, flap, 0, t).turned(x=-angle)
        solid = solid if side > 0 else solid.turned(z=np.pi)
        thing.add(card, solid.moved(y=d - 0.001 if side > 0 else 0.001, z=h))
    return thing


def bag(m):
    """A backpack, a shopping bag with handles, or a handbag."""
    rng, thing, roll = m.rng, Thing.of("bag"), m.rng.random()
    cloth = m.add(WEAVE, *(2 * [m.colour((0.2, 0.9), (0.1, 0.7))]))
    if roll < 0.45:
        thing.add(
            cloth,
            ellipsoid(0, 0.14, 0.22, 0.16, 0.11, 0.23, n=20, rings=11, power=0.6),
            ellipsoid(0, 0.25, 0.15, 0.12, 0.06, 0.12, n=16, rings=9, power=0.6),
        )
        thing.add(
            m.dark, tube([(-0.04, 0.1, 0.43), (-0.02, 0.1, 0.49), (0.02, 0.1, 0.49), (0.04, 0.1, 0.43)], 0.008, 6)
        )
        for x in (-0.08, 0.08):
            thing.add(m.dark, tube([(x, 0.05, 0.4), (x, 0.0, 0.3), (x, 0.01, 0.12), (x, 0.06, 0.06)], 0.014, 6))
        return thing
    w, d, h = m.uniform(0.24, 0.38), m.uniform(0.1, 0.16), m.uniform(0.24, 0.38)
    skin = m.paint((0.2, 0.95)) if roll < 0.8 else cloth
    k = 0.8
    foot = [(-w / 2 * k, 0.02, 0), (w / 2 * k, 0.02, 0), (w / 2 * k, d - 0.02, 0), (-w / 2 * k, d - 0.02, 0)]
    thing.add(skin, hexa(foot, [(-w / 2, 0, h), (w / 2, 0, h), (w / 2, d, h), (-w / 2, d, h)]))
    rise = m.uniform(0.1, 0.18)
    for y in (0.02, d - 0.02):
        thing.add(
            m.dark,
            tube(
                [
                    (-w / 4, y, h - 0.01),
                    (-w / 5, y, h + rise * 0.8),
                    (0, y, h + rise),
                    (w / 5, y, h + rise * 0.8),
                    (w / 4, y, h - 0.01),
                ],
                0.006,
                6,
            ),
        )
    if rng.random() < 0.3:
        thing.add(m.brass, box(-0.02, 0.02, d, d + 0.008, h * 0.6, h * 0.7))
    return thing


def clothes(m):
    """A heap of crumpled garments."""
    thing = Thing.of("clothes")
    for k in range(int(m.rng.integers(2, 5))):
        cloth = m.fabric((0.1, 0.9), 0.7)
        solid = ellipsoid(0, 0, 0, m.uniform(0.15, 0.3), m.uniform(0.13, 0.22), m.uniform(0.05, 0.09), n=40, rings=21)
        v = solid.vertices
        phase = m.rng.uniform(0, 6, 6)
        wobble = np.sin(v[:, 0] * 23 + phase[0]) * np.cos(v[:, 1] * 27 + phase[1]) + 0.6 * np.sin(
            (v[:, 0] - v[:, 1]) * 41 + phase[2]
        )
        v = v * (1 + 0.13 * wobble[:, None]) + [m.uniform(-0.1, 0.1), 0.25 + m.uniform(-0.06, 0.06), 0.04 + 0.035 * k]
        v[:, 2] = np.maximum(v[:, 2], 0.002)
        thing.add(cloth, solid._replace(vertices=v))
    return thing


def garment(m):
    """A coat or a shirt on a hook."""
    thing, cloth, h = Thing.of("clothes"), m.fabric((0.1, 0.8), 0.8), m.uniform(0.6, 0.95)
    z, u = np.linspace(0, 1, 9), np.linspace(0, 2 * np.pi, 21)[:-1]
    half = np.interp(z, [0, 0.6, 0.9, 1.0], [0.25, 0.22, 0.16, 0.03])[:, None]
    deep = np.interp(z, [0, 0.6, 0.92, 1.0], [0.07, 0.06, 0.06, 0.02])[:, None] * (
        1 + 0.25 * np.sin(5 * u + m.uniform(0, 6))
    )
    vertices = np.stack([half * np.cos(u), 0.085 + deep * np.sin(u), np.broadcast_to((z * h)[:, None], (9, 20))], -1)
    solid = lathe([(1, k) for k in range(9)], n=20)
    thing.add(cloth, solid._replace(vertices=vertices.reshape(-1, 3)))
    for side in (-1, 1):  # sleeves
        arm = [(0.17 * side, 0.085, h * 0.93), (0.26 * side, 0.09, h * 0.62), (0.27 * side, 0.1, h * 0.28)]
        thing.add(cloth, tube(arm, [0.05, 0.055, 0.045], 10))
    return thing.add(m.metal, tube([(0, 0.0, h + 0.02), (0, 0.06, h + 0.02), (0, 0.085, h + 0.05)], 0.008, 6))


def towel(m):
    """A towel over a wall bar."""
    w, h, cloth = m.uniform(0.35, 0.6), m.uniform(0.4, 0.75), m.fabric((0.5, 0.98), 0.55)
    thing = Thing.of("towel").add(cloth, folds(m, w, h, 0.008, 2, 0.012).moved(0, 0.055, 0))
    thing.add(cloth, box(-w / 2, w / 2, 0.048, 0.075, h - 0.015, h + 0.012, bevel=0.01))
    thing.item("otherprop").add(
        m.chrome, tube([(-w / 2 - 0.06, 0.045, h - 0.02), (w / 2 + 0.06, 0.045, h - 0.02)], 0.008, 6)
    )
    return thing.add(
        m.chrome, *(box(x - 0.012, x + 0.012, 0, 0.05, h - 0.035, h - 0.005) for x in (-w / 2 - 0.06, w / 2 + 0.06))
    )


def towel_pile(m):
    thing, z = Thing.of("towel"), 0.0
    for _ in range(int(m.rng.integers(1, 4))):
        t = m.uniform(0.04, 0.06)
        thing.add(m.fabric((0.5, 0.98), 0.8), cushion(-0.15, 0.15, 0, 0.22, z, z + t, 0.3))
        z += t * 0.95
    return thing


def person(m):
    """A standing or sitting figure of rounded parts; 1.55 to 1.85 m."""
    thing, s = Thing.of("person"), m.uniform(1.55, 1.85) / 1.75
    tone = m.uniform(0, 1)
    skin = m.add(PLAIN, np.array([0.93, 0.74, 0.62]) * (1 - tone) + np.array([0.38, 0.24, 0.17]) * tone, specular=0.1)
    hair = m.add(
        PLAIN,
        [(0.08, 0.06, 0.05), (0.3, 0.18, 0.1), (0.62, 0.48, 0.28), (0.5, 0.5, 0.5)][m.rng.integers(4)],
        specular=0.2,
    )
    shirt, trousers, y, step = m.fabric(), m.fabric((0.1, 0.5), 0.95), 0.22, m.uniform(0.0, 0.1)
    for side, stride in ((-1, step), (1, -step)):
        x = 0.095 * side
        thing.add(
            trousers,
            tube(
                np.array([(x, y + stride, 0.07), (x * 1.05, y + stride * 0.6 + 0.02, 0.47), (x, y, 0.93)]) * s,
                np.array([0.055, 0.068, 0.095]) * s,
                12,
            ),
        )
        thing.add(m.dark, ellipsoid(x * s, (y + stride + 0.06) * s, 0.045 * s, 0.05 * s, 0.13 * s, 0.045 * s))
        bend = m.uniform(0.0, 0.22)
        arm = (
            np.array([(0.19 * side, y, 1.4), (0.25 * side, y - 0.02, 1.13), (0.24 * side, y + bend, 0.93 + bend * 0.5)])
            * s
        )
        thing.add(
            shirt,
            tube(arm[:2], np.array([0.055, 0.045]) * s, 10),
            ellipsoid(arm[0, 0], arm[0, 1], arm[0, 2], 0.065 * s, 0.065 * s, 0.065 * s),
        )
        thing.add(
            skin,
            tube(arm[1:], np.array([0.042, 0.03]) * s, 10),
            ellipsoid(arm[2, 0], arm[2, 1], arm[2, 2], 0.04 * s, 0.04 * s, 0.055 * s),
        )
    torso = lathe([(0.1, 0.86), (0.165, 0.9), (0.15, 1.08), (0.185, 1.3), (0.17, 1.42), (0.06, 1.49)], n=20)
    thing.add(shirt, torso._replace(vertices=(torso.vertices * [1.05, 0.68, 1] + [0, y, 0]) * s))
    thing.add(
        skin,
        cylinder(0, y * s, 1.46 * s, 1.56 * s, 0.055 * s),
        ellipsoid(0, (y + 0.015) * s, 1.635 * s, 0.078 * s, 0.095 * s, 0.118 * s, n=18, rings=13),
    )
    thing.add(skin, ellipsoid(0, (y + 0.115) * s, 1.625 * s, 0.014 * s, 0.02 * s, 0.022 * s, n=8, rings=6))
    return thing.add(hair, ellipsoid(0, (y - 0.012) * s, 1.665 * s, 0.086 * s, 0.098 * s, 0.105 * s, n=18, rings=13))
