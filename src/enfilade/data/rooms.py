"""Procedural rooms: furnished, lit and ray-cast on the fly. Endless, exact, nothing to download.

`room(seed)` gives RGB, labels (NYU-40), depth, instances, normals, the camera with its pose and, if asked, the
completed volume (SSC-12). `Rooms` is a data set of them. The work is done next door: `room_layout` furnishes with the
makers of `room_furniture`, `room_seats`, `room_fixtures`, `room_objects`, `room_wares` and `room_shell`; `room_scene`
puts the camera, `room_render` makes the picture, `room_voxels` the volume.

World frame: Z up, the floor at z = 0, the origin on the floor right below the camera, the walls along X and Y, the
camera looking within 45 degrees of +Y. This is the frame of the SSCNet files.
"""

import numpy as np
from jaxtyping import Float32

from enfilade import labels
from enfilade.camera import Camera
from enfilade.data import room_render, room_scene, room_voxels
from enfilade.types import Sample

BASELINE = 0.075  # metres between the Kinect's projector and its infrared camera
STEP = 1 / 8  # pixels of disparity the Kinect resolves


def room(
    seed: int, *, width: int = 640, height: int = 480, voxels: bool = False, noise: bool = False, threads: int = 2
) -> Sample:
    """The room of `seed`, always the same for the same arguments (`threads` changes nothing but the time).

    Labels are NYU-40 (0..39, nothing is ignored); depth is exact, in metres along the optical axis, or with `noise`
    as a Kinect would give it (see `kinect_noise`; 0 where it sees nothing). Instances number the objects of the room;
    each wall, each opening and each book is one. The intrinsics are those of NYUv2's camera, scaled to the size.
    """
    if seed < 0:
        raise ValueError(f"a room's seed must be 0 or more, not {seed}")
    if width < 8 or height < 8:
        raise ValueError(f"a room's picture must be at least 8x8 pixels, not {width}x{height}")
    scene = room_scene.build(seed, width, height, threads=threads)
    frame = room_render.render(scene, np.random.default_rng([seed, 1]))
    depth = frame.depth
    if noise:
        assert scene.camera is not None
        depth = kinect_noise(depth, scene.camera, frame.normals, np.random.default_rng([seed, 2]))
    return Sample(
        image=frame.image,
        name=f"room{seed:08d}",
        labels=frame.labels,
        depth=depth,
        camera=scene.camera,
        instances=frame.instances,
        normals=frame.normals,
        voxels=room_voxels.voxelise(scene) if voxels else None,
    )


class Rooms:
    """`length` rooms as a map-style data set; item i is `room(seed + i)` with its labels in `space`."""

    name, ignored, score_crop = "rooms", (), None

    def __init__(
        self,
        length: int,
        seed: int = 0,
        width: int = 640,
        height: int = 480,
        voxels: bool = False,
        noise: bool = False,
        space: str = "nyu40",
    ):
        if length < 1 or seed < 0:
            raise ValueError(f"Rooms needs a length of at least 1 and a seed of at least 0, not {length} and {seed}")
        self.length, self.seed, self.width, self.height = length, seed, width, height
        self.voxels, self.noise = voxels, noise
        self.space = labels.get(space)
        self._table = None if space == "nyu40" else labels.mapping("nyu40", space)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"room{self.seed + i:08d}" for i in range(self.length))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"room {index} of {self.length}")
        seed = self.seed + index % self.length
        sample = room(seed, width=self.width, height=self.height, voxels=self.voxels, noise=self.noise)
        if self._table is None or sample.labels is None:
            return sample
        return sample.replace(labels=self._table[sample.labels])


def kinect_noise(
    depth: Float32[np.ndarray, "h w"],
    camera: Camera,
    normals: Float32[np.ndarray, "h w 3"],
    rng: np.random.Generator,
) -> Float32[np.ndarray, "h w"]:
    """Depth as a structured-light sensor of the first Kinect's kind would measure it; 0 where it measures nothing.

    * Disparity d = f b / z is measured in steps of 1/8 pixel, so that depth comes in steps of z^2 / (8 f b)
      (Khoshelham and Elberink 2012, Sec. 3). Before rounding, the disparity gets Gaussian noise of a sixth of a step,
      and the pixel is looked up at a place shifted by a normal offset of half a pixel, which moves edges (the
      simulation of Handa et al. 2014, after Barron and Malik 2013).
    * Holes: where the projector, `BASELINE` to one side, is hidden by something nearer (the shadow on one side of each
      edge); on surfaces turned away by more than about 80 degrees; nearer than 0.5 m and farther than 8 m; at depth
      edges; and on some small patches, as dark or shiny things leave.

    f scales with the picture, so the shadow's width and the steps stay those of the 640x480 sensor.
    """
    height, width = depth.shape
    scale = width / room_scene.KINECT.width
    fb = room_scene.KINECT.fx * BASELINE  # in pixels of the full sensor, whose steps do not depend on our size
    v, u = np.mgrid[:height, :width]
    shift = rng.normal(0, 0.5 * scale, (2, height, width))
    row = np.clip(np.rint(v + shift[0]), 0, height - 1).astype(int)
    column = np.clip(np.rint(u + shift[1]), 0, width - 1).astype(int)
    jittered = depth[row, column]
    disparity = fb / np.maximum(jittered, 1e-3)
    disparity = np.rint((disparity + rng.normal(0, STEP / 6, depth.shape)) / STEP) * STEP
    result = (fb / np.maximum(disparity, STEP)).astype(np.float32)

    hole = projector_shadow(depth, camera)
    padded = np.pad(depth, 1, mode="edge")
    around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    near, far = np.minimum.reduce(around), np.maximum.reduce(around)
    edge = (far - near > 0.05 + 0.03 * depth) & (rng.random(depth.shape) < 0.35)
    rays = camera.rays()
    cosine = -(normals * rays).sum(-1) / np.linalg.norm(rays, axis=-1)
    grazing = cosine < np.cos(np.radians(80)) + rng.normal(0, 0.02, depth.shape)
    limit = (depth < 0.5) | (depth > 8.0 + rng.normal(0, 0.1, depth.shape))
    hole |= edge | grazing | limit
    for _ in range(int(rng.poisson(4))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        a, b = rng.uniform(2, 9, 2) * scale * 2
        inside = ((u - x) / a) ** 2 + ((v - y) / b) ** 2 < 1
        hole |= inside & (rng.random(depth.shape) < 0.8)
    result[hole] = 0
    return result


def projector_shadow(depth: Float32[np.ndarray, "h w"], camera: Camera) -> np.ndarray:
    """Pixels that the projector, to the right of the camera, cannot see: a point at column u stands at u - f b / z in
    the projector's picture, and is hidden if one from further right, hence nearer, stands left of it there."""
    place = np.arange(depth.shape[1]) - camera.fx * BASELINE / np.maximum(depth, 1e-3)
    ahead = np.minimum.accumulate(place[:, ::-1], 1)[:, ::-1]
    return place > ahead + 0.5


__all__ = ["BASELINE", "STEP", "Rooms", "kinect_noise", "projector_shadow", "room"]
