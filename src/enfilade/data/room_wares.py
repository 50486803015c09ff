"""Vessels, plants, machines, screens, lamps and other small hard things. As `room_objects`."""

import numpy as np

from enfilade.data.room_materials import PLAIN, SHADE, WEAVE
from enfilade.data.room_mesh import Light, Thing, box, cylinder, ellipsoid, lathe, sheet, tube
from enfilade.data.room_objects import box_carton

WARM = np.array([1.0, 0.78, 0.52])


def _vessel(m, label, height, radius, material=None):
    """A turned vessel: one smooth random profile with a foot and an opening."""
    heights = np.linspace(0, 1, 7)
    radii = np.clip(m.rng.uniform(0.35, 1.0, 7), 0.3, 1)
    radii = np.convolve(np.pad(radii, 1, mode="edge"), [0.25, 0.5, 0.25], "valid") * radius
    outer = list(zip(radii, heights * height, strict=True))
    inner = [(max(r - 0.006, 0.004), max(z, 0.012)) for r, z in reversed(outer[2:])]
    material = m.paint((0.15, 0.95), 0.4) if material is None else material
    return Thing.of(label).add(material, lathe([*outer, *inner, (0.001, height * 0.3)], 0, radius, n=18))


def vase(m):
    height, radius = m.uniform(0.14, 0.34), m.uniform(0.045, 0.09)
    thing = _vessel(m, "otherprop", height, radius)
    return _leaves(m, thing, radius, height * 0.95, m.uniform(0.15, 0.3), 7) if m.rng.random() < 0.6 else thing


def _leaves(m, thing, y, z, spread, count):
    """Thin bent blades fanning out from (0, y, z)."""
    leaf = m.add(PLAIN, np.array([m.uniform(0.12, 0.35), m.uniform(0.35, 0.6), m.uniform(0.1, 0.25)]), specular=0.15)
    for k in range(count):
        a = 2 * np.pi * (k * 0.618) + m.uniform(-0.3, 0.3)
        out, rise, w = (
            spread * m.uniform(0.4, 1.0),
            spread * m.uniform(0.9, 1.9),
            m.uniform(0.02, 0.05) * (0.6 + spread),
        )
        t = np.linspace(0, 1, 6)
        path = np.stack([np.cos(a) * out * t**1.6, np.sin(a) * out * t**1.6, rise * (t - 0.45 * t**3)], 1)
        side = np.array([-np.sin(a), np.cos(a), 0]) * w
        width = (np.sin(np.pi * (0.08 + 0.9 * t)))[:, None]
        grid = np.stack([path - side * width, path, path + side * width], 1)
        grid[:, 1, 2] -= 0.2 * w * width[:, 0]
        thing.add(leaf, sheet(grid + np.array([0, y, z]), 0.002))
    return thing


def plant(m):
    """A potted plant for the floor."""
    h, r = m.uniform(0.2, 0.4), m.uniform(0.12, 0.2)
    pot = m.add(PLAIN, (0.65, 0.35, 0.22)) if m.rng.random() < 0.5 else m.paint((0.2, 0.95), 0.4)
    thing = Thing.of("otherprop")
    thing.add(
        pot,
        lathe(
            [(r * 0.7, 0), (r, h * 0.9), (r * 1.06, h * 0.9), (r * 1.06, h), (r * 0.94, h), (r * 0.92, h * 0.9)],
            0,
            r * 1.06,
            n=20,
        ),
    )
    thing.add(m.add(PLAIN, (0.18, 0.12, 0.08)), cylinder(0, r * 1.06, h * 0.88, h * 0.92, r * 0.93))
    if m.rng.random() < 0.5:
        top = h + m.uniform(0.3, 0.8)
        thing.add(
            m.wood(0),
            tube(
                [(0, r * 1.06, h * 0.9), (m.uniform(-0.04, 0.04), r * 1.06, (h + top) / 2), (0, r * 1.06, top)],
                0.013,
                7,
            ),
        )
        return _leaves(m, _leaves(m, thing, r * 1.06, top, 0.4, 13), r * 1.06, (h + 2 * top) / 3, 0.35, 8)
    return _leaves(m, thing, r * 1.06, h * 0.92, m.uniform(0.3, 0.6), 16)


def cup(m):
    r, h = m.uniform(0.032, 0.045), m.uniform(0.07, 0.1)
    skin = m.paint((0.3, 0.95), 0.5)
    thing = Thing.of("otherprop").add(
        skin, lathe([(r * 0.85, 0), (r, h), (r - 0.004, h), (r * 0.8, 0.008), (0.001, 0.008)], 0, r, n=16)
    )
    return thing.add(
        skin,
        tube(
            [(r * 0.93, r, h * 0.8), (r + 0.025, r, h * 0.75), (r + 0.022, r, h * 0.35), (r * 0.9, r, h * 0.25)],
            0.005,
            6,
        ),
    )


def bottle(m):
    r, h = m.uniform(0.025, 0.042), m.uniform(0.17, 0.31)
    skin = m.add(PLAIN, m.colour((0.2, 0.9), (0.1, 0.9)), specular=0.6, shine=80, reflect=0.05)
    thing = Thing.of("otherprop").add(
        skin, lathe([(r, 0), (r, h * 0.6), (r * 0.35, h * 0.78), (r * 0.35, h * 0.94)], 0, r, n=16)
    )
    thing.add(m.white, cylinder(0, r, h * 0.2, h * 0.5, r * 1.01, n=16))
    return thing.add(m.paint(), cylinder(0, r, h * 0.94, h, r * 0.42, n=12))


def bowl(m):
    r = m.uniform(0.09, 0.15)
    thing = Thing.of("otherprop")
    thing.add(
        m.paint((0.3, 0.95), 0.4),
        lathe(
            [
                (r * 0.4, 0),
                (r * 0.8, r * 0.25),
                (r, r * 0.55),
                (r - 0.006, r * 0.55),
                (r * 0.7, r * 0.25),
                (0.001, 0.02),
            ],
            0,
            r,
            n=22,
        ),
    )
    for k in range(int(m.rng.integers(0, 6))):
        a = k * 1.3
        fruit = m.add(PLAIN, m.colour((0.7, 0.95), (0.6, 0.9)), specular=0.3, shine=40)
        thing.add(
            fruit,
            ellipsoid(
                r * 0.42 * np.cos(a), r + r * 0.42 * np.sin(a), r * 0.5, r * 0.27, r * 0.27, r * 0.26, n=12, rings=8
            ),
        )
    return thing


def plate(m):
    r = m.uniform(0.1, 0.14)
    return Thing.of("otherprop").add(
        m.ceramic, lathe([(r * 0.6, 0), (r, 0.018), (r - 0.003, 0.021), (r * 0.6, 0.008), (0.001, 0.007)], 0, r, n=24)
    )


def appliance(m):
    """A microwave oven, a toaster or a kettle."""
    thing, roll = Thing.of("otherprop"), m.rng.random()
    skin = [m.white, m.metal, m.dark, m.paint()][m.rng.integers(4)]
    if roll < 0.4:
        w, d, h = 0.48, 0.35, 0.28
        thing.add(skin, box(-w / 2, w / 2, 0, d, 0.01, h, bevel=0.008))
        thing.add(m.dark, box(-w / 2 + 0.03, w / 2 - 0.13, d, d + 0.006, 0.05, h - 0.04)).add(
            m.dark, box(w / 2 - 0.11, w / 2 - 0.02, d, d + 0.004, 0.14, h - 0.04)
        )
        thing.add(m.metal, tube([(w / 2 - 0.13, d + 0.02, 0.06), (w / 2 - 0.13, d + 0.02, h - 0.05)], 0.007, 6))
    elif roll < 0.7:
        thing.add(skin, box(-0.14, 0.14, 0, 0.18, 0.01, 0.2, bevel=0.03))
        thing.add(
            m.dark,
            *(box(-0.11, 0.11, y, y + 0.03, 0.19, 0.202) for y in (0.045, 0.105)),
            box(-0.16, -0.14, 0.07, 0.11, 0.12, 0.14),
        )
    else:
        thing.add(skin, lathe([(0.085, 0), (0.09, 0.03), (0.07, 0.16), (0.06, 0.2), (0.02, 0.22)], 0, 0.1, n=18))
        thing.add(m.dark, tube([(0.06, 0.1, 0.18), (0.13, 0.1, 0.19), (0.14, 0.1, 0.08), (0.085, 0.1, 0.04)], 0.011, 7))
        thing.add(skin, tube([(-0.06, 0.1, 0.13), (-0.12, 0.1, 0.19)], [0.02, 0.01], 8))
    return thing


def stove(m, height):
    """An oven with a glass door and four rings on a hob."""
    skin, thing, w, d = [m.white, m.metal, m.dark][m.rng.integers(3)], Thing.of("otherstructure"), 0.59, 0.6
    thing.add(skin, box(-w / 2, w / 2, 0.01, d - 0.02, 0.02, height - 0.01))
    thing.add(m.dark, box(-w / 2, w / 2, 0.0, d, height - 0.01, height + 0.004))
    thing.add(m.dark, box(-w / 2 + 0.07, w / 2 - 0.07, d - 0.03, d - 0.005, 0.3, 0.62))
    thing.add(m.metal, tube([(-w / 2 + 0.05, d + 0.03, 0.68), (w / 2 - 0.05, d + 0.03, 0.68)], 0.011, 7))
    thing.add(m.metal, *(box(x, x + 0.02, d - 0.03, d + 0.03, 0.67, 0.69) for x in (-w / 2 + 0.05, w / 2 - 0.07)))
    for k in range(5):
        x = -0.2 + 0.1 * k
        thing.add(m.metal, tube([(x, d - 0.03, height - 0.07), (x, d + 0.012, height - 0.07)], 0.018, 10))
    for x, y, r in ((-0.15, 0.17, 0.08), (0.15, 0.17, 0.1), (-0.15, 0.42, 0.1), (0.15, 0.42, 0.08)):
        thing.add(
            m.metal,
            lathe([(r - 0.012, 0), (r, 0), (r, 0.012), (r - 0.012, 0.012)], x, y, height + 0.004, n=18, closed=True),
        )
    if m.rng.random() < 0.5:
        thing.item("otherprop").add(
            m.metal,
            lathe(
                [(0.1, 0), (0.11, 0.12), (0.105, 0.12), (0.095, 0.01), (0.001, 0.01)], -0.15, 0.42, height + 0.017, n=20
            ),
        )
        thing.add(m.dark, tube([(-0.05, 0.45, height + 0.12), (0.1, 0.52, height + 0.13)], 0.01, 6))
    return thing


def screen(m, width, label="otherprop"):
    """A flat screen on a foot."""
    h, z = width * 0.57, 0.06 if label == "television" else 0.12
    on = (
        m.screen() if m.rng.random() < 0.4 else m.add(PLAIN, (0.03, 0.03, 0.035), specular=0.5, shine=100, reflect=0.09)
    )
    thing = Thing.of(label).add(m.dark, box(-width / 2, width / 2, 0, 0.04, z, z + h, bevel=0.005))
    e = 0.015
    thing.add(on, box(-width / 2 + e, width / 2 - e, 0.035, 0.043, z + e, z + h - e))
    thing.add(
        m.dark,
        box(-0.03, 0.03, 0.0, 0.03, 0.01, z + 0.05),
        box(-width * 0.22, width * 0.22, -0.06, 0.12, 0, 0.012, bevel=0.004),
    )
    return thing


def monitor(m):
    thing = screen(m, m.uniform(0.42, 0.62))
    thing.item("otherprop").add(m.dark, box(-0.21, 0.21, 0.24, 0.37, 0.0, 0.016, bevel=0.004))
    key = m.add(PLAIN, m.grey(0.1, 0.3))
    for row in range(4):
        thing.add(
            key,
            *(
                box(x, x + 0.022, 0.25 + 0.027 * row, 0.272 + 0.027 * row, 0.016, 0.022)
                for x in np.linspace(-0.2, 0.178, 13)
            ),
        )
    return thing.item("otherprop").add(m.dark, ellipsoid(0.28, 0.3, 0.012, 0.03, 0.05, 0.02, n=12, rings=7))


def laptop(m):
    skin, on = m.paint((0.1, 0.8), 0.3), m.screen()
    thing = Thing.of("otherprop").add(skin, box(-0.17, 0.17, 0.02, 0.25, 0, 0.016, bevel=0.004))
    thing.add(m.dark, box(-0.145, 0.145, 0.05, 0.15, 0.016, 0.018))
    angle = m.uniform(0.1, 0.45)
    about = (0, 0.02, 0.014)
    thing.add(skin, box(-0.17, 0.17, 0.014, 0.022, 0.012, 0.24).turned(x=angle, about=about))
    return thing.add(on, box(-0.16, 0.16, 0.022, 0.0235, 0.022, 0.23).turned(x=angle, about=about))


def clock(m):
    r = m.uniform(0.1, 0.17)
    face = lathe([(r, 0), (r, 0.03), (r - 0.02, 0.035), (r - 0.02, 0.02)], n=28).turned(x=-np.pi / 2)
    thing = Thing.of("otherprop").add(m.paint(), face)
    thing.add(m.white, lathe([(r - 0.018, 0.0), (r - 0.018, 0.024)], n=28).turned(x=-np.pi / 2))
    for length, angle in ((r * 0.5, m.uniform(0, 6)), (r * 0.75, m.uniform(0, 6))):
        thing.add(m.dark, box(-0.005, 0.005, 0.024, 0.028, -0.01, length).turned(y=angle))
    return thing


def bin_(m):
    r, h = m.uniform(0.12, 0.18), m.uniform(0.25, 0.45)
    skin = m.paint((0.1, 0.9), 0.3)
    return Thing.of("otherprop").add(
        skin,
        lathe(
            [
                (r * 0.75, 0),
                (r, h),
                (r + 0.008, h),
                (r + 0.008, h + 0.012),
                (r - 0.008, h + 0.012),
                (r * 0.72, 0.02),
                (0.001, 0.02),
            ],
            0,
            r + 0.01,
            n=20,
        ),
    )


def toy(m):
    """A ball, a teddy bear or building blocks."""
    roll, thing = m.rng.random(), Thing.of("otherprop")
    if roll < 0.3:
        r = m.uniform(0.07, 0.13)
        return thing.add(m.fabric(plain=0.2), ellipsoid(0, r, r, r, r, r, n=20, rings=13))
    if roll < 0.7:
        fur, s = m.add(WEAVE, m.colour((0.2, 0.5), (0.3, 0.8)), scale=0.6), m.uniform(0.8, 1.4)
        for x, y, z, a, b, c in ((0, 0.1, 0.1, 0.08, 0.07, 0.1), (0, 0.11, 0.235, 0.065, 0.06, 0.06),
        (-0.05, 0.1, 0.29, 0.025, 0.015, 0.025), (0.05, 0.1, 0.29, 0.025, 0.015, 0.025),
                                 (-0.08, 0.15, 0.13, 0.03, 0.06, 0.03), (0.08, 0.15, 0.13, 0.03, 0.06, 0.03),
                                 (-0.055, 0.19, 0.04, 0.036, 0.075, 0.036), (0.055, 0.19, 0.04, 0.036, 0.075, 0.036),
                                 (0, 0.165, 0.22, 0.028, 0.025, 0.022)):  # fmt: skip
            thing.add(fur, ellipsoid(x * s, y * s, z * s, a * s, b * s, c * s, n=12, rings=8))
        return thing
    for k in range(4):
        s, x = 0.05, -0.06 + 0.06 * (k % 3)
        thing.add(
            m.paint((0.5, 0.95)), box(x - s / 2, x + s / 2, 0.02, 0.02 + s, s * (k == 3), s + s * (k == 3), bevel=0.003)
        )
    return thing


def trinket(m, height, radius):
    """Something decorative that is no higher and wider than asked."""
    roll = m.rng.random()
    if roll < 0.35:
        thing = _vessel(m, "otherprop", height * m.uniform(0.5, 1.0), min(radius / 2, 0.07))
    elif roll < 0.5:
        thing = cup(m)
    elif roll < 0.65:
        w = min(radius, height * 0.75, 0.16)
        thing = (
            Thing.of("picture")
            .add(m.wood(), box(-w / 2, w / 2, 0, 0.012, 0, w * 1.25))
            .add(m.picture(), box(-w / 2 + 0.012, w / 2 - 0.012, 0.012, 0.014, 0.012, w * 1.25 - 0.012))
        )
        for part in thing.parts:
            part.solid = part.solid.turned(x=0.2).moved(y=w * 0.3, z=0.003)
    elif roll < 0.8:
        w, d, h = radius * m.uniform(0.6, 1.0), radius * 0.6, min(height, radius) * 0.6
        thing = box_carton(m, w, d, h)
        thing.tops.clear()
    else:
        r = min(radius, height, 0.12) / 2
        thing = Thing.of("otherprop").add(m.paint(gloss=0.5), ellipsoid(0, r, r, r, r, r, n=14, rings=9))
    return thing


def lamp_table(m):
    """A turned foot under a glowing shade."""
    h, r = m.uniform(0.34, 0.52), m.uniform(0.12, 0.18)
    foot = [m.brass, m.dark, m.ceramic, m.wood(0), m.paint(gloss=0.4)][m.rng.integers(5)]
    middle = [
        (r * 0.5, 0),
        (r * 0.5, 0.015),
        *[(m.uniform(0.014, 0.06), z) for z in np.linspace(0.05, h * 0.55, 5)],
        (0.01, h * 0.62),
        (0.008, h * 0.7),
    ]
    thing = Thing.of("lamp").add(foot, lathe(middle, 0, r, n=16))
    return _shade(m, thing, 0, r, h * 0.58, h, r, 1.0)


def _shade(m, thing, x, y, z0, z1, r, strength):
    on = m.rng.random() < 0.6
    top = r * m.uniform(0.55, 0.95)
    colour = hsl = np.clip(np.array([0.95, 0.88, 0.74]) * m.uniform(0.75, 1.0) + m.rng.normal(0, 0.04, 3), 0, 1)
    cloth = m.add(SHADE, colour, emit=2.2 * strength if on else 0.0)
    thing.add(cloth, lathe([(r, z0), (top, z1), (top - 0.006, z1), (r - 0.006, z0)], x, y, n=24, closed=True))
    bulb = m.add(PLAIN, hsl, emit=9.0 if on else 0.0)
    thing.add(bulb, ellipsoid(x, y, (z0 + z1) / 2 - 0.01, 0.03, 0.03, 0.04, n=10, rings=7))
    if on:
        power = WARM * m.uniform(0.5, 1.1) * strength
        thing.lights.append(
            Light(
                np.array([x, y, (z0 + z1) / 2]), np.zeros(3), np.zeros(3), power, radius=max(r, (z1 - z0) * 0.6) + 0.02
            )
        )
    return thing


def lamp_floor(m):
    h, r, metal = m.uniform(1.4, 1.75), m.uniform(0.17, 0.24), [m.dark, m.brass, m.metal][m.rng.integers(3)]
    thing = Thing.of("lamp").add(
        metal,
        lathe([(0.14, 0), (0.14, 0.02), (0.02, 0.04)], 0, r, n=20),
        tube([(0, r, 0.03), (0, r, h - 0.05)], 0.012, 8),
    )
    return _shade(m, thing, 0, r, h - m.uniform(0.22, 0.32), h, r, 1.6)


def lamp_desk(m):
    skin = m.paint(gloss=0.5)
    thing = Thing.of("lamp").add(skin, lathe([(0.085, 0), (0.085, 0.015), (0.02, 0.025)], 0, 0.1, n=18))
    thing.add(m.metal, tube([(0, 0.1, 0.02), (0, 0.03, 0.25), (0, 0.15, 0.42)], 0.008, 7))
    head = lathe([(0.075, 0), (0.04, 0.08), (0.02, 0.11), (0.015, 0.11), (0.035, 0.08), (0.07, 0)], n=16, closed=True)
    return thing.add(skin, head.turned(x=0.5).moved(0, 0.2, 0.34))
