"""ROS 2 files against other readers of the same formats, and the guide's node against stand-ins for ROS."""

import json
import re
import sys
from array import array
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import cv2
import numpy as np
import PIL.Image
import pytest

import enfilade
from enfilade import labels, options, outputs, viz
from enfilade.camera import Camera
from enfilade.data.frames import Frames
from enfilade.errors import UserError
from enfilade.ros import camera_info, camera_yaml, depth_32fc1, label_info, save_ros
from enfilade.types import Prediction

HEIGHT, WIDTH = 24, 32
CAMERA = Camera(30.25, 31.5, 16.75, 1e-6, WIDTH, HEIGHT)


def prediction(**changes) -> Prediction:
    rng = np.random.default_rng(0)
    depth = (1 + rng.random((HEIGHT, WIDTH))).astype(np.float32)
    depth[:4, :4], depth[6, 6], depth[7, 7] = 0, np.nan, np.inf
    fields = {
        "image": rng.random((HEIGHT, WIDTH, 3), np.float32),
        "labels": rng.integers(0, 13, (HEIGHT, WIDTH)).astype(np.uint8),
        "depth": depth,
        "camera": CAMERA,
        "space": "nyu13",
        "name": "photo",
    }
    return Prediction(**fields | changes)


def known(p: Prediction) -> np.ndarray:
    return np.isfinite(p.depth) & (p.depth > 0)


# --- files ------------------------------------------------------------------------------------------------------------


def test_depth_is_metres_with_nan(tmp_path):
    """As Pillow reads it, as OpenCV does, and as our own reader of frames does."""
    p = prediction()
    written = save_ros(p, tmp_path / "depth", "a")
    path = tmp_path / "depth/a.depth.tiff"
    assert str(path) in written
    for stored in (np.asarray(PIL.Image.open(path)), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)):
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(stored), ~known(p))
        np.testing.assert_array_equal(stored[known(p)], p.depth[known(p)])
    for other in (tmp_path / "depth").iterdir():
        other.rename(other.with_name("a.tiff") if other == path else tmp_path / other.name)
    (tmp_path / "rgb").mkdir()
    cv2.imwrite(str(tmp_path / "rgb/a.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    np.testing.assert_array_equal(Frames(tmp_path)[0].depth, np.where(known(p), p.depth, 0))


def test_the_camera_frame_is_the_optical_frame():
    """A point by the formula of depth_image_proc is ours, and its projection by p of image_geometry is its pixel."""
    p = prediction()
    info = camera_info(p.camera)
    k, projection = np.reshape(info["k"], (3, 3)), np.reshape(info["p"], (3, 4))
    depth = depth_32fc1(p.depth)
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    xyz = np.stack([(u - k[0, 2]) * depth / k[0, 0], (v - k[1, 2]) * depth / k[1, 1], depth], -1)
    ours, _ = viz.points(p, drop_flying=False)
    np.testing.assert_allclose(xyz[known(p)], ours, rtol=1e-5, atol=1e-6)
    hom = np.concatenate([xyz[known(p)], np.ones((known(p).sum(), 1))], 1) @ projection.T
    np.testing.assert_allclose(hom[:, :2] / hom[:, 2:], np.stack([u, v], -1)[known(p)], atol=1e-4)
    np.testing.assert_array_equal(np.reshape(info["r"], (3, 3)), np.eye(3))
    assert info["distortion_model"] == "plumb_bob"
    assert info["d"] == [0] * 5
    assert (info["width"], info["height"]) == (WIDTH, HEIGHT)


def test_messages_have_the_fields_of_ros(tmp_path):
    """The fields of sensor_msgs/CameraInfo and vision_msgs/LabelInfo, of which ROS refuses others."""
    save_ros(prediction(), tmp_path, "a", frame_id="left_optical_frame")
    info = json.loads((tmp_path / "a.camera_info.json").read_text())
    assert info == camera_info(CAMERA, frame_id="left_optical_frame")
    sizes = {"d": 5, "k": 9, "r": 9, "p": 12}
    assert {name: len(info[name]) for name in sizes} == sizes
    assert set(info) == {"header", "height", "width", "distortion_model", "binning_x", "binning_y", "roi", *sizes}
    assert set(info["roi"]) == {"x_offset", "y_offset", "height", "width", "do_rectify"}
    told = json.loads((tmp_path / "a.label_info.json").read_text())
    assert set(told) == {"header", "class_map", "threshold"}
    for message in (info, told):
        assert message["header"] == {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": "left_optical_frame"}
    space = labels.get("nyu13")
    assert told["class_map"] == [{"class_id": space.index(name), "class_name": name} for name in space.names]
    assert label_info(space)["header"]["frame_id"].endswith("_optical_frame")


def test_calibration_file():
    """Read by a YAML reader: numbers, also where they are tiny, and the same as in the message."""
    yaml = pytest.importorskip("yaml")
    told, info = yaml.safe_load(camera_yaml(CAMERA, name="left")), camera_info(CAMERA)
    assert (told["image_width"], told["image_height"], told["camera_name"]) == (WIDTH, HEIGHT, "left")
    assert told["distortion_model"] == "plumb_bob"
    named = {
        "camera_matrix": ("k", 3, 3),
        "distortion_coefficients": ("d", 1, 5),
        "rectification_matrix": ("r", 3, 3),
        "projection_matrix": ("p", 3, 4),
    }
    for name, (field, rows, columns) in named.items():
        assert (told[name]["rows"], told[name]["cols"]) == (rows, columns)
        assert all(isinstance(value, float) for value in told[name]["data"])
        np.testing.assert_allclose(told[name]["data"], info[field], atol=1e-9)
    assert len(told) == 8


def test_ros_is_written_where_it_is_asked_for(tmp_path):
    p = prediction()
    usual = p.save(tmp_path / "usual")
    assert not [path for path in usual if "tiff" in path or "info" in path]
    asked = p.save(tmp_path / "asked", files=("labels", "ros"))
    names = ["labels.png", "depth.tiff", "camera_info.json", "camera_info.yaml", "label_info.json"]
    assert [Path(path).name for path in asked] == [f"photo.{name}" for name in names]
    assert sorted(asked) == sorted(str(path) for path in (tmp_path / "asked").iterdir())
    assert prediction(labels=None, depth=None, camera=None).save(tmp_path / "none", files=("ros",)) == []
    with pytest.raises(UserError, match=r"no such output 'rso': choose among labels, .*, ros$"):
        p.save(tmp_path, files=("rso",))
    assert get_args(options.Kind) == outputs.KINDS
    assert set(outputs.KINDS) - set(outputs.FILES) == {"ros"}
    # a later run over the folder must not take the depth for a photo
    assert "photo.depth.tiff".endswith(outputs.PICTURES)


# --- the guide's node -------------------------------------------------------------------------------------------------


class Message(SimpleNamespace):
    """Fields as they are set; a typed array stays one, as rclpy keeps it."""

    FLOAT32 = 7


class StandIn:
    """Of rclpy.node.Node: what it was asked for, and what it said."""

    def __init__(self, name):
        self.name, self.parameters, self.topics, self.said = name, {}, {}, []

    def declare_parameter(self, name, value):
        self.parameters[name] = value

    def get_parameter(self, name):
        return SimpleNamespace(value=self.parameters[name])

    def create_publisher(self, kind, topic, depth):
        sent = []
        self.topics[topic] = sent
        return SimpleNamespace(publish=sent.append)

    def create_subscription(self, kind, topic, callback, qos):
        assert qos.depth == 1
        self.topics[topic] = callback

    def get_logger(self):
        def say(text, throttle_duration_sec):
            self.said.append(text)

        return SimpleNamespace(warning=say, error=say)


class Known:
    """A model whose answer is known; keeps what it was given."""

    def __init__(self, answer):
        self.answer, self.seen = answer, []

    def predict(self, rgb, camera):
        if (camera.width, camera.height) != rgb.shape[1::-1]:
            raise UserError("the camera is of another size")
        self.seen.append((rgb, camera))
        return self.answer


@pytest.fixture
def page(monkeypatch):
    """The guide's Python, with stand-ins for ROS: its names, and the model that it loads."""
    guide = Path(__file__).parents[1] / "docs" / "ros2.md"
    (text,) = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    modules = {
        name: ModuleType(name) for name in ("rclpy", "rclpy.node", "rclpy.qos", "sensor_msgs", "sensor_msgs.msg")
    }
    modules["rclpy.node"].Node = StandIn
    modules["rclpy.qos"].QoSProfile = lambda **fields: SimpleNamespace(**fields)
    modules["rclpy.qos"].ReliabilityPolicy = SimpleNamespace(BEST_EFFORT=2)
    for name in ("CameraInfo", "Image", "PointCloud2", "PointField"):
        setattr(modules["sensor_msgs.msg"], name, Message)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    model = Known(prediction())
    monkeypatch.setattr(enfilade, "load", lambda name: model)
    names = {"__name__": "guide", "model": model}
    exec(compile(text, str(guide), "exec"), names)
    return SimpleNamespace(**names)


def image_message(array_, encoding, *, padding=0, big=False):
    """A message of rows with so many bytes more than they need."""
    array_ = array_ if array_.ndim == 3 else array_[..., None]
    if array_.dtype == np.uint16:
        array_ = array_.astype(">u2" if big else "<u2")
    rows = np.frombuffer(array_.tobytes(), np.uint8).reshape(len(array_), -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    header = SimpleNamespace(stamp=(12, 34), frame_id="left_optical_frame")
    return Message(
        header=header,
        height=array_.shape[0],
        width=array_.shape[1],
        encoding=encoding,
        is_bigendian=int(big),
        step=rows.shape[1],
        data=array("B", rows.tobytes()),
    )


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "rgb16", "bgr16", "mono16"])
def test_the_node_reads_every_encoding(page, encoding, big, padding):
    kind = np.uint16 if encoding.endswith("16") else np.uint8
    rgb = np.random.default_rng(1).integers(0, np.iinfo(kind).max, (5, 7, 3)).astype(kind)
    if encoding.startswith("mono"):
        rgb[...] = rgb[..., :1]
    stored = {"r": rgb, "b": rgb[..., ::-1], "m": rgb[..., 0]}[encoding[0]]
    if "a" in encoding:
        stored = np.concatenate([stored, np.full((5, 7, 1), 9, kind)], -1)
    read = page.rgb_of(image_message(stored, encoding, padding=padding, big=big))
    assert read.dtype == kind
    np.testing.assert_array_equal(read, rgb)
    enfilade.images.read(read)  # as `predict` will


def test_the_node_answers_an_image(page):
    node = page.EnfiladeNode()
    rgb = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    message = image_message(rgb[..., ::-1], "bgr8", padding=4)
    node.topics["image"](message)
    assert node.said == ["no camera_info yet: images wait for it"]
    info = Message(**camera_info(CAMERA))
    node.topics["camera_info"](info)
    node.topics["image"](message)
    (seen, camera), *more = page.model.seen
    assert not more
    np.testing.assert_array_equal(seen, rgb)
    assert camera == CAMERA

    p = page.model.answer
    (depth,), (found,), (cloud,) = (node.topics[f"~/{name}"] for name in ("depth", "labels", "points"))
    for out in (depth, found, cloud):
        assert out.header is message.header
        assert (out.height, out.width) == (HEIGHT, WIDTH)
        assert not out.is_bigendian
        assert isinstance(out.data, array)
        assert out.data.typecode == "B"
    assert (depth.encoding, depth.step) == ("32FC1", 4 * WIDTH)
    values = np.frombuffer(depth.data, "<f4").reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(values, depth_32fc1(p.depth))
    assert (found.encoding, found.step) == ("mono8", WIDTH)
    np.testing.assert_array_equal(np.frombuffer(found.data, np.uint8).reshape(HEIGHT, WIDTH), p.labels)

    assert (cloud.point_step, cloud.row_step) == (16, 16 * WIDTH)
    assert [(f.name, f.offset, f.datatype, f.count) for f in cloud.fields] == [
        (name, 4 * i, Message.FLOAT32, 1) for i, name in enumerate(("x", "y", "z", "rgb"))
    ]
    words = np.frombuffer(cloud.data, "<f4").reshape(HEIGHT, WIDTH, 4)
    np.testing.assert_array_equal(np.isfinite(words[..., :3]).all(-1), known(p))
    np.testing.assert_allclose(words[known(p), :3], viz.points(p, drop_flying=False)[0], rtol=1e-6)
    packed = words[..., 3].copy().view(np.uint32)
    np.testing.assert_array_equal(packed[..., None] >> [16, 8, 0] & 255, np.rint(255 * p.image))
    assert cloud.is_dense is False


def test_the_node_lives_on_after_a_bad_image(page):
    node = page.EnfiladeNode()
    node.topics["camera_info"](Message(**camera_info(CAMERA) | {"p": [0.0] * 12}))  # nobody calibrated p: k counts
    assert node.camera == CAMERA
    grey = np.zeros((HEIGHT, WIDTH), np.uint8)
    node.topics["image"](image_message(grey, "bayer_rggb8"))
    node.topics["image"](image_message(grey[:-2], "mono8"))
    assert "encoding 'bayer_rggb8' is none of rgb8" in node.said[0]
    assert node.said[1] == "the camera is of another size"
    assert not node.topics["~/depth"]
    page.model.answer = prediction(depth=None)
    node.topics["image"](image_message(grey, "mono8"))
    assert len(node.topics["~/labels"]) == 1
    assert not node.topics["~/points"]
