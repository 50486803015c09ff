"""Class weights: against a recount that is written the slow way, and files that are damaged."""

import json

import cv2
import numpy as np
import pytest
import torch

from enfilade.cli import main
from enfilade.data.epochs import class_weights
from enfilade.data.weights import count, describe, frequencies, median_frequency, read, write
from enfilade.errors import UserError
from enfilade.labels import SPACES
from enfilade.types import Sample

SPACE = SPACES["camvid11"]
K = len(SPACE)


class Listed:
    """A reader of given label maps; None is a sample without labels, an exception is raised."""

    name, space, ignored, score_crop = "listed/train", SPACE, (), None

    def __init__(self, *maps):
        self.maps, self.names = maps, tuple(f"s{i}" for i in range(len(maps)))

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        labels = self.maps[index]
        if isinstance(labels, Exception):
            raise labels
        shape = (2, 2) if labels is None else labels.shape
        return Sample(image=np.zeros((*shape, 3), np.float32), labels=labels)


def maps(count=6, absent=(), seed=0):
    """Maps of different sizes, some without some classes; `absent` are in none."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        labels = rng.choice(12, (10 + i, 14), p=rng.dirichlet(np.full(12, 0.4))).astype(np.uint8)
        labels[np.isin(labels, [11, *absent])] = 255
        labels[0, 0] = 3
        made.append(labels)
    return made


def recount(labels, power, count_void):
    """The definition, class by class."""
    frequency = []
    for c in range(K):
        shown = [m for m in labels if c in m]
        pixels = sum(int((m == c).sum()) for m in shown)
        area = sum(m.size if count_void else int((m != 255).sum()) for m in shown)
        frequency.append(pixels / area if area else None)
    occurring = sorted(f for f in frequency if f is not None)
    half = len(occurring) // 2
    median = occurring[half] if len(occurring) % 2 else (occurring[half - 1] + occurring[half]) / 2
    return [0.0 if f is None else (median / f) ** power for f in frequency]


@pytest.mark.parametrize("count_void", [False, True])
@pytest.mark.parametrize("absent", [(), (4,), (4, 9)])
def test_weights_follow_the_definition(count_void, absent):
    labels = maps(absent=absent)
    counts = count(Listed(*labels), K)
    for power in (1.0, 0.5):
        found = median_frequency(counts, power, count_void=count_void)
        np.testing.assert_allclose(found, recount(labels, power, count_void), rtol=1e-12)
    assert (counts.void, counts.total) == (sum((m == 255).sum() for m in labels), len(labels))
    assert counts.images.tolist() == [sum(c in m for m in labels) for c in range(K)]
    assert np.flatnonzero(counts.pixels == 0).tolist() == list(absent)


def test_void_counts_only_where_it_is_asked_for():
    labels = maps()
    for m in labels[:3]:
        m[1:4] = 255
    counts = count(Listed(*labels), K)
    assert (frequencies(counts, count_void=True) < frequencies(counts)).any()
    whole = [np.where(m == 255, 0, m).astype(np.uint8) for m in labels]
    counts = count(Listed(*whole), K)
    np.testing.assert_array_equal(frequencies(counts, count_void=True), frequencies(counts))


def test_an_absent_class_is_not_in_the_median():
    labels = np.array([[0, 0, 0, 0, 1, 1, 2, 255]], np.uint8)  # 4/7, 2/7, 1/7: the median is class 1's
    wanted = [0.5, 1.0, 2.0] + [0.0] * (K - 3)
    np.testing.assert_allclose(median_frequency(count(Listed(labels), K)), wanted)
    np.testing.assert_array_equal(median_frequency(count(Listed(labels), K), 0.0), [1] * 3 + [0] * (K - 3))


def test_an_image_of_void_changes_nothing_but_the_void():
    labels = maps()
    without, with_it = count(Listed(*labels), K), count(Listed(*labels, np.full((9, 9), 255, np.uint8)), K)
    for count_void in (False, True):
        np.testing.assert_array_equal(
            median_frequency(without, count_void=count_void), median_frequency(with_it, count_void=count_void)
        )
    assert (with_it.void, with_it.total) == (without.void + 81, without.total + 1)
    with pytest.raises(UserError, match="none of the 1 images that could be read has a labelled pixel"):
        median_frequency(count(Listed(np.full((9, 9), 255, np.uint8)), K))


def test_broken_samples_are_raised_or_named_and_passed_over():
    good = maps(2)
    reader = Listed(good[0], UserError("s1.png is empty"), None, np.full((3, 3), 12, np.uint8), KeyError("x"), good[1])
    with pytest.raises(UserError, match=r"s1\.png is empty"):
        count(reader, K)
    counts = count(reader, K, tolerant=True)
    assert counts.broken == (
        ("s1", "s1.png is empty"),
        ("s2", "sample s2 has no labels to count"),
        ("s3", "sample s3 holds label 12, beyond the 11 classes"),
        ("s4", "KeyError: 'x'"),
    )
    assert counts.total == 2
    np.testing.assert_allclose(median_frequency(counts), recount(good, 1.0, False), rtol=1e-12)


@pytest.mark.parametrize("power", [-1.0, float("nan"), float("inf")])
def test_powers_that_make_no_weights(power):
    with pytest.raises(UserError, match="power of class weights"):
        median_frequency(count(Listed(*maps(1)), K), power)


def test_training_takes_these_weights(monkeypatch):
    labels = maps()
    for power in (1.0, 0.5):
        wanted = torch.tensor(recount(labels, power, False), dtype=torch.float32)
        torch.testing.assert_close(class_weights(Listed(*labels), power, K), wanted)
    # there is one implementation
    monkeypatch.setattr("enfilade.data.epochs.median_frequency", lambda counts, power: counts.pixels * power)
    assert class_weights(Listed(*labels), 2.0, K)[3] == 2 * sum((m == 3).sum() for m in labels)


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def document():
    return describe(count(Listed(*maps()), K), "camvid", "train", SPACE)


def test_files_come_back(document, tmp_path):
    path = tmp_path / "w.json"
    write(document, path)
    found = read(path, SPACE)
    assert tuple(found) == SPACE.names
    np.testing.assert_allclose(list(found.values()), recount(maps(), 1.0, False), rtol=1e-12)
    assert read(path) == found
    assert [p.name for p in tmp_path.iterdir()] == ["w.json"]


def test_damaged_files_are_named(document, tmp_path):
    path = tmp_path / "w.json"
    with pytest.raises(FileNotFoundError, match=r"w\.json not found: 'enfilade data weights'"):
        read(path)
    write(document, path)
    whole = path.read_text()
    rows = document["classes"]
    damaged = [
        whole[: len(whole) // 2],
        "",
        "[]",
        '{"space": "camvid11"}',
        '{"space": "camvid11", "classes": 3}',
        json.dumps({**document, "classes": [{"name": "sky"}]}),
        json.dumps({**document, "classes": [*rows, rows[0]]}),
        json.dumps({**document, "classes": [{**row, "weight": 0} for row in rows]}),
        json.dumps({**document, "classes": [{**rows[0], "weight": -1}, *rows[1:]]}),
        json.dumps({**document, "classes": [{**rows[0], "weight": float("nan")}, *rows[1:]]}),
        json.dumps({**document, "classes": [{**rows[0], "weight": "much"}, *rows[1:]]}),
        json.dumps({**document, "classes": [{**rows[0], "weight": None}, *rows[1:]]}),
    ]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(UserError, match=r"w\.json holds no class weights"):
            read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"w\.json holds no class weights"):
        read(path, SPACE)


def test_weights_of_another_label_space_are_refused(document, tmp_path):
    path = tmp_path / "w.json"
    write(document, path)
    with pytest.raises(UserError, match="the 11 class weights of camvid11, not the 13 of nyu13"):
        read(path, SPACES["nyu13"])
    write({**document, "classes": document["classes"][::-1]}, path)
    with pytest.raises(UserError, match="camvid11"):
        read(path, SPACE)  # in another order they would be given to other classes


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def camvid(tmp_path):
    root = tmp_path / "camvid"
    for i, labels in enumerate(maps()):
        for folder, array in (("train", np.zeros((*labels.shape, 3), np.uint8)), ("trainannot", labels)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(root / folder / f"f{i}.png"), np.where(array == 255, 11, array).astype(np.uint8))
    return root


def test_the_verb_prints_and_writes(capsys, camvid, tmp_path):
    out = tmp_path / "new" / "w.json"
    words = ["data", "weights", "camvid", "--root", str(camvid), "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    wanted = recount(maps(), 1.0, False)
    for name, weight in zip(SPACE.names, wanted):
        assert any(line.split()[:1] == [name] and line.endswith(f"{weight:.4f}") for line in shown.split("\n"))
    assert list(read(out, SPACE).values()) == pytest.approx(wanted)

    assert main([*words, "--json", "--count-void", "--power", "0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert (document["data"], document["split"], document["images"]) == ("camvid", "train", 6)
    assert (document["count_void"], document["power"], document["broken"]) == (True, 0.5, [])
    assert [row["weight"] for row in document["classes"]] == pytest.approx(recount(maps(), 0.5, True))
    for i, row in enumerate(document["classes"]):
        shows = [m for m in maps() if i in m]
        assert row["pixels"] == sum((m == i).sum() for m in shows)
        assert row["labelled_pixels"] == sum((m != 255).sum() for m in shows)
        assert row["image_pixels"] == sum(m.size for m in shows)
        assert row["frequency"] == pytest.approx(row["pixels"] / row["image_pixels"])


def test_the_verb_names_broken_images_and_goes_on(capsys, camvid, tmp_path):
    (camvid / "trainannot/f2.png").write_bytes(b"")
    out = tmp_path / "w.json"
    words = ["data", "weights", "camvid", "--root", str(camvid), "--out", str(out)]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "enfilade: f2:" in captured.err
    assert "f2.png is empty" in captured.err
    assert "5 images, 1 broken" in captured.out
    kept = [m for i, m in enumerate(maps()) if i != 2]
    assert list(read(out).values()) == pytest.approx(recount(kept, 1.0, False))
    assert json.loads(out.read_text())["broken"][0]["name"] == "f2"


def test_the_verb_leaves_no_file_where_it_fails(capsys, camvid, tmp_path):
    out = tmp_path / "w.json"
    words = ["data", "weights", "camvid", "--root", str(camvid), "--out", str(out)]
    assert main([*words, "--power", "-1"]) == 2
    for path in (camvid / "trainannot").iterdir():
        path.write_bytes(b"")
    assert main(words) == 2
    assert "none of the 0 images" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert main([*words[:-1], str(tmp_path / "file" / "w.json")]) == 2


# --- the real frames --------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_counts_are_those_that_others_found(shared_data):
    """Pixels and images by class of SegNet's training images, as counted by a user in caffe-segnet's issue 37."""
    from enfilade.data.camvid import CamVid

    pixels = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967]
    images = [366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201]
    counts = count(CamVid(shared_data / "camvid"), K)
    assert (counts.pixels.tolist(), counts.images.tolist(), counts.void) == (pixels, images, 2503995)
