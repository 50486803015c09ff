"""The room while it is filled: its plan, what stands in it, and which space is taken."""

from dataclasses import dataclass, field

import numpy as np

from enfilade.data import room_shell as shell
from enfilade.data.room_materials import Materials
from enfilade.data.room_mesh import Thing, rotation


@dataclass
class Plan:
    """The room while it is filled. `boxes` are the axis-aligned boxes, (low, high), already taken."""

    kind: str
    materials: Materials
    points: np.ndarray
    height: float
    walls: list[shell.Wall]
    world: Thing = field(default_factory=Thing)
    boxes: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def free(self, low, high, ignore: int | None = None) -> bool:
        """Whether the box lies in the room and cuts no other; `ignore` is the number of one box not to mind."""
        e = 0.004
        corners = np.array([(x, y) for x in (low[0] + e, high[0] - e) for y in (low[1] + e, high[1] - e)])
        within = (self.points > low[:2] + e).all(1) & (self.points < high[:2] - e).all(1)
        if not shell.inside(self.points, corners).all() or within.any() or high[2] > self.height - 0.01:
            return False
        # Things stand on rugs, which are thinner than 2 cm, but a rug goes under nothing.
        above, below = np.array([-e, -e, 0.01]), np.array([e, e, 0.02 if high[2] - low[2] > 0.03 else 0.0])
        for k, (a, b) in enumerate(self.boxes):
            if k != ignore and (a < high + above).all() and (b > low + below).all():
                return False
        return True

    def put(self, thing: Thing, x, y, z=0.0, turn=0.0, ignore: int | None = None, check=True, take=True) -> int | None:
        """Place a thing if there is room; returns the number of its box."""
        low, high = placed_bounds(thing, x, y, z, turn)
        if check and not self.free(low, high, ignore):
            return None
        self.world.include(thing, x, y, z, turn)
        if take:
            self.boxes.append((low, high))
        return len(self.boxes) - 1

    def on_wall(
        self, thing: Thing, where="wall", z=0.0, gap=0.0, tries=14, wall=None
    ) -> tuple[shell.Wall, float, int] | None:
        """Set a thing against some wall; returns the wall, the place along it and the number of its box."""
        rng = self.materials.rng
        low, high = thing.bounds
        weights = np.array([max(w.length - (high[0] - low[0]), 0.0) for w in self.walls])
        if weights.sum() <= 0:
            return None
        for _ in range(tries):
            w = self.walls[rng.choice(len(self.walls), p=weights / weights.sum())] if wall is None else wall
            room = w.length / 2 - np.array([-low[0], high[0]]) - 0.02
            if room.sum() < 0:
                continue
            if where == "middle":
                s = float(np.clip(rng.normal(0, 0.12 * w.length), -room[0], room[1]))
            elif where == "corner":
                s = float(rng.choice([-room[0] + rng.exponential(0.06), room[1] - rng.exponential(0.06)]))
                s = float(np.clip(s, -room[0], room[1]))
            else:
                s = rng.uniform(-room[0], room[1])
            x, y = local_to_room(w, s, gap + 0.016 - low[1] if z == 0 else gap - low[1])
            number = self.put(thing, x, y, z, w.turn)
            if number is not None:
                return w, s, number
        return None


def placed_bounds(thing: Thing, x, y, z, turn) -> tuple[np.ndarray, np.ndarray]:
    low, high = thing.bounds
    corners = np.array([(a, b) for a in (low[0], high[0]) for b in (low[1], high[1])]) @ rotation(z=turn)[:2, :2].T
    return np.array([*(corners.min(0) + np.array([x, y])), low[2] + z]), np.array(
        [*(corners.max(0) + np.array([x, y])), high[2] + z]
    )


def local_to_room(wall: shell.Wall, s, out) -> tuple[float, float]:
    """The room point at `s` along the wall from its middle and `out` from it."""
    c, v = np.cos(wall.turn), np.sin(wall.turn)
    return float(wall.middle[0] + c * s - v * out), float(wall.middle[1] + v * s + c * out)
