"""From a frame to its room: networks whose right answer is known, the files, the verb, and training on volumes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from enfilade import checkpoint, complete, labels, recipes
from enfilade.cli import main
from enfilade.complete import Completer, behind_walls, describe, score
from enfilade.data.rooms import room
from enfilade.data.volumes import encode
from enfilade.errors import UserError
from enfilade.models.completion3d import Completion3d
from enfilade.ops.voxels import place_grid
from enfilade.room_output import FILES, peak_megabytes, save
from enfilade.train import train
from enfilade.types import IGNORE, Output, Prediction

META = {"size": [60, 80], "recipe": "made"}
EMPTY, FLOOR, WALL = 0, 2, 3


@pytest.fixture(scope="module")
def frame():
    """A rendered room, small."""
    return room(3, width=160, height=120, voxels=True)


class Touched(nn.Module):
    """Wall wherever the TSDF has a surface, floor in all other voxels; every pixel is floor."""

    uses = ("tsdf",)

    def forward(self, image, tsdf) -> Output:
        surface = nn.functional.max_pool3d((tsdf.abs() > 0.999).float(), 4)
        logits = torch.zeros(1, 12, *surface.shape[2:])
        logits[:, FLOOR] = 1.0
        logits[:, WALL] = 4 * surface[:, 0]
        pixels = torch.zeros(1, 12, 15, 20)
        pixels[:, FLOOR] = 1
        return Output(volume_logits=logits, logits=pixels)


class Oracle(nn.Module):
    """Answers with the truth after `iterations` of 3, and with nothing before."""

    uses = ("volume", "labels")

    def __init__(self):
        super().__init__()
        self.iterations = 3

    def forward(self, image, volume, labels) -> Output:
        def scores(x):
            return 9.0 * nn.functional.one_hot(x.where(x != IGNORE, 0), 12).movedim(-1, 1).float()

        told = volume if self.iterations >= 3 else torch.zeros_like(volume)
        return Output(volume_logits=scores(told), logits=scores(labels))


# --- a room -----------------------------------------------------------------------------------------------------------


def test_what_is_seen_completed_empty_and_unknown(frame):
    """Walls lie where the depth map says; before them nothing is, behind them the network has its way, and out of view
    nobody knows."""
    found = Completer(Touched(), META).complete(frame.image, frame.depth, frame.camera)
    volume = found.volume.labels
    assert volume.shape == (60, 36, 60)
    grid = found.grid
    # every voxel that holds a pixel's point is full and observed
    points = (found.camera.rays() * frame.depth[..., None]).reshape(-1, 3)
    world = points @ grid.pose[:3, :3].T + grid.pose[:3, 3]
    at = np.floor((world - grid.origin) / 0.08).astype(int)[:, [0, 2, 1]]
    inside = ((at >= 0) & (at < volume.shape)).all(1) & (frame.depth.reshape(-1) > 0.5)
    i, j, k = at[inside][::7].T
    assert found.observed[i, j, k].all()
    assert (volume[i, j, k] == WALL).mean() > 0.95  # but for cells at the edge of the view
    # free space: between the camera and a point, half a metre before it
    before = (points - 0.5 * points / np.linalg.norm(points, axis=1, keepdims=True)) @ grid.pose[:3, :3].T
    at = np.floor((before + grid.pose[:3, 3] - grid.origin) / 0.08).astype(int)[:, [0, 2, 1]]
    inside = ((at >= 0) & (at < volume.shape)).all(1) & (frame.depth.reshape(-1) > 1.2)
    i, j, k = at[inside][::7].T
    assert (volume[i, j, k] == EMPTY).mean() > 0.9
    # behind the camera's picture: unknown; behind surfaces: what the network says
    assert (volume[:, :, 0] == IGNORE).all() or (volume == IGNORE).mean() > 0.2
    assert (volume == FLOOR).sum() > 300
    assert not found.observed[volume == EMPTY].any()
    assert found.labels.shape == frame.image.shape[:2]
    assert (found.labels == FLOOR).all()
    assert 0 < found.confidence.min() <= found.confidence.max() <= 1


def test_pixels_are_labelled_by_the_estimator_where_the_network_has_depth_alone(frame):
    class DepthAlone(Touched):
        def forward(self, image, tsdf) -> Output:
            return replace(super().forward(image, tsdf), logits=None)

    class Estimator:
        def __init__(self, space):
            self.space = space

        def predict(self, image, camera=None, fov=None):
            chosen = labels.get(self.space).names.index("bed" if self.space == "nyu40" else "tree")
            return Prediction(image.rgb, np.full(image.rgb.shape[:2], chosen, np.uint8), space=self.space)

    completer = Completer(DepthAlone(), META)
    found = completer.complete(frame.image, frame.depth, frame.camera, estimator=Estimator("nyu40"))
    assert (found.labels == labels.get("ssc12").names.index("bed")).all()
    street = completer.complete(frame.image, frame.depth, frame.camera, estimator=Estimator("camvid11"))
    assert street.labels is None  # no tree stands in a room
    assert np.array_equal(street.volume.labels, found.volume.labels)


def test_the_grid_may_be_given(frame):
    down = -frame.camera.pose[2, :3]
    completer = Completer(Touched(), META)
    told = completer.complete(frame.image, frame.depth, frame.camera, gravity=tuple(down), height=1.5)
    want = place_grid(frame.depth, frame.camera, down, height=1.5)
    np.testing.assert_allclose(told.grid.pose, want.pose)
    np.testing.assert_allclose(told.volume.origin, want.origin)
    assert describe(told)["camera_height"] == 1.5
    same = completer.complete(frame.image, frame.depth, frame.camera, grid=want)
    np.testing.assert_array_equal(same.volume.labels, told.volume.labels)


def test_nothing_is_judged_behind_a_wall(frame):
    """A wall across the room, a chair close behind it, one far behind it, and one before it."""
    grid = place_grid(frame.depth, frame.camera).coarse()
    volume = np.zeros(grid.shape, np.uint8)
    eye = np.floor((grid.pose[:3, 3] - grid.origin) / grid.size).astype(int)[[0, 2, 1]]
    volume[:, :, 30] = WALL
    chair = labels.get("ssc12").names.index("chair")
    for k in (20, 33, 50):
        volume[eye[0], eye[1], k] = chair
    found = behind_walls(volume, grid)
    assert [bool(found[eye[0], eye[1], k]) for k in (20, 30, 33, 50)] == [False, False, False, True]
    assert found.sum() == 1  # the far chair alone
    volume[:, :, 30] = 0
    assert not behind_walls(volume, grid).any()  # furniture hides, but does not end the room


class Estimator:
    """Says two metres everywhere."""

    meta = {"recipe": "two metres"}  # noqa: RUF012

    def predict(self, image, camera=None, fov=None):
        from enfilade.camera import Camera

        height, width = image.rgb.shape[:2]
        return Prediction(
            image=image.rgb,
            depth=np.full((height, width), 2.0, np.float32),
            camera=camera or Camera.from_fov(width, height, fov or 60.0),
            camera_source="given" if camera or fov else "assumed",
        )


def test_depth_is_estimated_where_none_is_given(frame):
    completer = Completer(Touched(), META)
    found = completer.complete(frame.image, estimator=Estimator())
    assert found.depth_source == "two metres"
    assert found.camera_source == "assumed"
    assert (found.depth == 2.0).all()
    given = completer.complete(frame.image, frame.depth, frame.camera)
    assert (given.depth_source, given.camera_source) == ("given", "given")
    # depth without a camera: the camera is assumed, the depth stays
    half = completer.complete(frame.image, frame.depth, fov=70.0, estimator=Estimator())
    np.testing.assert_array_equal(half.depth, frame.depth)
    assert half.depth_source == "given"
    assert half.camera.fov_degrees == pytest.approx(70, abs=0.5)


def test_what_cannot_be_completed(frame):
    completer = Completer(Touched(), META)
    with pytest.raises(UserError, match="no depth at all"):
        completer.complete(frame.image, np.zeros_like(frame.depth), frame.camera)
    with pytest.raises(UserError, match="depth map is 80 x 60 pixels, the image 160 x 120"):
        completer.complete(frame.image, frame.depth[::2, ::2].copy(), frame.camera)
    with pytest.raises(UserError, match="true labels and volume: it is an upper bound"):
        Completer(Oracle(), META)
    with pytest.raises(UserError, match="completes no rooms"):
        complete.load("gad-nyuv2")


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_of_a_room(frame, tmp_path):
    found = Completer(Touched(), META).complete(frame.image, frame.depth, frame.camera)
    written = save(found, tmp_path / "new", stem="kitchen", model="made")
    assert [p.rpartition("/")[2] for p in written] == [f"kitchen.room.{e}" for e in ("npz", "ply", "html")]
    with np.load(written[0], allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["labels"], found.volume.labels)
        np.testing.assert_array_equal(arrays["observed"], found.observed)
        np.testing.assert_allclose(arrays["pose"], found.grid.pose)
        assert arrays["size"] == pytest.approx(0.08)
        assert tuple(arrays["names"]) == labels.get("ssc12").names
    assert Path(written[1]).read_bytes().startswith(b"ply\n")
    page = Path(written[2]).read_text()
    assert "kitchen" in page or found.name in page
    with pytest.raises(UserError, match=r"no such output 'voxels'.*arrays, mesh, page"):
        save(found, tmp_path, files=("voxels",))
    assert FILES == ("arrays", "mesh", "page")
    assert 50 < peak_megabytes() < 1e5
    facts = describe(found)
    full = (found.volume.labels > 0) & (found.volume.labels != IGNORE)
    assert facts["observed"] + facts["completed"] == full.sum()
    assert facts["litres"]["wall"] == pytest.approx(0.512 * (found.volume.labels == WALL).sum(), abs=0.1)
    json.dumps(facts)


# --- scores -----------------------------------------------------------------------------------------------------------


class Reader:
    """Rooms as a data set with volumes."""

    name, names, ignored, score_crop = "made/val", ("0",), (), None
    space = labels.get("nyu40")

    def __init__(self, frame):
        self.frame = frame  # its volume is ssc12 already

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.frame


def test_the_truth_scores_one(frame):
    reader = Reader(frame)
    network = Oracle()
    report = score(network, META, reader, quiet=True)
    assert report["completion"]["ssc_miou"] == 1.0
    assert report["completion"]["sc_iou"] == 1.0
    assert report["segmentation"]["miou"] > 0.5  # the truth at 60 x 80, scored at 120 x 160
    assert report["protocol"] | {"seconds_per_frame": 0} == {
        "data": "made/val",
        "frames": 1,
        "of": 1,
        "convention": "torchssc",
        "iterations": 3,
        "seconds_per_frame": 0,
    }
    early = score(network, META, reader, iterations=1, quiet=True)
    assert early["completion"]["sc_recall"] == 0.0
    assert network.iterations == 3  # as before
    with pytest.raises(UserError, match="no iterations to set"):
        score(Touched(), META, reader, iterations=2, quiet=True)


def test_scores_are_those_of_the_metric(frame):
    """Against the metric fed by hand, under each convention."""
    from enfilade.metrics_volume import CONVENTIONS, CompletionScore

    reader, network = Reader(frame), Touched()
    for convention in CONVENTIONS:
        report = score(network, META, reader, convention=convention, quiet=True)
        masks = "sscnet" if convention == "sscnet" else "torchssc"
        truth = encode(reader[0], image_size=(60, 80), masks=masks).completion
        answer = network(None, torch.from_numpy(truth.tsdf)[None, None]).volume_logits[0].argmax(0).numpy()
        by_hand = CompletionScore(convention)
        by_hand.update(answer, truth.volume, truth.scored, truth.occluded)
        assert report["completion"] == by_hand.compute()


# --- training and the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(frame, tmp_path_factory):
    """A trained run: one update of a very narrow SSCNet."""
    out = tmp_path_factory.mktemp("run")
    recipe = recipes.sscnet_row()
    recipe = recipe.replace(arguments=recipe.arguments | {"width": 0.06}, source=(60, 80), scale=1.0)
    recipe = recipe.with_stages(epochs=1, batch=2, size=(60, 80))
    result = train(recipe, Reader(frame), Reader(frame), out=out, workers=0, quiet=True)
    return out, result


def test_volumes_are_trained_and_validated(run):
    out, result = run
    assert result["complete"]
    assert 0 <= result["sc_iou"] <= 1
    assert "ssc_miou" in result
    loaded = checkpoint.load(out)
    assert isinstance(loaded.network, Completion3d)
    assert loaded.meta["scores"]["ssc_miou"] == result["ssc_miou"]


def test_from_the_command_line(run, frame, tmp_path, capsys):
    import cv2

    from enfilade.images import write_png

    image, depth = tmp_path / "office.png", tmp_path / "office.depth.png"
    write_png(image, np.rint(255 * frame.image).astype(np.uint8))
    cv2.imwrite(str(depth), np.rint(1000 * frame.depth).astype(np.uint16))
    c = frame.camera
    (tmp_path / "camera.json").write_text(json.dumps({"fx": c.fx, "fy": c.fy, "cx": c.cx, "cy": c.cy}))
    words = ["complete", str(image), "--depth", str(depth), "--camera", str(tmp_path / "camera.json")]
    words += ["--model", str(run[0]), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Depth: given; camera: given." in out
    assert "m above the floor (found)" in out
    assert "MB of memory" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"office.room.{e}" for e in ("html", "npz", "ply")]
    assert main([*words, "--json", "--files", "arrays", "--height", "1.25", "--gravity", "0", "1", "0"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["camera_height"] == 1.25
    assert len(facts["files"]) == 1
    (tmp_path / "pose.txt").write_text("1 0 0 0 0 0 1 0 0 -1 0 1.5 0 0 0 1")
    assert main([*words, "--pose", str(tmp_path / "pose.txt"), "--gravity", "0", "1", "0"]) == 2
    assert "give gravity once" in capsys.readouterr().err
    assert main([*words[:-4], "--model", "gad-nyuv2", "--out", str(tmp_path / "out")]) == 2
    assert "completes no rooms" in capsys.readouterr().err
