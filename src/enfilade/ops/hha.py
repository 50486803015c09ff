"""HHA: depth as three image channels, horizontal disparity, height above the floor, angle with gravity.

* Gupta, Girshick, Arbelaez, Malik: Learning rich features from RGB-D images for object detection and segmentation,
  ECCV 2014 (the encoding, Section 2.1)
* Gupta, Arbelaez, Malik: Perceptual organization and recognition of indoor scenes from RGB-D images, CVPR 2013 (the
  direction of gravity, Section 3)

Camera frame as in `camera`: x right, y down, z forward. Normals face the camera.
"""

from typing import no_type_check

import cv2
import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8
from numba import njit

from enfilade.camera import Camera

DOWN = (0.0, 1.0, 0.0)  # gravity for a camera that is held level


def normals(depth: Float[np.ndarray, "h w"], camera: Camera, radius: int = 3) -> Float32[np.ndarray, "h w 3"]:
    """Unit surface normals facing the camera, from a plane fitted to each (2 * radius + 1)^2 window of pixels.

    `depth` in metres. A plane n . X = 1 is linear in the image: 1 / z = n . (x, y, 1) with the ray (x, y, 1), so each
    window is one least-squares fit to inverse depth, which also weighs near points, the more exact ones, higher. All
    known pixels of the window count equally; across a depth edge the fit therefore tilts, as in the released HHA.

    The normal is 0 where the depth is unknown (not finite or not above 0) and where the known pixels of the window lie
    on one line. Raises ValueError where the camera is of another size."""
    if depth.shape != (camera.height, camera.width):
        raise ValueError(f"depth is {depth.shape[1]}x{depth.shape[0]}, its camera {camera.width}x{camera.height}")
    known = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1.0, depth, out=np.zeros(depth.shape), where=known)

    # Moments of the window about its own centre: nothing large cancels, and those of `known` are whole numbers.
    step = np.arange(-radius, radius + 1.0)
    one = np.ones_like(step)

    def moment(image, along_u, along_v):
        return cv2.sepFilter2D(image, cv2.CV_64F, along_u, along_v, borderType=cv2.BORDER_CONSTANT)

    weight = known.astype(np.float64)
    n, u, v = moment(weight, one, one), moment(weight, step, one), moment(weight, one, step)
    uu, uv, vv = moment(weight, step * step, one), moment(weight, step, step), moment(weight, one, step * step)
    q, uq, vq = moment(inverse, one, one), moment(inverse, step, one), moment(inverse, one, step)

    # Normal equations of 1 / z = a * du + b * dv + c by cofactors, left undivided: only the direction matters.
    c11, c12, c13 = vv * n - v * v, u * v - uv * n, uv * v - vv * u
    c22, c23, c33 = uu * n - u * u, u * uv - uu * v, uu * vv - uv * uv
    a = c11 * uq + c12 * vq + c13 * q
    b = c12 * uq + c22 * vq + c23 * q
    c = c13 * uq + c23 * vq + c33 * q
    # A determinant of whole numbers is a whole number: below 1 it is 0.
    known &= uu * c11 + uv * c12 + u * c13 > 0.5

    # From pixel steps to the ray: du = fx * (x - x0), dv = fy * (y - y0).
    x = (np.arange(camera.width) - camera.cx)[None]
    y = (np.arange(camera.height) - camera.cy)[:, None]
    plane = np.stack([a * camera.fx, b * camera.fy, c - a * x - b * y], -1)
    # n . ray = c at the centre, the fitted inverse depth: where it is positive n points away from the camera.
    length = np.linalg.norm(plane, axis=-1) * np.where(c < 0, 1.0, -1.0)
    known &= length != 0
    return np.divide(plane, length[..., None], out=np.zeros_like(plane), where=known[..., None]).astype(np.float32)


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _scatter(vectors, down, cosine, sine):
    """Sum of n n^T over vectors across `down`, less that over vectors along it; zero vectors are skipped."""
    total = np.zeros((3, 3))
    for i in range(len(vectors)):
        x, y, z = np.float64(vectors[i, 0]), np.float64(vectors[i, 1]), np.float64(vectors[i, 2])
        if x == 0 and y == 0 and z == 0:
            continue
        along = abs(x * down[0] + y * down[1] + z * down[2])
        sign = (1.0 if along < sine else 0.0) - (1.0 if along > cosine else 0.0)
        total[0, 0] += sign * x * x
        total[0, 1] += sign * x * y
        total[0, 2] += sign * x * z
        total[1, 1] += sign * y * y
        total[1, 2] += sign * y * z
        total[2, 2] += sign * z * z
    return total


def gravity(
    depth: Float[np.ndarray, "h w"], camera: Camera, start: Float[np.ndarray, "3"] | None = None
) -> Float64[np.ndarray, "3"]:
    """The unit vector in which things fall, in the camera frame, from one depth map (Gupta et al. 2013, Section 3).

    Rooms have surfaces along and across gravity: from `start` (the camera's y axis) normals within 45, then 15 degrees
    of being parallel or perpendicular to the estimate are collected, and the direction most parallel to the first and
    most perpendicular to the second, an eigenvector, replaces it; five times each. A camera rolled or pitched by more
    than 45 degrees needs a better `start`. Without any normal `start` is returned.

    On the ten frames with millimetre depth it lies 0.2-1.4 degrees from the official gravity of NYUv2
    (`pytest tests/test_hha.py -k official -s`)."""
    down = np.array(DOWN) if start is None else start / np.linalg.norm(start)
    vectors = normals(depth, camera, radius=10).reshape(-1, 3)  # wide windows: only the large surfaces matter
    for degrees in (45.0, 15.0):
        for _ in range(5):
            total = _scatter(vectors, down, np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
            if not total.any():
                break
            best = np.linalg.eigh(total, UPLO="U")[1][:, 0]
            best = -best if best @ down < 0 else best
            settled, down = np.array_equal(best, down), best
            if settled:
                break
    return down


_estimate = gravity  # `hha` has an argument of that name


def hha(
    depth: Float[np.ndarray, "h w"], camera: Camera, gravity: Float[np.ndarray, "3"] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """The HHA encoding of a depth map in metres, in this channel order:

    0. disparity 31000 / max(z, 100) with z in cm: 310 divided by the depth in metres, nothing nearer than one metre;
    1. height above the lowest point in cm, along gravity; where no point is 90 cm below the camera the floor is out
       of view and the camera is taken to be 130 cm above it;
    2. the angle in degrees between gravity and the normal turned away from the camera, plus 38: 38 is a floor, 128 a
       wall, 218 a ceiling.

    Each is rounded and clipped to 0..255. `gravity` points down in the camera frame and is estimated when not given.
    For NYUv2 the rotation r of the official toolbox file (rows of x right, y forward, z up) gives
    `gravity = (-r[2, 0], r[2, 2], -r[2, 1])`.

    Unknown depth is (0, 0, 0), which no known pixel can be, since its angle is at least 38. A known pixel with too few
    neighbours to have a normal gets 128.

    Against the ten reference images at hand: mean absolute difference per frame .01-.05 in disparity, .01-.05 in
    height, .12-.48 in angle, of 255 levels (`pytest tests/test_hha.py -k reference -s`). The test shows this to be the
    size of error that depth stored in whole millimetres causes. The references were not made with the intrinsics of the
    NYUv2 camera: their heights and angles follow from a camera matrix equal to 1000 times the frame's *rotation* in
    the file of gravity rotations, hence focal lengths near 1000 and a centre near the top-left corner. Only with that
    camera do they come out; with the true one the heights are true and differ from theirs by 22-72 levels."""
    if gravity is None:
        down = _estimate(depth, camera)
    else:
        down = gravity / np.linalg.norm(gravity)
    known = np.isfinite(depth) & (depth > 0)
    encoded = np.zeros((*depth.shape, 3))
    encoded[..., 0] = 310 / np.maximum(np.where(known, depth, 1), 1)

    height = -100 * (camera.rays() @ down) * depth
    lowest = height.min(where=known, initial=np.inf)
    encoded[..., 1] = height - (lowest if lowest <= -90 else -130)

    encoded[..., 2] = np.degrees(np.arccos(np.clip(normals(depth, camera) @ -down, -1, 1))) + 38
    encoded[~known] = 0
    return np.clip(np.rint(encoded), 0, 255).astype(np.uint8)
