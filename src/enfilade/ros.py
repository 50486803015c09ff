"""Predictions as files in the conventions of ROS 2: REP 103 (frames and units), REP 118 (depth images), and the
messages `sensor_msgs/CameraInfo` and `vision_msgs/LabelInfo`.

The library's camera frame is an optical frame of REP 103: z forward, x right, y down, metres. Its pixels count from the
centre of the top-left one, as image_geometry's do. So nothing is turned or shifted, only named as ROS names it.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32

from enfilade import images, labels
from enfilade.camera import Camera
from enfilade.labels import LabelSpace
from enfilade.types import Prediction

FRAME = "camera_optical_frame"


def save_ros(prediction: Prediction, folder: str | Path, stem: str, *, frame_id: str = FRAME) -> list[str]:
    """Write what a ROS 2 user needs beside `<stem>.labels.png` (mono8) and `<stem>.depth.png` (16UC1), which are as ROS
    has them already. Each file is whole or not there; the paths are returned.

    * `<stem>.depth.tiff`: 32FC1, metres, NaN where unknown (`depth_32fc1`). TIFF, because OpenCV, Pillow and image
      viewers read its floats, and `data.frames` too.
    * `<stem>.camera_info.json`: `camera_info`. JSON is YAML, so that `ros2 topic pub` takes it as it is.
    * `<stem>.camera_info.yaml`: `camera_yaml`, for camera_info_manager and image_proc.
    * `<stem>.label_info.json`: `label_info`.

    What the prediction lacks is left out. Raises UserError for an unwritable folder.
    """
    folder = images.make_folder(folder)
    written: list[str] = []

    def write(ending: str, data: bytes) -> None:
        written.append(str(folder / f"{stem}.{ending}"))
        images.write_atomic(written[-1], data)

    if prediction.depth is not None:
        _, data = cv2.imencode(".tiff", depth_32fc1(prediction.depth))
        write("depth.tiff", data.tobytes())
    if prediction.camera is not None:
        info = camera_info(prediction.camera, frame_id=frame_id)
        write("camera_info.json", (json.dumps(info, indent=1) + "\n").encode())
        write("camera_info.yaml", camera_yaml(prediction.camera).encode())
    if prediction.labels is not None:
        info = label_info(labels.get(prediction.space), frame_id=frame_id)
        write("label_info.json", (json.dumps(info, indent=1) + "\n").encode())
    return written


def depth_32fc1(depth: Float[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """REP 118's canonical depth image: metres along the optical axis, NaN where they are unknown, which the library
    writes as 0. ROS keeps the infinities for what is too near or too far to measure, which a network never says."""
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float32)


def camera_info(camera: Camera, *, frame_id: str = FRAME) -> dict[str, Any]:
    """The fields of `sensor_msgs/CameraInfo`, for images without distortion (plumb_bob, all zeros): `k` is the camera's
    matrix, `r` the identity, `p` is `k` beside a column of zeros. The stamp is 0: the publisher sets it."""
    return {
        "header": {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": frame_id},
        "height": camera.height,
        "width": camera.width,
        "distortion_model": "plumb_bob",
        **_matrices(camera),
        "binning_x": 0,
        "binning_y": 0,
        "roi": {"x_offset": 0, "y_offset": 0, "height": 0, "width": 0, "do_rectify": False},
    }


def _matrices(camera: Camera) -> dict[str, list[float]]:
    k = camera.matrix.astype(float)
    p = np.concatenate([k, np.zeros((3, 1))], 1)
    return {"d": [0.0] * 5, "k": k.flatten().tolist(), "r": np.eye(3).flatten().tolist(), "p": p.flatten().tolist()}


def camera_yaml(camera: Camera, *, name: str = "camera") -> str:
    """The same as a calibration file of camera_calibration_parsers, which camera_info_manager loads by its URL."""
    matrices = _matrices(camera)

    def matrix(key: str, values: list[float], rows: int) -> str:
        # Plain decimals: YAML 1.1 takes 1e-05 for a word
        numbers = ", ".join(f"{value:.9f}" for value in values)
        return f"{key}:\n  rows: {rows}\n  cols: {len(values) // rows}\n  data: [{numbers}]\n"

    return (
        f"image_width: {camera.width}\nimage_height: {camera.height}\ncamera_name: {name}\n"
        + matrix("camera_matrix", matrices["k"], 3)
        + "distortion_model: plumb_bob\n"
        + matrix("distortion_coefficients", matrices["d"], 1)
        + matrix("rectification_matrix", matrices["r"], 3)
        + matrix("projection_matrix", matrices["p"], 3)
    )


def label_info(space: LabelSpace, *, frame_id: str = FRAME) -> dict[str, Any]:
    """The fields of `vision_msgs/LabelInfo`: the class of each number in a mono8 label image; 255 is no class."""
    return {
        "header": {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": frame_id},
        "class_map": [{"class_id": k, "class_name": name} for k, name in enumerate(space.names)],
        "threshold": 0.0,
    }
