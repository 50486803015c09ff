"""Recordings read back by Rerun's own reader: what is where, when, and in which units."""

import io
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import enfilade
from enfilade import complete, labels, viz
from enfilade.camera import Camera
from enfilade.cli import main
from enfilade.complete import Completer, Room
from enfilade.data.frames import Frames
from enfilade.errors import UserError
from enfilade.ops.voxels import VoxelGrid
from enfilade.predict import Predictor
from enfilade.rerun_file import RerunFile, log_sequence, moment, wants_poses
from enfilade.types import IGNORE, LabelVolume, Output, Prediction

rerun = pytest.importorskip("rerun")

SPACE = labels.get("nyu13")
HEIGHT, WIDTH = 24, 32
IMAGE = "/world/camera/image"


def stores(path) -> dict[str, list[dict]]:
    """The rows of each entity in the order of their frames: values by component, `frame` and `time` among them."""
    found: dict[str, list[dict]] = {}
    for chunk in rerun.chunk.RrdReader(str(path)).stream():
        for row in chunk.to_record_batch().to_pylist():
            own = {k: v for k, v in row.items() if v is not None and "RowId" not in k}
            found.setdefault(chunk.entity_path, []).append(own | {"static": chunk.is_static})
    return {entity: sorted(rows, key=lambda row: row.get("frame", -1)) for entity, rows in found.items()}


def timelines(path) -> set[str]:
    return {name for chunk in rerun.chunk.RrdReader(str(path)).stream() for name in chunk.timeline_names}


def upright(axes: dict) -> str:
    """The axis that points up, of what is told of the axes in the world."""
    (named,) = axes["ViewCoordinates:xyz"]  # 1 is up, 2 is down
    return next(f"{'+-'[told - 1]}{'xyz'[i]}" for i, told in enumerate(named) if told in (1, 2))


def pose(yaw=0.3, pitch=0.2, place=(1.0, -2.0, 1.5)) -> np.ndarray:
    """An upright camera in a world whose Z is up, turned by `yaw` and looking down by `pitch` radians."""
    level = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # camera x, y, z are the world's X, -Z, Y
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    c, s = np.cos(pitch), np.sin(pitch)
    nod = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn @ level @ nod, place
    return matrix


def prediction(seed=0, place=None, **changes) -> Prediction:
    """Blurred noise, labels of all 13 classes and none, a slanted surface with a hole in its depth."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    depth = (2 + 0.01 * v + 0.02 * u).astype(np.float32)
    depth[:3, :4], depth[5, 5] = 0, np.nan
    found = ((u // 4 + v // 4 + seed) % 13).astype(np.uint8)
    found[-2:] = IGNORE
    fields = {
        "image": cv2.resize(rng.random((4, 6, 3), np.float32), (WIDTH, HEIGHT)),
        "labels": found,
        "depth": depth,
        "camera": Camera(30.0, 31.0, 16.5, 11.0, WIDTH, HEIGHT, place),
        "space": "nyu13",
        "name": f"photo {seed}",
    }
    return Prediction(**fields | changes)


class Slant(nn.Module):
    """The class is the column's, depth grows downwards; both are the same for every image."""

    def forward(self, image) -> Output:
        b, _, h, w = image.shape
        columns = (13 * torch.arange(w) // w).expand(b, h, w)
        depth = torch.linspace(1, 2, h)[:, None].expand(b, h, w)
        return Output(logits=20 * nn.functional.one_hot(columns, 13).movedim(-1, 1).float(), depth=depth)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    meta = {"model": "slant", "arguments": {}, "space": "nyu13", "size": [24, 32], "focal": 30.0}
    return Predictor(Slant(), meta, device="cpu", flip=False)


# --- one frame --------------------------------------------------------------------------------------------------------


def test_a_frame_comes_back(tmp_path):
    p = prediction()
    with RerunFile(tmp_path / "new" / "a.rrd", points=10**6) as recording:
        recording.frame(p)
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == ["a.rrd"]
    found = stores(tmp_path / "new" / "a.rrd")
    assert timelines(tmp_path / "new" / "a.rrd") == {"frame"}
    assert [row["frame"] for row in found[f"{IMAGE}/labels"]] == [0]
    entities = {
        "/world",
        "/world/source",
        "/world/points",
        IMAGE,
        *(f"{IMAGE}/{x}" for x in ("rgb", "labels", "depth")),
    }
    assert {entity for entity in found if entity.startswith("/world")} == entities

    (rgb,) = found[f"{IMAGE}/rgb"]
    seen = np.asarray(PIL.Image.open(io.BytesIO(bytes(rgb["EncodedImage:blob"][0]))))
    assert np.abs(seen / 255 - p.image).mean() < 0.02  # a JPEG of a smooth picture

    def picture(entity: str, kind: str, dtype) -> np.ndarray:
        (row,) = found[entity]
        form = row[f"{kind}:format"][0]
        assert (form["width"], form["height"]) == (WIDTH, HEIGHT)
        return np.frombuffer(bytes(row[f"{kind}:buffer"][0]), dtype).reshape(HEIGHT, WIDTH)

    np.testing.assert_array_equal(picture(f"{IMAGE}/labels", "SegmentationImage", np.uint8), p.labels)
    depth = picture(f"{IMAGE}/depth", "DepthImage", np.float32)
    assert found[f"{IMAGE}/depth"][0]["DepthImage:meter"] == [1.0]
    np.testing.assert_array_equal(depth, np.nan_to_num(p.depth, nan=0))

    (pinhole,) = found[IMAGE]
    matrix = np.reshape(pinhole["Pinhole:image_from_camera"][0], (3, 3)).T  # stored by columns
    np.testing.assert_allclose(matrix, p.camera.matrix)
    assert pinhole["Pinhole:resolution"] == [[WIDTH, HEIGHT]]
    assert found["/world/source"][0]["TextDocument:text"] == ["photo 0"]


def test_classes_have_their_names_and_colours(tmp_path):
    with RerunFile(tmp_path / "a.rrd") as recording:
        recording.frame(prediction(0))
        recording.frame(prediction(1))
        with pytest.raises(UserError, match="labels of one space, this one nyu13: write those of nyu40"):
            recording.frame(prediction(2, space="nyu40"))
    (context,) = [row for row in stores(tmp_path / "a.rrd")["/world"] if "AnnotationContext:context" in row]
    assert context["static"]
    told = {entry["class_id"]: entry["class_description"]["info"] for entry in context["AnnotationContext:context"][0]}
    assert {k: info["label"] for k, info in told.items()} == dict(enumerate(SPACE.names)) | {IGNORE: "unlabelled"}
    for k, colour in enumerate(SPACE.colours):
        r, g, b = (int(x) for x in colour)
        assert told[k]["color"] == r << 24 | g << 16 | b << 8 | 255


def test_points_lie_in_the_world(tmp_path):
    """As `viz.points` has them, moved by the pose; each has its pixel's colour and class."""
    p = prediction(place=pose())
    with RerunFile(tmp_path / "a.rrd", points=10**6) as recording:
        recording.frame(p)
    found = stores(tmp_path / "a.rrd")
    (points,) = found["/world/points"]
    xyz, rgb = viz.points(p)
    world = np.array(points["Points3D:positions"])
    np.testing.assert_allclose(world, p.camera.to_world(xyz), atol=1e-5)
    uv, z = p.camera.project(p.camera.to_camera(world))
    u, v = np.rint(uv).astype(int).T
    np.testing.assert_allclose(z, p.depth[v, u], atol=1e-5)
    assert points["Points3D:class_ids"] == p.labels[v, u].tolist()
    packed = np.array(points["Points3D:colors"], np.uint32)
    np.testing.assert_array_equal(packed >> 24, viz.as_uint8(p.image)[v, u, 0])
    np.testing.assert_allclose(packed[:, None] >> [24, 16, 8] & 255, 255 * rgb, atol=0.51)
    (placed,) = found["/world/camera"]
    np.testing.assert_allclose(np.reshape(placed["Transform3D:mat3x3"][0], (3, 3)).T, p.camera.pose[:3, :3], atol=1e-6)
    np.testing.assert_allclose(placed["Transform3D:translation"][0], p.camera.pose[:3, 3])


def test_points_are_thinned_to_about_what_was_asked(tmp_path):
    for wanted in (1, 10, 200):
        with RerunFile(tmp_path / "a.rrd", points=wanted) as recording:
            recording.frame(prediction())
        count = len(stores(tmp_path / "a.rrd")["/world/points"][0]["Points3D:positions"])
        assert wanted / 5 < count + 1 <= wanted + 2 * wanted**0.5 + 2


def test_what_a_prediction_lacks_is_not_there(tmp_path):
    with RerunFile(tmp_path / "a.rrd") as recording:
        recording.frame(prediction(depth=None, camera=None))
        recording.frame(prediction(labels=None))
        recording.frame(prediction(labels=None, camera=None))
    found = stores(tmp_path / "a.rrd")
    frames = {
        entity: [row["frame"] for row in rows if "Clear:is_recursive" not in row]
        for entity, rows in found.items()
        if entity.startswith("/world/")
    }
    assert frames == {
        "/world/source": [0, 1, 2],
        f"{IMAGE}/rgb": [0, 1, 2],
        f"{IMAGE}/labels": [0],
        f"{IMAGE}/depth": [1, 2],
        IMAGE: [1],
        "/world/points": [1],
    }
    cleared = {entity: [row["frame"] for row in rows if "Clear:is_recursive" in row] for entity, rows in found.items()}
    assert {entity: at for entity, at in cleared.items() if at} == {
        f"{IMAGE}/labels": [1],
        IMAGE: [2],
        "/world/points": [2],
    }


@pytest.mark.parametrize(
    ("places", "up"),
    [
        ([None, None], "-y"),
        ([pose(), pose(2.0, 0.9), pose(pitch=1.5)], "+z"),  # the last looks nearly straight down
        ([np.eye(4)], "-y"),
        ([np.diag([1.0, -1, -1, 1])], "+y"),
    ],
)
def test_up_is_where_the_cameras_have_it(tmp_path, places, up):
    with RerunFile(tmp_path / "a.rrd") as recording:
        for place in places:
            recording.frame(prediction(place=place))
    (axes,) = [row for row in stores(tmp_path / "a.rrd")["/world"] if "ViewCoordinates:xyz" in row]
    assert axes["static"]
    assert upright(axes) == up


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.rrd"

    def write(then=lambda: None):
        with RerunFile(path) as recording:
            recording.frame(prediction())
            then()

    with pytest.raises(ZeroDivisionError):
        write(lambda: 1 // 0)
    assert not list(tmp_path.iterdir())
    with RerunFile(path):
        pass  # no frame, no file
    assert not list(tmp_path.iterdir())
    path.write_text("older")
    with pytest.raises(ZeroDivisionError):
        write(lambda: 1 // 0)
    assert path.read_text() == "older"

    def full(self, **options):
        raise RuntimeError("No space left on device\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(rerun.RecordingStream, "flush", full)
        with pytest.raises(UserError, match=r"^cannot write a\.rrd to .*: No space left on device$"):
            write()
    assert [x.name for x in tmp_path.iterdir()] == ["a.rrd"]
    assert path.read_text() == "older"
    write()
    assert stores(path)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"written as \.rrd, not as a\.mp4"):
        RerunFile(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="at least 1 point, not 0"):
        RerunFile(tmp_path / "a.rrd", points=0)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        RerunFile(tmp_path / "taken" / "a.rrd")
    monkeypatch.setenv("RERUN", "off")
    with pytest.raises(UserError, match="RERUN=off"), RerunFile(tmp_path / "a.rrd"):
        pass
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(UserError, match=re.escape("need rerun-sdk: pip install 'enfilade[rerun]'")):
        RerunFile(tmp_path / "a.rrd")


# --- many -------------------------------------------------------------------------------------------------------------


def clip(path: Path, rate: float, count: int) -> str:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (WIDTH, HEIGHT))
    for i in range(count):
        writer.write(np.full((HEIGHT, WIDTH, 3), 40 * i, np.uint8))
    writer.release()
    return str(path)


def test_photos_and_videos_share_a_timeline(tmp_path):
    """A video's frames keep their distances; what follows comes after."""
    one, two = clip(tmp_path / "one.mp4", 5, 5), clip(tmp_path / "two.mp4", 10, 3)
    named = ["a.png", f"{one}#0", f"{one}#2", f"{one}#4", f"{two}#0", f"{two}#1", "b#7.png"]
    with RerunFile(tmp_path / "a.rrd") as recording:
        for label in named:
            recording.add(label, prediction())
    rows = stores(tmp_path / "a.rrd")[f"{IMAGE}/rgb"]
    assert [row["frame"] for row in rows] == [0, 1, 3, 5, 6, 7, 8]
    seconds = [row["time"].total_seconds() if "time" in row else None for row in rows]
    assert seconds == [None, 0, 0.4, 0.8, 1.0, 1.1, None]


def sequence(root: Path, stems, places) -> Path:
    for folder in ("rgb", "depth", "poses"):
        (root / folder).mkdir(parents=True)
    for i, (stem, place) in enumerate(zip(stems, places)):
        noise = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        cv2.imwrite(str(root / f"rgb/{stem}.png"), noise)
        cv2.imwrite(str(root / f"depth/{stem}.png"), np.full((HEIGHT, WIDTH), 1500 + i, np.uint16))
        np.savetxt(root / f"poses/{stem}.txt", np.full((4, 4), np.inf) if place is None else place)
    (root / "intrinsics.txt").write_text("30 31 16 12")
    return root


def test_a_sequence_with_poses(tmp_path, predictor):
    places = [pose(0.1), None, pose(0.5), pose(0.7)]
    stems = [f"130503110{i}.{25 * i:02d}" for i in range(4)]
    root = sequence(tmp_path / "scan", stems, places)
    assert wants_poses(root)
    told = []
    reader = Frames(root)
    options = {"quiet": True, "on_prediction": lambda name, p: told.append((name, p))}
    assert log_sequence(reader, predictor, tmp_path / "a.rrd", **options) == 4
    assert [name for name, _ in told] == stems
    found = stores(tmp_path / "a.rrd")
    assert timelines(tmp_path / "a.rrd") == {"frame", "time"}
    rows = found[f"{IMAGE}/rgb"]
    assert [row["frame"] for row in rows] == [0, 1, 2, 3]
    assert [row["time"].value for row in rows] == [(1305031100 + i) * 10**9 + i * 250_000_000 for i in range(4)]
    assert [row["DepthImage:meter"] for row in found[f"{IMAGE}/measured"]] == [[1.0]] * 4
    measured = np.frombuffer(bytes(found[f"{IMAGE}/measured"][2]["DepthImage:buffer"][0]), np.float32)
    np.testing.assert_allclose(measured, 1.502, rtol=1e-6)

    # the second frame has no place: whatever stood in space is taken away, its pictures stay
    for entity in ("/world/camera", "/world/points", IMAGE):
        assert ["Clear:is_recursive" in row for row in found[entity]] == [False, True, False, False], entity
    for row in (0, 2, 3):
        moved = found["/world/camera"][row]
        np.testing.assert_allclose(np.reshape(moved["Transform3D:mat3x3"][0], (3, 3)).T, places[row][:3, :3], atol=1e-6)
        np.testing.assert_allclose(moved["Transform3D:translation"][0], places[row][:3, 3], rtol=1e-6)
        world = np.array(found["/world/points"][row]["Points3D:positions"])
        xyz, _ = viz.points(told[row][1])
        np.testing.assert_allclose(world, xyz @ places[row][:3, :3].T + places[row][:3, 3], atol=1e-5)

    assert log_sequence(Frames(root, "val"), predictor, tmp_path / "b.rrd", quiet=True) == 1
    assert log_sequence(reader, predictor, tmp_path / "b.rrd", every=3, quiet=True) == 2
    assert [row["frame"] for row in stores(tmp_path / "b.rrd")[f"{IMAGE}/rgb"]] == [0, 3]
    with pytest.raises(UserError, match="every must be at least 1, not 0"):
        log_sequence(reader, predictor, tmp_path / "b.rrd", every=0)


def test_folders_without_poses(tmp_path, predictor):
    root = sequence(tmp_path / "scan", ["a", "b"], [pose(), pose()])
    assert wants_poses(root)
    assert not wants_poses(root / "rgb")
    assert not wants_poses(root / "rgb" / "a.png")
    assert not wants_poses(tmp_path / "nothing")
    assert log_sequence(Frames(root), predictor, tmp_path / "a.rrd", quiet=True) == 2
    assert timelines(tmp_path / "a.rrd") == {"frame"}  # the names are no times
    (root / "intrinsics.txt").unlink()
    assert not wants_poses(root)
    with pytest.raises(UserError, match=r"scan/all: a has no camera: a sequence needs intrinsics and poses"):
        log_sequence(Frames(root), predictor, tmp_path / "b.rrd", quiet=True)
    assert not (tmp_path / "b.rrd").exists()
    (root / "poses/b.txt").unlink()
    with pytest.raises(FileNotFoundError, match="frame 'b' has no pose file"):
        wants_poses(root)


def test_names_that_are_times():
    assert moment("1305031102.175304") == np.datetime64("2011-05-10T12:38:22.175304")  # TUM RGB-D
    assert moment("1403636579763555584") == np.datetime64(1403636579763555584, "ns")  # EuRoC
    assert moment("frame-000020") is None
    assert moment("20240101") is None
    assert moment("12.5") is None


@pytest.mark.shared
def test_seven_scenes(shared_data, predictor, tmp_path):
    """Every tenth frame's pose against the numbers in its file, and the intrinsics."""
    root = shared_data / "7scenes_office"
    assert wants_poses(root)
    reader = Frames(root)
    count = log_sequence(reader, predictor, tmp_path / "office.rrd", every=10, points=2000, quiet=True)
    assert count == len(range(0, len(reader), 10))
    found = stores(tmp_path / "office.rrd")
    for row, i in zip(found["/world/camera"], range(0, len(reader), 10), strict=True):
        assert row["frame"] == i
        told = np.loadtxt(root / f"{reader.names[i]}.pose.txt")
        np.testing.assert_allclose(np.reshape(row["Transform3D:mat3x3"][0], (3, 3)).T, told[:3, :3], atol=1e-6)
        np.testing.assert_allclose(row["Transform3D:translation"][0], told[:3, 3], rtol=1e-5, atol=1e-7)
    matrix = np.loadtxt(root / "camera-intrinsics.txt")
    for row in found[IMAGE]:
        np.testing.assert_allclose(np.reshape(row["Pinhole:image_from_camera"][0], (3, 3)).T, matrix)


# --- rooms ------------------------------------------------------------------------------------------------------------


def made_room() -> Room:
    """A small volume of random labels in a world where its axes do not start at 0."""
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 12, (6, 5, 7)).astype(np.uint8)
    volume[rng.random(volume.shape) < 0.2] = IGNORE
    volume[volume == 7] = 0  # one class is nowhere
    p = prediction(place=pose(pitch=1.2))  # tilted so far that the world's up is not the picture's
    grid = VoxelGrid(np.array([-1.0, 2.0, -0.05]), p.camera.pose, 0.02, (24, 20, 28))
    return Room(
        volume=LabelVolume(volume, grid.origin, 0.08),
        observed=(rng.random(volume.shape) < 0.5) & (volume > 0) & (volume != IGNORE),
        confidence=np.ones(volume.shape, np.float32),
        image=p.image,
        depth=np.nan_to_num(p.depth, nan=0),
        depth_source="given",
        camera=p.camera,
        grid=grid,
        camera_source="given",
        labels=np.where(p.labels < 12, p.labels, IGNORE).astype(np.uint8),
        name="kitchen",
    )


def test_a_rooms_voxels_can_be_put_together_again(tmp_path):
    room = made_room()
    with RerunFile(tmp_path / "room.rrd") as recording:
        recording.room(room)
    found = stores(tmp_path / "room.rrd")
    names = labels.get("ssc12").names
    volume = np.zeros(room.volume.labels.shape, np.uint8)
    observed = np.zeros(volume.shape, bool)
    for entity in (entity for entity in found if entity.startswith("/world/room/")):
        (row,) = found[entity]
        _, _, _, part, name = entity.split("/")
        assert row["Boxes3D:class_ids"] == [names.index(name)]
        centres, half = np.array(row["Boxes3D:centers"]), np.array(row["Boxes3D:half_sizes"])
        assert row["Boxes3D:fill_mode"] == [rerun.components.FillMode.Solid.value]
        np.testing.assert_allclose(half, np.full_like(centres, 0.04))
        x, y, z = ((centres - room.volume.origin) / 0.08 - 0.5).T  # world X, Y, Z
        i, j, k = np.rint([x, z, y]).astype(int)
        np.testing.assert_allclose([i, j, k], [x, z, y], atol=1e-4)
        assert not volume[i, j, k].any()
        volume[i, j, k] = names.index(name)
        observed[i, j, k] = part == "seen"
    np.testing.assert_array_equal(volume, np.where(room.volume.labels == IGNORE, 0, room.volume.labels))
    np.testing.assert_array_equal(observed, room.observed)
    context = next(row for row in found["/world/room"] if row["static"])["AnnotationContext:context"][0]
    assert [entry["class_description"]["info"]["label"] for entry in context][:-1] == list(names)
    # its frame is there too, in a world whose Z is up
    np.testing.assert_allclose(found["/world/camera"][0]["Transform3D:translation"][0], room.camera.pose[:3, 3])
    assert len(found["/world/points"][0]["Points3D:positions"]) > 100
    (axes,) = [row for row in found["/world"] if "ViewCoordinates:xyz" in row]
    assert upright(axes) == "+z"


def test_a_room_leaves_with_the_next_frame(tmp_path):
    room = made_room()
    with RerunFile(tmp_path / "room.rrd") as recording:
        recording.room(room)
        recording.frame(prediction(labels=None))
    chair = stores(tmp_path / "room.rrd")["/world/room/seen/chair"]
    assert [(row["frame"], "Clear:is_recursive" in row) for row in chair] == [(0, False), (1, True)]


def test_complete_writes_a_recording(tmp_path, monkeypatch, capsys):
    room = made_room()

    class Made(Completer):
        def __init__(self):
            pass

        def complete(self, *args, **options):
            return room

    monkeypatch.setattr(complete, "load", lambda *args: Made())
    cv2.imwrite(str(tmp_path / "kitchen.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    words = ["complete", str(tmp_path / "kitchen.png"), "--out", str(tmp_path / "out"), "--files", "arrays", "--json"]
    assert main([*words, "--rerun", str(tmp_path / "room.txt")]) == 2
    assert "written as .rrd, not as room.txt" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert main([*words, "--rerun", str(tmp_path / "room.rrd")]) == 0
    assert json.loads(capsys.readouterr().out)["files"][-1] == str(tmp_path / "room.rrd")
    assert "/world/room" in stores(tmp_path / "room.rrd")


def test_the_guides_python_runs(tmp_path, monkeypatch, predictor):
    guide = Path(__file__).parents[1] / "docs" / "rerun.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert blocks
    sequence(tmp_path / "scan", ["a", "b"], [pose(), pose(1.0)])
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(enfilade, "load", lambda *args, **options: predictor)
    for block in blocks:
        exec(compile(block, str(guide), "exec"), {"__name__": "guide"})
    assert {x.name for x in tmp_path.glob("*.rrd")} == {"photo.rrd", "scan.rrd"}
    assert len(stores(tmp_path / "scan.rrd")["/world/camera"]) == 2
