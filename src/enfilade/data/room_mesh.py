"""Triangle solids that furniture is built of, and `Thing`, an object made of labelled parts.

Metres, Z up. A thing has its back on the plane y = 0 and faces +y, standing on z = 0 with x = 0 in its middle, so that
it can be set against a wall. Every solid is a closed surface with outward normals (the voxeliser counts crossings),
and carries texture coordinates: its own metres with its longest axis first, so that wood grain runs along a plank.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from enfilade import labels

NYU40 = {name: i for i, name in enumerate(labels.get("nyu40").names)}


class Solid(NamedTuple):
    """A closed triangle surface. `texture` are the texture coordinates of the vertices, or None for the default."""

    vertices: np.ndarray  # (n, 3)
    faces: np.ndarray  # (m, 3)
    texture: np.ndarray | None = None

    def turned(self, x=0.0, y=0.0, z=0.0, about=(0.0, 0.0, 0.0)) -> "Solid":
        """Rotated by angles in radians about the x, then the y, then the z axis through the point `about`."""
        about = np.asarray(about, float)
        texture = self.textured().texture
        return Solid((self.vertices - about) @ rotation(x, y, z).T + about, self.faces, texture)

    def moved(self, x=0.0, y=0.0, z=0.0) -> "Solid":
        return Solid(self.vertices + np.array([x, y, z]), self.faces, self.textured().texture)

    def textured(self) -> "Solid":
        """With texture coordinates: metres from its middle, the longest side along the first axis."""
        if self.texture is not None:
            return self
        low, high = self.vertices.min(0), self.vertices.max(0)
        order = np.argsort(-(high - low), kind="stable")
        return self._replace(texture=(self.vertices - (low + high) / 2)[:, order])


def rotation(x=0.0, y=0.0, z=0.0) -> np.ndarray:
    """The 3x3 rotation about x, then y, then z (radians)."""
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


_HEXA = np.array(
    [[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7], [0, 1, 5], [0, 5, 4], [1, 2, 6], [1, 6, 5], [2, 3, 7], [2, 7, 6],
     [3, 0, 4], [3, 4, 7]]
)  # fmt: skip


def hexa(bottom, top) -> Solid:
    """Six-sided solid from two counter-clockwise quadrilaterals, (4, 3) each: tapered legs, slanted panels."""
    return Solid(np.concatenate([np.asarray(bottom, float), np.asarray(top, float)]), _HEXA)


def box(x0, x1, y0, y1, z0, z1, bevel=0.0) -> Solid:
    """An axis-aligned box; `bevel` cuts its edges by that many metres."""
    if bevel <= 0:
        bottom = [(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)]
        return hexa(bottom, [(x, y, z1) for x, y, _ in bottom])
    b = min(bevel, 0.49 * min(x1 - x0, y1 - y0, z1 - z0))
    # Four rings of eight vertices: the small bottom, the full girth twice, the small top.
    vertices, rings = [], []
    for z, inset in ((z0, b), (z0 + b, 0.0), (z1 - b, 0.0), (z1, b)):
        a0, a1, c0, c1 = x0 + inset, x1 - inset, y0 + inset, y1 - inset
        k = b if inset == 0 else b * 0.5
        ring = [(a0 + k, c0), (a1 - k, c0), (a1, c0 + k), (a1, c1 - k), (a1 - k, c1), (a0 + k, c1), (a0, c1 - k),
                (a0, c0 + k)]  # fmt: skip
        rings.append(len(vertices))
        vertices += [(x, y, z) for x, y in ring]
    return Solid(np.array(vertices, float), _ring_faces(8, 4))


@cache
def _ring_faces(n, rings, closed=False) -> np.ndarray:
    """Faces of stacked rings of n vertices, with fans on both ends, or joined end to end. The result is
    shared: do not write to it."""
    i = np.arange(n)
    j = (i + 1) % n
    faces = []
    for r in range(rings if closed else rings - 1):
        lower, upper = r * n, ((r + 1) % rings) * n
        faces.append(np.stack([lower + i, lower + j, upper + j], 1))
        faces.append(np.stack([lower + i, upper + j, upper + i], 1))
    if not closed:
        fan = np.arange(1, n - 1)
        faces.append(np.stack([0 * fan, fan + 1, fan], 1))
        last = (rings - 1) * n
        faces.append(np.stack([last + 0 * fan, last + fan, last + fan + 1], 1))
    return np.concatenate(faces)


def lathe(profile, x=0.0, y=0.0, z=0.0, n=16, closed: bool = False) -> Solid:
    """Surface of revolution of (radius, height) pairs going upwards on the outside. The ends are capped; `closed`
    joins the last pair to the first instead, which gives a pipe or a lampshade with a wall."""
    profile = np.asarray(profile, float)
    angle = np.arange(n) * 2 * np.pi / n
    radius = np.maximum(profile[:, 0], 1e-4)[:, None]
    vertices = np.stack(
        [
            x + radius * np.cos(angle),
            y + radius * np.sin(angle),
            z + np.broadcast_to(profile[:, 1:], (len(profile), n)),
        ],
        -1,
    ).reshape(-1, 3)
    return Solid(vertices, _ring_faces(n, len(profile), closed))


def cylinder(x, y, z0, z1, r0, r1=None, n=14) -> Solid:
    return lathe([(r0, z0), (r0 if r1 is None else r1, z1)], x, y, 0.0, n)


def tube(points, radius, n=8) -> Solid:
    """A round bar along a polyline (k, 3); `radius` is a number or one for each point."""
    points = np.asarray(points, float)
    radius = np.broadcast_to(np.asarray(radius, float), len(points))
    tangent = np.gradient(points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    # One reference for the whole path keeps the rings from twisting.
    spread = np.abs(tangent).max(0)
    side = np.cross(tangent, np.eye(3)[int(np.argmin(spread))])
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    up = np.cross(tangent, side)
    angle = np.arange(n) * 2 * np.pi / n
    ring = np.cos(angle)[:, None] * side[:, None] + np.sin(angle)[:, None] * up[:, None]
    return Solid((points[:, None] + radius[:, None, None] * ring).reshape(-1, 3), _ring_faces(n, len(points)))


def ellipsoid(x, y, z, rx, ry, rz, n=14, rings=9, power=1.0) -> Solid:
    """An ellipsoid; `power` < 1 makes it boxy (a superquadric: cushions, mattresses)."""

    def signed(v):
        return np.sign(v) * np.abs(v) ** power

    angle = (np.arange(n) + 0.5) * 2 * np.pi / n
    rise = np.linspace(-np.pi / 2 + 1e-3, np.pi / 2 - 1e-3, rings)
    girth = signed(np.cos(rise))[:, None]
    vertices = np.stack(
        [
            x + rx * girth * signed(np.cos(angle)),
            y + ry * girth * signed(np.sin(angle)),
            z + rz * np.broadcast_to(signed(np.sin(rise))[:, None], (rings, n)),
        ],
        -1,
    )
    return Solid(vertices.reshape(-1, 3), _ring_faces(n, rings))


def cushion(x0, x1, y0, y1, z0, z1, power=0.35) -> Solid:
    """A soft box."""
    half = (x1 - x0) / 2, (y1 - y0) / 2, (z1 - z0) / 2
    return ellipsoid((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2, *half, n=24, rings=12, power=power)


def prism(outline, z0, z1) -> Solid:
    """A counter-clockwise outline (n, 2), star-shaped about its first vertex or convex, drawn up from z0 to z1."""
    outline = np.asarray(outline, float)
    ring = [np.concatenate([outline, np.full((len(outline), 1), z)], 1) for z in (z0, z1)]
    return Solid(np.concatenate(ring), _ring_faces(len(outline), 2))


def sheet(surface, thickness, texture=None) -> Solid:
    """A slab below a grid of points (r, c, 3), drawn down its own normals: cloth, curtains, blankets. The grid's
    normal, rows x columns turned by the right hand (columns first), points out of the visible side."""
    surface = np.asarray(surface, float)
    rows, columns = surface.shape[:2]
    normal = np.cross(np.gradient(surface, axis=1), np.gradient(surface, axis=0))
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    back = surface - thickness * normal
    index = np.arange(rows * columns).reshape(rows, columns)

    def quads(a, b, c, d):
        a, b, c, d = (q.ravel() for q in (a, b, c, d))
        return np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])

    front = quads(index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1])
    count = rows * columns
    edge = np.concatenate([index[0], index[1:, -1], index[-1, -2::-1], index[-2:0:-1, 0]])
    after = np.roll(edge, -1)
    rim = np.concatenate([np.stack([after, edge, edge + count], 1), np.stack([after, edge + count, after + count], 1)])
    faces = np.concatenate([front, front[:, ::-1] + count, rim])
    if texture is not None:
        flat = np.asarray(texture, float).reshape(-1, 3)
        texture = np.concatenate([flat, flat])
    return Solid(np.concatenate([surface.reshape(-1, 3), back.reshape(-1, 3)]), faces, texture)


@dataclass(frozen=True)
class Light:
    """A one-sided rectangle (`radius` 0) spanning centre +- u +- v and shining along u x v, or a glowing ball, which
    shines up and down more than sideways, as a shaded lamp does. `power` is its radiant flux over pi, linear RGB.
    `sun` is the direction to the sun for light that only parallel rays through the rectangle bring."""

    centre: np.ndarray
    u: np.ndarray
    v: np.ndarray
    power: np.ndarray
    radius: float = 0.0
    sun: np.ndarray | None = None

    def moved(self, matrix, shift) -> "Light":
        sun = None if self.sun is None else matrix @ self.sun
        return Light(matrix @ self.centre + shift, matrix @ self.u, matrix @ self.v, self.power, self.radius, sun)


@dataclass
class Part:
    solid: Solid
    material: int
    item: int
    closed: bool = True


@dataclass
class Top:
    """A level rectangle on which small things can stand, with free height above it."""

    x0: float
    x1: float
    y0: float
    y1: float
    z: float
    height: float = 1.0
    use: str = "any"


@dataclass
class Thing:
    """Labelled items, each of several solid parts, that are placed together (a shelf and its books)."""

    labels: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)
    lights: list = field(default_factory=list)

    @classmethod
    def of(cls, label: str) -> "Thing":
        return cls([NYU40[label]])

    def item(self, label: str) -> "Thing":
        """Later parts belong to a new object."""
        self.labels.append(NYU40[label])
        return self

    def add(self, material: int, *solids: Solid, item=None, closed: bool = True) -> "Thing":
        where = len(self.labels) - 1 if item is None else item
        self.parts += [Part(solid, material, where, closed) for solid in solids]
        return self

    def include(self, other: "Thing", x=0.0, y=0.0, z=0.0, turn=0.0) -> "Thing":
        """Put another thing's items beside ours, turned about z, then moved."""
        offset = len(self.labels)
        self.labels += other.labels
        matrix, shift = rotation(z=turn), np.array([x, y, z])
        for part in other.parts:
            solid = part.solid.textured()
            moved = solid._replace(vertices=solid.vertices @ matrix.T + shift)
            self.parts.append(Part(moved, part.material, part.item + offset, part.closed))
        self.lights += [light.moved(matrix, shift) for light in other.lights]
        return self

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.min([part.solid.vertices.min(0) for part in self.parts], 0),
            np.max([part.solid.vertices.max(0) for part in self.parts], 0),
        )
