"""Arranges a room: its plan and style, furniture by the kind of room, chairs at tables, things on tops, pictures at eye
height, curtains at windows, clutter. Nothing is placed where its box would cut another's."""

from collections.abc import Callable, Mapping

import numpy as np

from enfilade.data import room_fixtures as fix
from enfilade.data import room_furniture as big
from enfilade.data import room_materials as kinds
from enfilade.data import room_objects as small
from enfilade.data import room_seats as seats
from enfilade.data import room_shell as shell
from enfilade.data import room_wares as wares
from enfilade.data.room_contents import ALONG_WALLS, ON_FLOOR, ON_TOPS, ONCE, ROOMS, Maker
from enfilade.data.room_materials import Materials
from enfilade.data.room_mesh import Light, Thing, rotation
from enfilade.data.room_plan import Plan, local_to_room, placed_bounds


def crowd(m: Materials, thing: Thing, density: float) -> Thing:
    """Put small things on the tops of a thing that has not been placed yet."""
    rng = m.rng
    for top in thing.tops:
        makers, most = ON_TOPS[top.use]
        taken: list[tuple[float, float, float, float]] = []
        used: set[Maker] = set()
        for _ in range(rng.binomial(most, density)):
            maker = makers[rng.integers(len(makers))]
            if maker in used and maker in ONCE:
                continue
            item = maker(m)
            low, high = item.bounds
            turn = rng.uniform(-0.25, 0.25) if top.use != "rim" else 0.0
            if high[2] - low[2] > top.height or low[2] < -0.02:
                continue
            low, high = placed_bounds(item, 0, 0, 0, turn)
            x = rng.uniform(*_span(top.x0 - low[0], top.x1 - high[0]))
            y = rng.uniform(*_span(top.y0 - low[1], top.y1 - high[1]))
            spot = (x + low[0], x + high[0], y + low[1], y + high[1])
            fits = (
                spot[0] >= top.x0 - 0.01
                and spot[1] <= top.x1 + 0.01
                and spot[2] >= top.y0 - 0.01
                and spot[3] <= top.y1 + 0.02
            )
            if fits and not any(spot[0] < b and spot[1] > a and spot[2] < d and spot[3] > c for a, b, c, d in taken):
                taken.append(spot)
                used.add(maker)
                thing.include(item, x, y, top.z, turn)
    return thing


def alike(rng: np.random.Generator, style: Mapping, make: Callable[[], Thing]) -> Thing:
    """A thing of a set: made from the same draws as every other made with `style`, a state of the generator."""
    now = rng.bit_generator.state
    rng.bit_generator.state = style
    thing = make()
    rng.bit_generator.state = now
    return thing


def _span(a, b):
    return (a, b) if b > a else ((a + b) / 2, (a + b) / 2 + 1e-9)


def arrange(rng: np.random.Generator, kind: str | None = None) -> Plan:
    """A furnished room of a random kind, or of the one named (see `ROOMS`)."""
    m = Materials(rng)
    if kind is None:
        kind = str(rng.choice(ROOMS, p=[0.2, 0.18, 0.16, 0.12, 0.16, 0.1, 0.08]))
    points, height = shell.outline(m)
    if kind == "bathroom":
        points = points / points.max(0) * [m.uniform(3.0, 3.6), m.uniform(3.0, 3.5)]
    elif kind == "classroom":
        points = points / points.max(0) * [m.uniform(5.2, 6.5), m.uniform(4.8, 6.5)]
    plan = Plan(kind, m, points, height, shell.walls_of(points))
    density = m.uniform(0.35, 0.9)
    openings(plan)
    furnish(plan, density)
    middle(plan, density)
    extras(plan, density)
    hang(plan)
    clutter(plan, density)
    ceiling(plan)
    return plan


def openings(plan: Plan):
    """Doors and windows, walls around them, floor and ceiling, with the room's surface materials."""
    m, rng = plan.materials, plan.materials.rng
    kind = plan.kind
    order = sorted(plan.walls, key=lambda w: -w.length + rng.normal(0, 0.8))
    daylight = m.uniform(1.2, 4.0) if rng.random() < 0.75 else 0.0
    bright = m.uniform(1.2, 2.6) if daylight else m.uniform(0.01, 0.05)
    sky_colour = (0.8, 0.88, 1.0) if daylight else (0.1, 0.12, 0.2)
    beyond = [(0.3, 0.42, 0.22), (0.42, 0.36, 0.24), (0.5, 0.5, 0.52), (0.5, 0.36, 0.3), (0.2, 0.32, 0.2)][
        rng.integers(5)
    ]
    sky = m.add(kinds.SKY, sky_colour, beyond, emit=bright, reflect=0.04)
    paint = m.white if rng.random() < 0.65 else m.wood(0) if rng.random() < 0.6 else m.paint((0.4, 0.9))
    found = 0
    for wall in order[: 1 + (rng.random() < 0.35)]:
        width, h = m.uniform(0.78, 0.95), min(m.uniform(1.98, 2.1), plan.height - 0.25)
        if wall.length > width + 0.4:
            x = rng.choice([-1, 1]) * (wall.length / 2 - width / 2 - m.uniform(0.12, 0.5))
            x = float(np.clip(x, -wall.length / 2 + width / 2 + 0.12, wall.length / 2 - width / 2 - 0.12))
            wall.openings.append(shell.Opening("door", x - width / 2, x + width / 2, 0.0, h, 0.09))
    wanted = int(rng.choice([0, 1, 2, 3], p=[0.12, 0.43, 0.35, 0.1] if kind != "bathroom" else [0.4, 0.55, 0.05, 0.0]))
    for wall in order[::-1] * 2:
        width = m.uniform(0.8, 2.2) if kind != "bathroom" else m.uniform(0.5, 0.9)
        taken = wall.openings
        if found >= wanted or wall.length < width + 0.5:
            continue
        x = float(rng.uniform(-1, 1) * 0.5 * (wall.length - width - 0.4))
        if any(o.x0 - 0.3 < x + width / 2 and o.x1 + 0.3 > x - width / 2 for o in taken):
            continue
        low = m.uniform(0.85, 1.1) if rng.random() < 0.8 or kind in ("kitchen", "bathroom") else 0.06
        low = max(low, 1.12) if kind == "kitchen" else low
        high = min(m.uniform(1.95, 2.25), plan.height - 0.2)
        wall.openings.append(shell.Opening("window", x - width / 2, x + width / 2, low, high, m.uniform(0.1, 0.2)))
        found += 1
    surfaces = _surfaces(plan)
    for number, wall in enumerate(plan.walls):
        (x, y), turn = wall.middle, wall.turn
        skin = surfaces["accent"] if number == surfaces["accent wall"] else surfaces["wall"]
        plan.world.include(shell.wall_thing(wall, plan.height, skin, paint), x, y, 0, turn)
        if surfaces["baseboard"] is not None:
            plan.world.include(shell.baseboard(wall, surfaces["baseboard"], surfaces["baseboard high"]), x, y, 0, turn)
        for o in wall.openings:
            if o.kind == "door":
                plan.put(shell.door(m, o, paint), x, y, 0, turn, check=False)
                _keep(plan, wall, o.x0 - 0.05, o.x1 + 0.05, 0, 0.75, 0.05, 2.1)
                continue
            plan.put(shell.window(m, o, paint, daylight, sky), x, y, 0, turn, check=False)
            roll = rng.random()
            if roll < 0.3:
                plan.put(shell.blinds(m, o), x, y, 0, turn, check=False)
            elif roll < 0.65 and kind != "bathroom" and wall.length / 2 - max(-o.x0, o.x1) > 0.22:
                plan.put(shell.curtains(m, o, plan.height), x, y, 0, turn, check=False)
            _keep(plan, wall, o.x0 - 0.1, o.x1 + 0.1, 0, 0.14, max(o.z0 - 0.05, 0.3), o.z1)
    cells = shell.rectangles(plan.points)
    plan.world.include(shell.slab("floor", cells, 0.0, surfaces["floor"], True))
    plan.world.include(shell.slab("ceiling", cells, plan.height, surfaces["ceiling"], False))


def _keep(plan: Plan, wall, x0, x1, y0, y1, z0, z1):
    """Keep a box in front of a wall free of furniture."""
    ends = np.array([local_to_room(wall, x0, y0), local_to_room(wall, x1, y1)])
    plan.boxes.append((np.array([*ends.min(0), z0]), np.array([*ends.max(0), z1])))


def _surfaces(plan: Plan) -> dict:
    m, rng, kind = plan.materials, plan.materials.rng, plan.kind
    pale = m.colour((0.03, 0.4), (0.55, 0.95)) if rng.random() < 0.35 else m.muted((0.62, 0.95))
    wall = m.add(kinds.PLASTER, pale, p0=m.uniform(0.03, 0.12))
    roll = rng.random()
    if kind == "bathroom" or (kind == "kitchen" and roll < 0.3):
        tone = m.muted((0.55, 0.95))
        wall = m.add(
            kinds.TILES,
            tone,
            tone * m.uniform(0.85, 0.97),
            m.grey(0.6, 0.85),
            scale=m.uniform(4, 9),
            specular=0.4,
            shine=60,
            reflect=0.04,
            p0=0.002,
            p1=float(rng.choice([1, 1, 2])),
        )
    elif roll < 0.12:
        wall = m.add(
            kinds.STRIPES, pale, pale * m.uniform(0.82, 0.95), m.colour((0.1, 0.4), (0.5, 0.8)), scale=m.uniform(4, 10)
        )
    elif roll < 0.2:
        wall = m.add(
            kinds.FLORAL, pale, pale * m.uniform(0.75, 0.92), m.colour((0.1, 0.5), (0.5, 0.8)), scale=m.uniform(5, 10)
        )
    elif roll < 0.25:
        wall = m.add(kinds.BRICK, (0.6, 0.33, 0.25), (0.5, 0.25, 0.2), (0.75, 0.72, 0.68), scale=4.2, p0=0.006, p1=3.0)
    accent = m.add(kinds.PLASTER, m.colour((0.2, 0.6), (0.35, 0.8)), p0=0.08)
    roll = rng.random()
    hard = kind in ("kitchen", "bathroom") or roll < 0.12
    if hard:
        a = m.muted((0.35, 0.9))
        choice = rng.random()
        if choice < 0.7:
            floor = m.add(
                kinds.TILES,
                a,
                a * m.uniform(0.75, 0.93),
                m.grey(0.35, 0.75),
                scale=m.uniform(1.8, 4.5),
                specular=0.4,
                shine=50,
                reflect=0.06,
                p0=0.0035,
                p1=1.0,
            )
        elif choice < 0.85:
            floor = m.add(
                kinds.CHECKER,
                m.grey(0.75, 0.92),
                m.muted((0.1, 0.5)),
                scale=m.uniform(2.5, 4),
                specular=0.4,
                shine=50,
                reflect=0.06,
            )
        else:
            floor = m.add(
                kinds.MARBLE, m.grey(0.75, 0.9), m.grey(0.4, 0.6), scale=1.2, specular=0.4, shine=70, reflect=0.08
            )
    elif roll < 0.62:
        a, b = m.woods[0] if rng.random() < 0.3 else m.wood_colours()
        floor = m.add(
            kinds.PLANKS,
            a,
            b,
            specular=0.25,
            shine=40,
            reflect=m.uniform(0, 0.07),
            p0=m.uniform(0.07, 0.2),
            p1=m.uniform(0.7, 1.8),
        )
    else:
        a = m.muted((0.25, 0.8)) if rng.random() < 0.8 else m.colour((0.1, 0.5), (0.2, 0.6))
        floor = m.add(kinds.CARPET, a, a * m.uniform(0.7, 0.85))
    white = m.add(kinds.PLASTER, m.grey(0.82, 0.95), p0=m.uniform(0.02, 0.1))
    if kind in ("office", "classroom") and rng.random() < 0.7:
        white = m.add(
            kinds.TILES, (0.9, 0.9, 0.89), (0.85, 0.85, 0.84), (0.75, 0.75, 0.75), scale=1 / 0.6, p0=0.008, p1=1.0
        )
    trim = m.white if rng.random() < 0.7 else m.wood(0)
    return {
        "wall": wall, "accent": accent,
        "accent wall": int(rng.integers(len(plan.walls))) if rng.random() < 0.25 else -1,
        "floor": floor, "ceiling": white, "baseboard": trim if kind != "bathroom" and rng.random() < 0.9 else None,
        "baseboard high": m.uniform(0.05, 0.13),
    }  # fmt: skip


def furnish(plan: Plan, density: float):
    """Along the walls, with what belongs beside each piece."""
    m, rng = plan.materials, plan.materials.rng
    for maker, chances, where in ALONG_WALLS[plan.kind]:
        for chance in chances:
            if rng.random() > chance:
                continue
            thing = maker(m)
            if maker is fix.counter:
                longest = max(w.length for w in plan.walls)
                thing = fix.counter(m, width=min(m.uniform(1.6, 3.2), longest - 0.2))
            crowd(m, thing, density)
            spot = plan.on_wall(thing, where, tries=24)
            if spot is None:
                continue
            wall, s, number = spot
            low, high = thing.bounds
            if maker is seats.bed:
                for side in rng.permutation([-1, 1])[: rng.integers(1, 3)]:
                    stand = crowd(m, big.night_stand(m), 0.7)
                    a, b = stand.bounds
                    x = s + (high[0] - a[0] + 0.04 if side > 0 else low[0] - b[0] - 0.04)
                    plan.put(stand, *local_to_room(wall, x, 0.02), 0, wall.turn)
            elif maker is big.desk:
                seat = (
                    seats.office_chair(m) if rng.random() < (0.75 if plan.kind == "office" else 0.4) else seats.chair(m)
                )
                x, y = local_to_room(wall, s + rng.uniform(-0.15, 0.15), high[1] + m.uniform(0.3, 0.5))
                plan.put(seat, x, y, 0, wall.turn + np.pi + rng.uniform(-0.4, 0.4), ignore=number)
            elif maker is seats.sofa:
                before_sofa(plan, wall, s, high[1], density)


def extras(plan: Plan, density: float):
    """More of the same along walls that are still free; a lived-in room is rarely bare."""
    m, rng = plan.materials, plan.materials.rng
    makers = [maker for maker, chances, _ in ALONG_WALLS[plan.kind] if sum(chances) < 0.7 or len(chances) > 1]
    makers = [maker for maker in makers if maker not in (seats.bed, fix.counter, big.piano, shell.fireplace)]
    for _ in range(rng.binomial(6, density)):
        plan.on_wall(crowd(m, makers[rng.integers(len(makers))](m), density), "wall", tries=6)


def before_sofa(plan: Plan, wall, s, front, density):
    """A coffee table, often on a rug, in front of a sofa."""
    m, rng = plan.materials, plan.materials.rng
    if rng.random() < 0.7:
        w, d = m.uniform(1.5, 2.3), m.uniform(1.1, 1.6)
        x, y = local_to_room(wall, s, front + 0.05)
        plan.put(shell.rug(m, w, d), x, y, 0, wall.turn)
    thing = crowd(m, big.coffee_table(m), density)
    plan.put(thing, *local_to_room(wall, s, front + m.uniform(0.3, 0.5)), 0, wall.turn)


def middle(plan: Plan, density: float):
    """Tables with chairs in the open floor, rows of desks, rugs and mats."""
    m, rng, kind = plan.materials, plan.materials.rng, plan.kind
    size = plan.points.max(0)
    if kind in ("dining room", "kitchen") or (kind in ("living room", "office") and rng.random() < 0.35):
        if kind == "dining room" and rng.random() < 0.5:
            plan_rug(plan, m.uniform(1.8, 2.6), m.uniform(1.4, 2.0))
        large = kind == "dining room"
        for _ in range(12):
            thing = big.table(m) if large else big.table(m, m.uniform(0.8, 1.3), m.uniform(0.7, 0.85))
            x, y = rng.normal(size / 2, size * (0.08 if large else 0.18))
            if table_with_chairs(plan, crowd(m, thing, density), x, y, rng.integers(4) * np.pi / 2):
                break
    elif kind == "classroom":
        turn = rng.integers(4) * np.pi / 2
        wide, deep, wood, cloth = m.uniform(0.7, 1.4), m.uniform(0.5, 0.6), m.wood(1), m.fabric(plain=1.0)
        style = rng.bit_generator.state
        step = np.array([wide + m.uniform(0.2, 0.6), deep + m.uniform(0.65, 0.8)])
        for i in np.arange(-2, 3):
            for j in np.arange(-2, 3):
                at = size / 2 + rotation(z=turn)[:2, :2] @ (np.array([i, j]) * step)
                thing = alike(rng, style, lambda: big.table(m, wide, deep, 0.73))
                thing.tops[0].use = "school"
                number = plan.put(crowd(m, thing, 0.25 * density), at[0], at[1], 0, turn)
                if number is not None:
                    seat = alike(rng, style, lambda: seats.chair(m, wood, cloth))
                    c, v = np.cos(turn), np.sin(turn)
                    out = deep + m.uniform(0.25, 0.4)
                    plan.put(
                        seat, at[0] - v * out, at[1] + c * out, 0, turn + np.pi + rng.uniform(-0.2, 0.2), ignore=number
                    )
    elif kind == "bedroom" and rng.random() < 0.6:
        plan_rug(plan, m.uniform(1.0, 2.0), m.uniform(0.8, 1.5))
    if kind == "bathroom":
        for _ in range(2):
            plan_rug(plan, m.uniform(0.6, 0.9), m.uniform(0.45, 0.6))
    elif kind == "kitchen" and rng.random() < 0.5:
        plan_rug(plan, m.uniform(0.7, 1.2), m.uniform(0.5, 0.7))
    if rng.random() < 0.09:
        for _ in range(10):
            x, y = rng.uniform(0.5, size - 0.5)
            if plan.put(small.person(m), x, y, 0, rng.uniform(0, 6.28)) is not None:
                break


def plan_rug(plan: Plan, w, d):
    m, rng = plan.materials, plan.materials.rng
    size = plan.points.max(0)
    thing = shell.rug(m, w, d)
    for _ in range(15):
        x, y = rng.uniform(0.3, size - 0.3)
        if (
            plan.put(thing, x, y, 0, rng.integers(4) * np.pi / 2 + (rng.normal(0, 0.05) if rng.random() < 0.5 else 0))
            is not None
        ):
            return


def table_with_chairs(plan: Plan, thing: Thing, x, y, turn) -> bool:
    m, rng = plan.materials, plan.materials.rng
    low, high = thing.bounds
    number = plan.put(thing, x, y, 0, turn)
    if number is None:
        return False
    wood, cloth, style = m.wood(rng.integers(3)), m.fabric(), rng.bit_generator.state
    width, depth = high[0] - low[0], high[1] - low[1]
    per_side = 2 if width > 1.25 else 1
    places = [(sx, depth / 2 + depth / 2, np.pi) for sx in np.linspace(-width / 2, width / 2, per_side + 2)[1:-1]]
    places += [(sx, 0.0, 0.0) for sx in np.linspace(-width / 2, width / 2, per_side + 2)[1:-1]]
    places += [(-width / 2, depth / 2, -np.pi / 2), (width / 2, depth / 2, np.pi / 2)]
    c, v = np.cos(turn), np.sin(turn)
    for px, py, facing in places:
        if rng.random() < 0.15:
            continue
        seat, away = alike(rng, style, lambda: seats.chair(m, wood, cloth)), m.uniform(0.28, 0.5)
        away = m.uniform(0.5, 0.75) if rng.random() < 0.15 else away
        # Step back against the chair's own +y so that the seat's front reaches under the table.
        lx, ly = px - away * -np.sin(facing), py - away * np.cos(facing)
        wx, wy = x + c * lx - v * ly, y + v * lx + c * ly
        plan.put(seat, wx, wy, 0.0, turn + facing + rng.normal(0, 0.08), ignore=number)
    return True


def hang(plan: Plan):
    """Pictures at eye height, mirrors, whiteboards, shelves, towels, clocks, coats and radiators."""
    m, rng, kind = plan.materials, plan.materials.rng, plan.kind
    wanted: list[tuple[Maker, float, float, float]] = []  # maker, chance, lowest and highest lower edge
    if kind in ("office", "classroom"):
        wanted += [(shell.whiteboard, 0.75 if kind == "office" else 1.0, 0.85, 1.0), (wares.clock, 0.5, 1.9, 2.1)]
        wanted += [(small.paper_pinned, 0.6, 1.2, 1.6)] * 4
    if kind == "bathroom":
        wanted += [
            (shell.mirror, 1.0, 1.1, 1.25),
            (small.towel, 0.9, 0.7, 1.0),
            (small.towel, 0.5, 0.7, 1.0),
            (fix.towel_board, 0.4, 1.3, 1.5),
        ]
    elif kind != "classroom":
        wanted += [(shell.mirror, 0.3, 1.0, 1.3), (big.wall_shelf, 0.35, 1.3, 1.6), (small.garment, 0.25, 0.8, 1.0)]
    if kind == "kitchen":
        wanted += [(small.towel, 0.5, 0.8, 1.0), (wares.clock, 0.5, 1.8, 2.0)]
    wanted += [(shell.picture, 0.8, 1.15, 1.5)] * int(rng.integers(0, 2) if kind == "bathroom" else rng.integers(2, 8))
    for maker, chance, low, high in wanted:
        if rng.random() < chance:
            plan.on_wall(maker(m), "wall", z=m.uniform(low, high), tries=10)
    if kind in ("bedroom", "living room") and rng.random() < 0.3:
        plan.on_wall(shell.mirror(m, low=True), "wall", z=0.02, tries=8)
    if rng.random() < 0.35:
        plan.on_wall(shell.radiator(m), "wall", tries=8)
    if rng.random() < 0.08:
        plan.on_wall(shell.column(m, plan.height - 0.015), "corner", tries=6)


def clutter(plan: Plan, density: float):
    """Things left on the floor, near the walls or about."""
    m, rng = plan.materials, plan.materials.rng
    makers, size = ON_FLOOR[plan.kind], plan.points.max(0)
    for _ in range(rng.binomial(13, 0.3 + 0.6 * density)):
        thing = makers[rng.integers(len(makers))](m)
        crowd(m, thing, 0.4)
        if rng.random() < 0.7:
            plan.on_wall(thing, "wall", gap=m.uniform(0.0, 0.12), tries=6)
        else:
            x, y = rng.uniform(0.4, size - 0.4)
            plan.put(thing, x, y, 0, rng.uniform(0, 6.28))


def ceiling(plan: Plan):
    """Ceiling lights: bright enough when there is no daylight."""
    m, rng = plan.materials, plan.materials.rng
    office = plan.kind in ("office", "classroom")
    day = any(light.radius == 0 for light in plan.world.lights)
    on = not day or rng.random() < 0.55
    strength = m.uniform(1.2, 2.8) if on else 0.0
    cells = sorted(shell.rectangles(plan.points), key=lambda r: -(r[1] - r[0]) * (r[3] - r[2]))
    x0, x1, y0, y1 = cells[0]
    count = (2, 1) if office or max(x1 - x0, y1 - y0) > 5 else (1, 1)
    thing = shell.ceiling_light(m, strength / (count[0] * count[1]), office)
    for i in range(count[0]):
        x = x0 + (x1 - x0) * (i + 0.5) / count[0]
        low, high = placed_bounds(thing, x, (y0 + y1) / 2, plan.height - 0.001, 0)
        if x1 - x0 > 1 and all(not ((a < high).all() and (b > low).all()) for a, b in plan.boxes):
            plan.put(thing, x, (y0 + y1) / 2, plan.height - 0.001, 0, check=False)
    if on and not any(isinstance(light, Light) for light in plan.world.lights):
        plan.put(thing, (x0 + x1) / 2 + 0.01, (y0 + y1) / 2, plan.height - 0.001, 0, check=False)


__all__ = ["ROOMS", "Plan", "arrange"]
