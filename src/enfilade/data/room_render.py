"""Ray-cast pictures of a `Scene`: exact geometry at the pixel centres, and light from several area lights with soft
shadows, one bounce of indirect light (which is also the ambient occlusion), reflections, and a small camera model.

Light is sampled at half resolution with a pattern that repeats every 4x4 pixels, smoothed over that pattern along
surfaces only (Wald et al. 2002, interleaved sampling), and carried to every pixel by a joint bilateral upsampling
(Kopf et al. 2007) guided by position and normal. Pixels that find no neighbour on their own surface are sampled alone.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import cv2
import numpy as np

from enfilade.data import room_light as loops
from enfilade.data.room_materials import EMIT, REFLECT
from enfilade.data.room_scene import Scene, in_threads, split


@dataclass
class Frame:
    image: np.ndarray  # (h, w, 3) float32 sRGB
    depth: np.ndarray  # (h, w) float32 metres
    labels: np.ndarray  # (h, w) uint8 NYU-40
    instances: np.ndarray  # (h, w) int32
    normals: np.ndarray  # (h, w, 3) float32, camera frame
    seconds: dict[str, float]


class _Surface:
    """What rays hit, as flat arrays."""

    def __init__(self, scene: Scene, origin, direction, spread: float, texture=True):
        self.face, u, v, self.t = scene.cast(origin, direction)
        n = len(self.face)
        self.point, self.flat, self.normal, self.albedo = (np.empty((n, 3), np.float32) for _ in range(4))
        self.material = scene.face_material[np.maximum(self.face, 0)]

        def run(s):
            loops.surface(self.face[s], u[s], v[s], self.t[s], origin[s], direction[s], spread, scene.vertices,
            scene.faces,
                     scene.texture, scene.normals, scene.face_material, scene.materials, self.point[s], self.flat[s],
                     self.normal[s], self.albedo[s], texture)  # fmt: skip

        in_threads(run, split(n, scene.threads))


def _ambient(scene: Scene) -> np.ndarray:
    """Irradiance left after the first bounces if all light were spread evenly over the room."""
    low, high = scene.plan.min(0), scene.plan.max(0)
    w, d = high - low
    surface = 2 * w * d + 2 * scene.height * (w + d)
    total = np.zeros(3)
    for light in scene.lights:
        area = np.linalg.norm(np.cross(light[3:6], light[6:9])) * 4 if light[13:16].any() else math.pi
        total += light[9:12] * area * (0.3 if light[13:16].any() else 1.0)
    return (0.65 * total / surface + 0.003).astype(np.float32)


def _visibility(scene: Scene, index, width, first: _Surface, samples: int = 1) -> np.ndarray:
    """How much of each light the chosen pixels see, (n, lights)."""
    n, seen, tracer = len(index), np.ones((len(index), len(scene.lights)), np.float32), scene.tracer
    assert tracer is not None
    for k, light in enumerate(scene.lights):
        for s in range(samples):

            def run(part, light=light, s=s, k=k):
                m = part.stop - part.start
                origin, direction = np.empty((m, 3), np.float32), np.empty((m, 3), np.float32)
                far, which = np.empty(m, np.float32), np.empty(m, np.int32)
                count = loops.shadow_rays(index[part], width, first.point, first.flat, first.normal, light,
                16 * s + 3 * k, origin,
                                     direction, far, which)  # fmt: skip
                out = far[:count] < 0  # the sun beside the window
                live = np.flatnonzero(~out)
                hit = tracer.run(origin[live], direction[live], far[live], query="OCCLUDED") >= 0
                out[live] = hit
                seen[part.start + which[:count][out], k] -= 1.0 / samples

            in_threads(run, split(n, scene.threads))
    return seen


def _indirect(scene: Scene, index, width, first: _Surface, ambient) -> np.ndarray:
    """Light from other surfaces, (n, 3): each hit is taken to be lit by all lights in its view and by the ambient."""
    total = np.zeros((len(index), 3), np.float32)
    for s in range(loops.BOUNCES):
        origin, direction = np.empty((len(index), 3), np.float32), np.empty((len(index), 3), np.float32)
        loops.bounce_rays(index, width, first.flat, first.normal, first.point, s, origin, direction)
        total += _radiosity(scene, _Surface(scene, origin, direction, 0.0, texture=False), ambient, near=True)
    return total / loops.BOUNCES


def _radiosity(scene: Scene, hit: _Surface, ambient, near: bool) -> np.ndarray:
    """pi times the radiance of surfaces, without shadows but darker in direct light, which some of them do not get."""
    n = len(hit.face)
    direct, seen = np.empty((n, 3), np.float32), np.ones((n, len(scene.lights)), np.float32)
    for k, light in enumerate(scene.lights):
        seen[:, k] = 0.03 if light[13:16].any() else 0.55
    in_threads(
        lambda s: loops.direct(hit.point[s], hit.normal[s], scene.lights, 1, seen[s], direct[s]),
        split(n, scene.threads),
    )
    light = direct + ambient
    if near:
        light *= (hit.t / (hit.t + 0.25))[:, None]
    emit = scene.materials[hit.material, EMIT]
    # Lamps and panes are lights already; screens are not.
    glow = np.where(near & (emit > 0.6), 0.0, emit)
    result = hit.albedo * (light + math.pi * glow[:, None])
    result[hit.face < 0] = ambient
    return result


def render(scene: Scene, rng: np.random.Generator) -> Frame:
    """The picture, and the exact maps at the pixel centres. `rng` draws the camera's exposure, balance and noise."""
    camera, seconds, clock = scene.camera, {}, perf_counter()
    assert camera is not None
    assert camera.pose is not None
    width, height = camera.width, camera.height

    def lap(name):
        nonlocal clock
        now = perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - clock
        clock = now

    rotation, eye = camera.pose[:3, :3], camera.pose[:3, 3].astype(np.float32)
    rays = camera.rays().reshape(-1, 3)
    direction = (rays @ rotation.T).astype(np.float32)
    origin = np.broadcast_to(eye, direction.shape).copy()
    spread = 1 / camera.fx
    first = _Surface(scene, origin, direction, spread)
    objects = scene.face_object[first.face]
    lap("trace")

    rows = np.arange(0, height, 2)[:, None] * width + np.arange(0, width, 2)
    index = rows.ravel().astype(np.int64)
    ambient = _ambient(scene)
    seen = _visibility(scene, index, width, first)
    lap("shadows")
    indirect = _indirect(scene, index, width, first, ambient)
    lap("bounce")
    lights = len(scene.lights)
    values = np.concatenate([seen, indirect], 1).reshape(*rows.shape, lights + 3).astype(np.float32)
    for step in (1, 2):
        target = np.empty_like(values)
        in_threads(lambda s, v=values, t=target, step=step: loops.smooth(v, step, width, height,
        (s.start, s.stop), first.point, first.normal, t),
                   _bands(rows.shape[0], scene.threads))  # fmt: skip
        if step == 2:  # the wider pass would wash out contact shadows of the lights
            target[..., :lights] = 0.5 * target[..., :lights] + 0.5 * values[..., :lights]
        values = target
    full = np.empty((width * height, lights + 3), np.float32)
    lonely = np.zeros(width * height, bool)
    in_threads(
        lambda s: loops.upsample(values, width, height, (s.start, s.stop), first.point, first.normal, full, lonely),
        _bands(height, scene.threads),
    )
    alone = np.flatnonzero(lonely)
    if len(alone):
        full[alone] = np.concatenate(
            [_visibility(scene, alone, width, first, 2), _indirect(scene, alone, width, first, ambient)], 1
        )
    lap("filter")

    colour, light, gloss = (np.empty((width * height, 3), np.float32) for _ in range(3))
    seen, indirect = np.ascontiguousarray(full[:, :lights]), np.ascontiguousarray(full[:, lights:])

    def compose(part):
        loops.compose((part.start, part.stop), eye, first.point, first.normal, first.albedo, first.material,
                      scene.materials, scene.lights, seen, indirect, colour, light, gloss)  # fmt: skip

    in_threads(compose, split(width * height, scene.threads))
    _reflections(scene, first, direction, ambient, colour, gloss)
    lap("shade")

    edge = np.zeros(width * height, bool)
    loops.edges(width, height, objects, first.material, first.normal, first.point, edge)
    pixel = np.flatnonzero(edge)
    total = colour[pixel].copy()
    for dx, dy in ((-0.32, -0.18), (0.3, -0.3), (0.06, 0.36)):
        shifted = (rays[pixel] + [dx / camera.fx, dy / camera.fy, 0]) @ rotation.T
        sample = _Surface(scene, origin[pixel], shifted.astype(np.float32), spread)
        out = np.empty((len(pixel), 3), np.float32)
        loops.lend(
            pixel,
            width,
            height,
            sample.point,
            sample.normal,
            sample.albedo,
            sample.material,
            scene.materials,
            first.point,
            first.normal,
            light,
            colour,
            first.material,
            gloss,
            out,
        )
        total += out
    # Lights are far brighter than white: clip before the mean, or their edges stay jagged.
    smooth = colour.copy()
    smooth[pixel] = total / 4
    lap("edges")

    image = develop(
        smooth.reshape(height, width, 3), (scene.materials[first.material, EMIT] > 0).reshape(height, width), rng
    )
    lap("camera")
    normals = (first.flat @ rotation).reshape(height, width, 3).astype(np.float32)
    shape = (height, width)
    return Frame(
        image,
        first.t.reshape(shape),
        scene.object_labels[objects].reshape(shape),
        objects.reshape(shape),
        normals,
        seconds,
    )


def _bands(rows: int, threads: int) -> list[slice]:
    edges = np.linspace(0, rows, threads + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def _reflections(scene: Scene, first: _Surface, direction, ambient, colour, gloss):
    """One mirror ray where the material is glossy, weighted by Schlick's Fresnel term; only true mirrors show the
    patterns of what they reflect."""
    base = scene.materials[first.material, REFLECT]
    for chosen, mirror in ((base > 0.1, True), ((base > 0.025) & (base <= 0.1), False)):
        glossy = np.flatnonzero(chosen)
        if len(glossy) == 0:
            continue
        normal, incoming, share = first.normal[glossy], direction[glossy], base[glossy, None]
        incoming = incoming / np.sqrt((incoming * incoming).sum(1, keepdims=True))
        cosine = np.clip(-(normal * incoming).sum(1, keepdims=True), 0, 1)
        outgoing = np.ascontiguousarray(incoming + 2 * cosine * normal, np.float32)
        hit = _Surface(scene, first.point[glossy] + 0.002 * first.flat[glossy], outgoing, 0.004, texture=mirror)
        strength = share + (1 - share) * (1 - cosine) ** 5 * np.minimum(share * 4, 1)
        radiance = _radiosity(scene, hit, ambient, near=False) / math.pi
        added = strength * (np.minimum(radiance, 3.0) - colour[glossy] * 0.6)
        colour[glossy] = np.maximum(colour[glossy] + added, 0)
        gloss[glossy] += added


def develop(radiance: np.ndarray, glowing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure on what does not glow, white balance, vignetting, a filmic curve, sRGB, slight blur and sensor noise."""
    height, width = radiance.shape[:2]
    luminance = radiance @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    metered = luminance[~glowing] if (~glowing).any() else luminance
    key = np.exp(np.log(metered + 1e-4).mean())
    middle = float(rng.uniform(0.09, 0.28))
    # A camera's own balance leaves part of the light's colour.
    mean = radiance[~glowing].mean(0) + 1e-6 if (~glowing).any() else np.ones(3, np.float32)
    balance = (mean.mean() / mean) ** float(rng.uniform(0.3, 0.8)) * np.exp(rng.normal(0, 0.035, 3))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    r2 = ((x / (width - 1) - 0.5) ** 2 + (y / (height - 1) - 0.5) ** 2) * 2
    vignette = 1 - float(rng.uniform(0.02, 0.22)) * r2
    exposed = radiance * (balance * middle / key).astype(np.float32) * vignette[..., None]
    # Reinhard's curve with a white point, which keeps shadows linear.
    white = float(rng.uniform(2.0, 3.5))
    toned = exposed * (1 + exposed / white**2) / (1 + exposed)
    toned = np.clip(toned * float(rng.uniform(1.15, 1.3)), 0, 1)
    toned = toned + float(rng.uniform(0.2, 0.8)) * toned * (1 - toned) * (toned - 0.22)  # contrast
    grey = toned.mean(2, keepdims=True)
    toned = np.clip(grey + (toned - grey) * float(rng.uniform(0.85, 1.15)), 0, 1)
    image = np.where(toned < 0.0031308, 12.92 * toned, 1.055 * np.maximum(toned, 1e-8) ** (1 / 2.4) - 0.055).astype(
        np.float32
    )
    blur = float(rng.uniform(0.0, 0.6)) * width / 640
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    level = float(rng.uniform(0.003, 0.014))
    noise = (
        rng.standard_normal((height, width, 3), dtype=np.float32)
        * level
        * (0.6 + 0.8 * np.sqrt(np.maximum(1 - image, 0)))
    )
    return np.clip(image + noise, 0, 1).astype(np.float32)
