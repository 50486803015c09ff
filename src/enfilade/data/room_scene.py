"""A room as arrays of triangles ready for ray casting, and the choice of a camera in it.

The world frame: Z up, the floor at z = 0, the origin on the floor right below the camera, walls along the axes, and the
camera looking within 45 degrees of +Y. That is the frame of the SSCNet files.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import no_type_check

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numba import njit

from enfilade.camera import Camera
from enfilade.data import room_layout as layout
from enfilade.data import room_shell as shell

# The RGB camera of NYUv2's Kinect at 640x480.
KINECT = Camera(518.8579, 519.4696, 325.5824, 253.7362, 640, 480)


@dataclass(frozen=True)
class Scene:
    """Triangles with their material, object and texture coordinates; lights; and the tracer that holds them."""

    kind: str
    vertices: np.ndarray  # (n, 3) float32, world
    faces: np.ndarray  # (m, 3) int32
    texture: np.ndarray  # (n, 3) float32, metres in the part's own frame
    normals: np.ndarray  # (m, 3, 3) float32, at the corners, smoothed over edges below 40 degrees
    face_material: np.ndarray  # (m,) int32
    face_object: np.ndarray  # (m,) int32
    object_labels: np.ndarray  # (k,) uint8, NYU-40
    part_faces: np.ndarray  # (p + 1,) first face of each part
    part_closed: np.ndarray  # (p,) bool
    materials: np.ndarray  # (r, columns of room_materials) float32
    lights: np.ndarray  # (l, 16) float32: centre, u, v, power, radius, direction to the sun
    plan: np.ndarray  # (c, 2) corners of the floor
    height: float
    camera: Camera | None = None
    tracer: EmbreeScene | None = None
    threads: int = 2

    def cast(self, origins, directions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Nearest hits of rays: face (-1: none), u, v, and distance in units of the direction's length. Traced in
        threads: embreex lets go of the interpreter lock."""
        tracer = self.tracer
        assert tracer is not None

        def run(part):
            hit = tracer.run(origins[part], directions[part], query="INTERSECT", output=True)
            return hit["primID"], hit["u"], hit["v"], hit["tfar"]

        columns = zip(*in_threads(run, split(len(origins), self.threads)), strict=True)
        face, u, v, t = (np.concatenate(column) for column in columns)
        return face, u, v, t


def split(n: int, threads: int) -> list[slice]:
    """Equal runs of 0..n, one for each thread; a small job stays whole."""
    threads = threads if n > 4096 else 1
    edges = np.linspace(0, n, threads + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def in_threads(work: Callable, items: list) -> list:
    """Results of `work` for each item. The pool lives only as long as the call: one that outlived a fork would hang."""
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


@njit(cache=True, nogil=True)
@no_type_check
def _corner_normals(vertices, faces, cosine):
    """Normals at the corners of each face: the area-weighted mean over the faces around the vertex that lie within an
    angle of this one, so that curved surfaces look smooth and edges stay sharp."""
    m, n = len(faces), len(vertices)
    area = np.empty((m, 3), np.float32)
    unit = np.empty((m, 3), np.float32)
    count = np.zeros(n + 1, np.int64)
    for f in range(m):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        vx, vy, vz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        area[f, 0], area[f, 1], area[f, 2] = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = np.sqrt(area[f, 0] ** 2 + area[f, 1] ** 2 + area[f, 2] ** 2) + 1e-20
        for k in range(3):
            unit[f, k] = area[f, k] / length
            count[faces[f, k] + 1] += 1
    start = np.cumsum(count)
    fill = start[:-1].copy()
    around = np.empty(3 * m, np.int32)
    for f in range(m):
        for k in range(3):
            around[fill[faces[f, k]]] = f
            fill[faces[f, k]] += 1
    out = np.empty((m, 3, 3), np.float32)
    for f in range(m):
        for k in range(3):
            x, y, z = 0.0, 0.0, 0.0
            v = faces[f, k]
            for g in around[start[v] : start[v + 1]]:
                if unit[f, 0] * unit[g, 0] + unit[f, 1] * unit[g, 1] + unit[f, 2] * unit[g, 2] > cosine:
                    x, y, z = x + area[g, 0], y + area[g, 1], z + area[g, 2]
            length = np.sqrt(x * x + y * y + z * z)
            if length > 0:
                out[f, k, 0], out[f, k, 1], out[f, k, 2] = x / length, y / length, z / length
            else:
                out[f, k] = unit[f]
    return out


def assemble(plan: layout.Plan) -> Scene:
    """Arrays of a plan, still in the room's own frame and without a camera."""
    world = plan.world
    solids = [part.solid.textured() for part in world.parts]
    sizes = np.array([len(s.vertices) for s in solids])
    counts = np.array([len(s.faces) for s in solids])
    offsets = np.repeat(np.cumsum(sizes) - sizes, counts)
    faces = np.concatenate([s.faces for s in solids]) + offsets[:, None]
    lights = sorted(world.lights, key=lambda light: -float(light.power.sum()) * (1 + 9 * (light.sun is not None)))[:5]
    rows = [
        [
            *light.centre,
            *light.u,
            *light.v,
            *light.power,
            light.radius,
            *(np.zeros(3) if light.sun is None else light.sun),
        ]
        for light in lights
    ]
    return Scene(
        kind=plan.kind,
        vertices=np.concatenate([s.vertices for s in solids]).astype(np.float32),
        faces=np.ascontiguousarray(faces, np.int32),
        texture=np.concatenate([np.asarray(s.texture) for s in solids]).astype(np.float32),
        normals=np.zeros((0, 3, 3), np.float32),
        face_material=np.repeat([part.material for part in world.parts], counts).astype(np.int32),
        face_object=np.repeat([part.item for part in world.parts], counts).astype(np.int32),
        object_labels=np.array(world.labels, np.uint8),
        part_faces=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        part_closed=np.array([part.closed for part in world.parts]),
        materials=plan.materials.table,
        lights=np.array(rows, np.float32).reshape(-1, 16),
        plan=plan.points,
        height=plan.height,
    )


def with_tracer(scene: Scene) -> Scene:
    tracer = EmbreeScene()
    TriangleMesh(tracer, scene.vertices, scene.faces)
    tracer.run(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32))  # builds the tree, once, before threads
    return replace(scene, tracer=tracer)


def moved(scene: Scene, quarter_turns: int, shift) -> Scene:
    """The scene shifted on the floor, then turned about z by quarters."""
    c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns % 4]
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], float)
    shift = np.array([*shift, 0.0])
    lights = scene.lights.copy()
    lights[:, :3] = (lights[:, :3] + shift) @ turn.T
    for k in (3, 6, 13):
        lights[:, k : k + 3] = lights[:, k : k + 3] @ turn.T
    vertices = ((scene.vertices + shift) @ turn.T).astype(np.float32)
    plan = (scene.plan + shift[:2]) @ turn[:2, :2].T
    return replace(scene, vertices=vertices, lights=lights, plan=plan, tracer=None)


def intrinsics(width: int, height: int) -> Camera:
    """The Kinect's, scaled to cover the asked size; another shape than 4:3 cuts its middle out."""
    scale = max(width / KINECT.width, height / KINECT.height)
    full = KINECT.resized(round(KINECT.width * scale), round(KINECT.height * scale))
    return full.cropped((full.width - width) // 2, (full.height - height) // 2, width, height)


def look(yaw: float, pitch: float, roll: float, position) -> np.ndarray:
    """Camera-to-world pose: yaw from +Y towards -X, pitch upwards, roll clockwise; radians."""
    forward = np.array([-np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = c * right + s * down, c * down - s * right, forward, position
    return pose


def choose_camera(scene: Scene, boxes, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Stand somewhere free and look at the content: of some tries the pose that sees the most objects well, at a
    person's height, with nothing big right before the lens. Returns the pose in the room frame, its yaw and score."""
    small = intrinsics(28, 21)
    rays = small.rays().reshape(-1, 3)
    low, high = scene.plan.min(0), scene.plan.max(0)
    blocked = [(a, b) for a, b in boxes if a[2] < 1.75 and b[2] > 0.3]
    best, best_score, tries = None, -np.inf, 0
    for attempt in range(400):
        clear = 0.3 if attempt < 250 else 0.12
        # People stand back to take a picture: positions near the walls are commoner.
        where = low + (high - low) * rng.beta(0.8, 0.8, 2)
        height = rng.uniform(1.25, 1.7)
        around = where + clear * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        if not shell.inside(scene.plan, around).all():
            continue
        if any(((a[:2] - clear < where) & (where < b[:2] + clear)).all() for a, b in blocked):
            continue
        aim = low + (high - low) * rng.uniform(0.2, 0.8, 2) - where
        if np.linalg.norm(aim) < 0.8:
            continue
        yaw = np.arctan2(-aim[0], aim[1])
        pitch = np.radians(np.clip(rng.normal(-14, 6), -25, 5))
        pose = look(yaw, pitch, np.radians(rng.normal(0, 1.2)), np.array([*where, height]))
        directions = (rays @ pose[:3, :3].T).astype(np.float32)
        origins = np.broadcast_to(pose[:3, 3].astype(np.float32), directions.shape).copy()
        face, _, _, depth = scene.cast(origins, directions)
        if (face < 0).any():
            continue
        objects = scene.face_object[face]
        labels = scene.object_labels[objects]
        seen, share = np.unique(objects, return_counts=True)
        share = share / len(face)
        solid = ~np.isin(scene.object_labels[seen], (0, 1, 21))
        kinds = np.unique(labels)
        near = np.quantile(depth, 0.04)
        score = (
            len(kinds)
            + 0.35 * (share[solid] > 0.004).sum()
            + 10 * min(near - 0.9, 0)
            + 1.5 * min(np.median(depth) - 2.2, 0.5)
        )
        furniture = ~np.isin(labels, (0, 1, 7, 8, 10, 21))
        score += 6 * min(furniture.mean(), 0.6)
        score -= 25 * max(share[solid].max(initial=0) - 0.27, 0) + 10 * max(np.isin(labels, (0, 1, 21)).mean() - 0.4, 0)
        tries += 1
        if score > best_score:
            best, best_score = (pose, yaw), score
        if tries >= 32:
            break
    if best is None:
        middle = scene.plan.mean(0)
        yaw = rng.uniform(-np.pi, np.pi)
        best = (look(yaw, -0.2, 0.0, np.array([*middle, 1.6])), yaw)
    return best[0], float(best[1]), float(best_score)


def build(seed: int, width: int = 640, height: int = 480, kind: str | None = None, threads: int = 2) -> Scene:
    """The room of a seed with its camera, ready to render. Room and camera do not depend on the image size."""
    rng = np.random.default_rng([seed, 0x726F6F6D])
    best: tuple[float, Scene, np.ndarray, float] | None = None
    for _ in range(3):  # a room with no good view is built anew
        plan = layout.arrange(rng, kind)
        scene = replace(with_tracer(assemble(plan)), threads=threads)
        pose, yaw, score = choose_camera(scene, plan.boxes, rng)
        if best is None or score > best[0]:
            best = (score, scene, pose, yaw)
        if score > 6:
            break
    assert best is not None
    _, scene, pose, yaw = best
    quarters = -round(yaw / (np.pi / 2))
    scene = moved(scene, quarters, -pose[:2, 3])
    turn = quarters * np.pi / 2
    c, s = np.cos(turn), np.sin(turn)
    pose = np.block([[np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ pose[:3, :3], np.zeros((3, 1))], [np.eye(4)[3]]])
    pose[2, 3] = best[2][2, 3]
    scene = with_tracer(scene)
    normals = _corner_normals(scene.vertices, scene.faces, np.cos(np.radians(40)))
    return replace(scene, normals=normals, camera=replace(intrinsics(width, height), pose=pose))
