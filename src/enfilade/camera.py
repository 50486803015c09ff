"""The pinhole camera. Every geometric convention of the library is stated here, once.

* Camera frame: x right, y down, z forward (OpenCV). Depth is z, in metres.
* Pixel (u, v) counts columns and rows; the centre of the top-left pixel is (0, 0), so an image of width w spans
  [-0.5, w - 0.5]. A 3-D point falls on the pixel `round(fx * x / z + cx)`.
* `pose` is camera-to-world, 4x4, row major. World frames have Z up wherever gravity is known.
* Resizing an image by s maps u to (u + 0.5) * s - 0.5, which is what OpenCV and PyTorch (align_corners=False) do.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Camera:
    """Intrinsics in pixels of an image of `width` x `height`, and an optional camera-to-world `pose`."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    pose: Float[np.ndarray, "4 4"] | None = None

    def __post_init__(self):
        if not (self.fx > 0 and self.fy > 0 and self.width > 0 and self.height > 0):
            raise ValueError(f"a camera needs positive focal lengths and size, not {self}")

    @classmethod
    def from_fov(cls, width: int, height: int, fov_degrees: float = 60.0, pose=None) -> "Camera":
        """A centred camera of the given *horizontal* field of view."""
        f = 0.5 * width / np.tan(np.radians(fov_degrees) / 2)
        return cls(float(f), float(f), (width - 1) / 2, (height - 1) / 2, width, height, pose)

    @property
    def matrix(self) -> Float[np.ndarray, "3 3"]:
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]])

    @property
    def fov_degrees(self) -> float:
        """Horizontal field of view."""
        return float(np.degrees(2 * np.arctan(0.5 * self.width / self.fx)))

    def warped(self, affine: Float[np.ndarray, "2 3"], width: int, height: int) -> "Camera":
        """The camera of the image `warpAffine(image, affine, (width, height))`, for affine maps that scale and shift
        along the axes. A mirrored axis leaves fx positive and mirrors the pose instead, so that world points stay
        true: the camera frame is then left-handed, and a second flip restores it."""
        sx, sy = affine[0, 0], affine[1, 1]
        if abs(affine[0, 1]) > 1e-9 or abs(affine[1, 0]) > 1e-9:
            raise ValueError("a pinhole camera without skew cannot follow a rotating or shearing warp")
        pose = None if self.pose is None else self.pose @ np.diag([np.sign(sx), np.sign(sy), 1.0, 1.0])
        return Camera(
            float(abs(sx) * self.fx),
            float(abs(sy) * self.fy),
            float(sx * self.cx + affine[0, 2]),
            float(sy * self.cy + affine[1, 2]),
            width,
            height,
            pose,
        )

    def resized(self, width: int, height: int) -> "Camera":
        """The camera after resizing its image to `width` x `height`."""
        sx, sy = width / self.width, height / self.height
        affine = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5]])
        return self.warped(affine, width, height)

    def cropped(self, left: int, top: int, width: int, height: int) -> "Camera":
        return replace(self, cx=self.cx - left, cy=self.cy - top, width=width, height=height)

    def flipped(self) -> "Camera":
        """The camera after a horizontal mirror of its image."""
        return self.warped(np.array([[-1.0, 0, self.width - 1], [0, 1.0, 0]]), self.width, self.height)

    def rays(self) -> Float[np.ndarray, "h w 3"]:
        """The direction of each pixel in the camera frame, scaled to z = 1: depth times ray is the point."""
        u, v = np.arange(self.width), np.arange(self.height)
        x = np.broadcast_to((u - self.cx) / self.fx, (self.height, self.width))
        y = np.broadcast_to(((v - self.cy) / self.fy)[:, None], (self.height, self.width))
        return np.stack([x, y, np.ones_like(x)], -1)

    def unproject(self, depth: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
        """Points in the camera frame, metres."""
        if depth.shape != (self.height, self.width):
            raise ValueError(f"depth is {depth.shape[1]}x{depth.shape[0]}, its camera {self.width}x{self.height}")
        return (self.rays() * depth[..., None]).astype(np.float32)

    def project(self, points: Float[np.ndarray, "*n 3"]) -> tuple[Float[np.ndarray, "*n 2"], Float[np.ndarray, "*n"]]:
        """Pixel coordinates (u, v) and depths of points in the camera frame; behind the camera they are NaN."""
        z = points[..., 2]
        safe = np.where(z > 0, z, np.nan)
        uv = points[..., :2] / safe[..., None] * [self.fx, self.fy] + [self.cx, self.cy]
        return uv, z

    def to_world(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        if self.pose is None:
            raise ValueError("this camera has no pose: give one to move points to the world frame")
        return points @ self.pose[:3, :3].T + self.pose[:3, 3]

    def to_camera(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        if self.pose is None:
            raise ValueError("this camera has no pose: give one to move points to the camera frame")
        inverse = np.linalg.inv(self.pose)
        return points @ inverse[:3, :3].T + inverse[:3, 3]
