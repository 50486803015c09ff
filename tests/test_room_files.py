"""Rooms on disk: they read back as they were rendered, runs go on, and what is wrong is told."""

import json

import cv2
import numpy as np
import pytest

from enfilade.cli import main
from enfilade.data import ROOM_SEEDS, Reader, open_dataset, room_files, rooms
from enfilade.data.room_files import RoomFiles, render_rooms
from enfilade.errors import UserError
from enfilade.labels import mapping

SMALL = {"width": 64, "height": 48}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two rooms of train with exact depth beside the noisy, lossless."""
    folder = tmp_path_factory.mktemp("rooms") / "out"
    found = render_rooms(folder, count=2, exact=True, image="png", **SMALL)
    assert (found.written, found.present, found.broken) == (2, 0, ())
    return folder


@pytest.fixture
def copied(rendered, tmp_path):
    """The same, to spoil."""
    import shutil

    return shutil.copytree(rendered, tmp_path / "copy")


def quick(number, **_):
    """A room without the work of rendering."""
    sample = quick.rooms[number % len(quick.rooms)]
    return sample.replace(name=f"room{number:08d}")


@pytest.fixture
def fast(monkeypatch):
    """Rooms that are rendered once for all tests."""
    if not hasattr(quick, "rooms"):
        quick.rooms = [rooms.room(s, **SMALL, voxels=True, threads=1) for s in (0, 1)]
    monkeypatch.setattr(rooms, "room", quick)


def test_frames_read_back_as_they_were_rendered(rendered):
    assert not list(rendered.rglob("*.part"))
    for exact in (False, True):
        reader = open_dataset("room-files", rendered, "train", exact=exact)
        assert isinstance(reader, Reader)
        assert reader.names == ("room00000000", "room00000001")
        for number in [0, 1] if exact else [1]:
            found = reader[number]
            given = rooms.room(number, **SMALL, voxels=True, noise=not exact, threads=1)
            assert found.name == given.name
            np.testing.assert_array_equal(found.labels, given.labels)
            np.testing.assert_array_equal(found.voxels.labels, given.voxels.labels)
            np.testing.assert_array_equal(found.voxels.origin, given.voxels.origin)
            assert found.voxels.size == given.voxels.size
            np.testing.assert_array_equal(found.camera.pose, given.camera.pose)
            assert found.camera.matrix.tolist() == given.camera.matrix.tolist()
            # Millimetres and 8 bits, rounded; and a little for float32.
            np.testing.assert_allclose(found.depth, given.depth, atol=0.501e-3)
            np.testing.assert_array_equal(found.depth == 0, given.depth == 0)
            np.testing.assert_allclose(found.image, given.image, atol=0.501 / 255)
            assert found.image.dtype == found.depth.dtype == np.float32


def test_options_of_the_reader(rendered):
    reader = RoomFiles(rendered, length=1, space="ssc12", voxels=False)
    assert (len(reader), reader.space.name, reader[0].voxels) == (1, "ssc12", None)
    np.testing.assert_array_equal(reader[0].labels, mapping("nyu40", "ssc12")[RoomFiles(rendered)[0].labels])
    assert [s.name for s in RoomFiles(rendered)] == ["room00000000", "room00000001"]


def test_jpeg_and_depth_without_noise(tmp_path, fast):
    render_rooms(tmp_path / "a", count=1, noise=False)
    assert sorted(p.name for p in (tmp_path / "a/train").iterdir()) == ["camera", "depth", "labels", "rgb", "volume"]
    for exact in (False, True):  # what there is, is exact
        (found,) = RoomFiles(tmp_path / "a", exact=exact)
        np.testing.assert_allclose(found.depth, quick.rooms[0].depth, atol=0.501e-3)
    # Lossy, but the same picture: a channel swap or a flip would be tens of grey levels.
    assert np.abs(found.image - quick.rooms[0].image).mean() < 5 / 255


def test_a_second_run_goes_on(copied, fast):
    before = files(copied)
    (copied / "train/camera/room00000001.json").unlink()  # as if interrupted before its last file
    (copied / "train/labels/room00000001.png").unlink()
    assert RoomFiles(copied).names == ("room00000000",)
    options = {"exact": True, "image": "png", **SMALL}
    found = render_rooms(copied, count=2, **options)
    assert (found.written, found.present) == (1, 1)
    assert files(copied) == before
    found = render_rooms(copied, count=3, **options)
    assert (found.written, found.present) == (1, 2)
    assert {name for name in files(copied) if name not in before} >= {"train/rgb/room00000002.png"}
    assert {name: data for name, data in files(copied).items() if name in before} == before


def test_splits_share_no_room(tmp_path, fast):
    names = {}
    for split, (first, _) in ROOM_SEEDS.items():
        for seed in (0, 2):
            render_rooms(tmp_path, split=split, count=3, seed=seed)
        names[split] = RoomFiles(tmp_path, split).names
        assert names[split] == tuple(f"room{first + i:08d}" for i in range(5))
    assert len(set().union(*names.values())) == 15


def test_a_bad_room_is_named_and_passed_over(tmp_path, monkeypatch, fast):
    def render(number, **options):
        if number == 1:
            raise RuntimeError("no floor")
        sample = quick(number, **options)
        return sample.replace(depth=sample.depth + np.float32(70)) if number == 2 else sample

    monkeypatch.setattr(rooms, "room", render)
    found = render_rooms(tmp_path, count=4, noise=False)
    assert (found.written, found.present) == (2, 0)
    assert [name for name, _ in found.broken] == ["room00000001", "room00000002"]
    assert found.broken[0][1] == "RuntimeError: no floor"
    assert "m, beyond the 65.535 m of a 16-bit image" in found.broken[1][1]
    assert RoomFiles(tmp_path).names == ("room00000000", "room00000003")
    monkeypatch.setattr(rooms, "room", quick)
    assert render_rooms(tmp_path, count=4, noise=False).written == 2


def test_processes_write_what_one_does(rendered, tmp_path):
    render_rooms(tmp_path / "many", count=2, exact=True, image="png", workers=2, **SMALL)
    assert files(tmp_path / "many") == files(rendered)


def test_progress_is_shown_on_request(tmp_path, capsys, fast):
    render_rooms(tmp_path, count=1, quiet=False)
    out, error = capsys.readouterr()
    assert out == ""
    assert "rooms/train" in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "trian"}, "no split of rooms 'trian'; did you mean 'train'"),
        ({"count": 0}, "count and workers are at least 1 and seed at least 0, not 0, 1 and 0"),
        ({"seed": -1}, "and seed at least 0"),
        ({"workers": 0}, "count and workers are at least 1"),
        ({"count": 5, "seed": 999_996}, "5 rooms from seed 999996 reach beyond the 1000000 of a split"),
        ({"width": 4}, "a room's picture is at least 8x8 pixels, not 4x480"),
        ({"image": "bmp"}, "images are jpg or png, not 'bmp'"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        # Past the check of the annotation that runs in tests
        getattr(render_rooms, "__wrapped__", render_rooms)(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_of_other_rooms_are_refused(copied, tmp_path, fast):
    with pytest.raises(UserError, match=r"rooms\.json tells of rooms made with other options than .*another folder"):
        render_rooms(copied, count=2, **SMALL)
    (copied / "rooms.json").unlink()
    with pytest.raises(UserError, match=r"is not an empty folder and holds no rooms\.json: choose another"):
        render_rooms(copied, count=2, exact=True, image="png", **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"):
        render_rooms(tmp_path / "file", count=1)
    with pytest.raises(UserError, match="cannot create the folder"):
        render_rooms(tmp_path / "file" / "below", count=1)


def test_what_is_missing_is_told(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="room-files: there is no folder"):
        RoomFiles(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"rooms\.json not found: give the folder that .*not one of its splits"):
        RoomFiles(copied / "train")
    with pytest.raises(UserError, match="no split of rooms 'tset'; did you mean 'test'"):
        RoomFiles(copied, "tset")
    with pytest.raises(UserError, match="holds no finished room: render some"):
        RoomFiles(copied, "val")
    with pytest.raises(UserError, match="has 2 rooms: length 3 cannot be"):
        RoomFiles(copied, length=3)
    (copied / "train/labels/room00000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"room00000001\.png not found \(1 of the 8 files of room-files/train"):
        RoomFiles(copied)
    RoomFiles(copied, length=1)
    about = json.loads((copied / "rooms.json").read_text())
    (copied / "rooms.json").write_text(json.dumps({**about, "exact": False}))
    with pytest.raises(UserError, match="holds no exact depth: render it with --exact"):
        RoomFiles(copied, exact=True)
    (copied / "rooms.json").write_text("{")
    with pytest.raises(UserError, match="does not tell how its rooms were made"):
        RoomFiles(copied)


def test_damaged_files_are_told(copied):
    train = copied / "train"
    reader = RoomFiles(copied)
    volume = train / "volume/room00000000.npz"
    whole = volume.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        volume.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"room00000000\.npz holds no label volume"):
            reader[0]
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    volume.write_bytes(middle)
    with pytest.raises(UserError, match=r"room00000000\.npz holds no label volume"):
        reader[0]
    np.savez(volume, labels=np.zeros((60, 36, 60), np.uint8))
    with pytest.raises(UserError, match=r"holds uint8 \[60, 36, 60\], expected uint8 \[240, 144, 240\]"):
        reader[0]
    volume.write_bytes(whole)
    reader[0]
    camera = train / "camera/room00000000.json"
    for content in ("{", "[]", '{"fx": 1}', camera.read_text().replace("64", "32")):
        camera.write_text(content)
        with pytest.raises(UserError, match=r"room00000000\.json (holds no camera with pose|is of 32x48, but)"):
            reader[0]
    cv2.imwrite(str(train / "depth/room00000001.png"), np.zeros((48, 64), np.uint8))
    with pytest.raises(UserError, match=r"depth/room00000001\.png holds uint8, expected uint16"):
        reader[1]
    cv2.imwrite(str(train / "labels/room00000001.png"), np.zeros((24, 32), np.uint8))
    with pytest.raises(UserError, match=r"labels/room00000001\.png is 32x24, but room00000001\.png 64x48"):
        reader[1]


def test_a_process_ended_from_outside_is_told(tmp_path, monkeypatch, fast):
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, *_):
            from concurrent.futures import Future

            job = Future()
            job.set_exception(BrokenProcessPool("gone"))
            return job

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(room_files, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match=r"ended from outside.*start again with fewer workers"):
        render_rooms(tmp_path, count=2, workers=2)


def test_from_the_command_line(tmp_path, capsys, monkeypatch, fast):
    words = [
        "data",
        "render",
        "rooms",
        "--out",
        str(tmp_path / "out"),
        "--count",
        "1",
        "--split",
        "val",
        "--workers",
        "1",
    ]
    assert main([*words, "--no-noise"]) == 0
    assert capsys.readouterr().out.startswith("1 written, 0 there before, 0 broken")
    assert main([*words, "--no-noise"]) == 0
    assert capsys.readouterr().out.startswith("0 written, 1 there before, 0 broken")
    assert main(words) == 2  # with noise now
    assert "other options" in capsys.readouterr().err
    assert main(["data", "check", "room-files", "--root", str(tmp_path / "out"), "--split", "val"]) == 0
    assert "1 samples, 0 broken" in capsys.readouterr().out
    assert main(["data", "render", "romos", "--out", str(tmp_path / "b")]) == 2
    assert "no data set that can be rendered 'romos'; did you mean 'rooms'" in capsys.readouterr().err

    def broken(number, **_):
        raise RuntimeError("no floor")

    monkeypatch.setattr(rooms, "room", broken)
    assert main([*words[:4], str(tmp_path / "c"), *words[5:]]) == 1
    out, error = capsys.readouterr()
    assert out.startswith("0 written, 0 there before, 1 broken")
    assert "room01000000: RuntimeError: no floor" in error
