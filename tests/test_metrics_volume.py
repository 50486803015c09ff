"""Completion scores by hand, against plain loops, and over any split of the data."""

import json

import numpy as np
import pytest

from enfilade.errors import UserError
from enfilade.metrics_volume import CONVENTIONS, CompletionScore

NAMES = ("empty", "floor", "chair", "bed")


def line(*values):
    """A volume of one row."""
    return np.array(values, np.uint8).reshape(1, 1, -1)


def mask(text):
    return np.array([c == "1" for c in text]).reshape(1, 1, -1)


# Two images of eight and four voxels. What each convention counts of them is worked out in the tests.
TRUTH = (line(1, 1, 2, 0, 0, 2, 255, 1), line(0, 2, 2, 255))
PRED = (line(1, 2, 2, 1, 0, 0, 3, 1), line(2, 2, 0, 0))
SCORED = (mask("11111110"), mask("1111"))  # the last voxel is out of view
OCCLUDED = (mask("00111110"), mask("0111"))  # the first two are surfaces


def score(convention, images=(0, 1)):
    found = CompletionScore(convention, NAMES)
    for i in images:
        found.update(PRED[i], TRUTH[i], SCORED[i], OCCLUDED[i])
    return found


def per_class(found, key="iou"):
    return {row["name"]: row[key] for row in found["per_class"]}


def test_torchssc_by_hand():
    """SSC: voxels 0..5 of the first image, 0..2 of the second. Pairs (truth, prediction):
    (1, 1) (1, 2) (2, 2) (0, 1) (0, 0) (2, 0) | (0, 2) (2, 2) (2, 0).
    floor: hit 1, truth 2, predicted 2: 1 / 3. chair: hit 2, truth 4, predicted 4: 2 / 6. bed: nowhere.
    SC: voxels 2..5 and 1..2: (2, 2) (0, 1) (0, 0) (2, 0) | (2, 2) (2, 0): 2 hits, 1 false alarm, 2 misses."""
    found = score("torchssc").compute()
    assert per_class(found) == {"floor": pytest.approx(1 / 3), "chair": pytest.approx(2 / 6), "bed": None}
    assert found["ssc_miou"] == pytest.approx(1 / 3)
    assert found["left_out"] == ["bed"]
    assert found["sc_precision"] == pytest.approx(2 / 3)
    assert found["sc_recall"] == pytest.approx(2 / 4)
    assert found["sc_iou"] == pytest.approx(2 / 5)
    assert per_class(found, "recall") == {"floor": pytest.approx(1 / 2), "chair": pytest.approx(2 / 4), "bed": None}
    assert per_class(found, "precision") == {"floor": pytest.approx(1 / 2), "chair": pytest.approx(2 / 4), "bed": None}
    assert per_class(found, "voxels") == {"floor": 2, "chair": 4, "bed": 0}
    assert per_class(found, "predicted_voxels") == {"floor": 2, "chair": 4, "bed": 0}
    assert (found["images"], found["convention"]) == (2, "torchssc")


def test_sscnet_by_hand():
    """An unknown truth is empty: (0, 3) joins the first image's voxels, (0, 0) the second's. floor and chair as
    before; bed is predicted once and never there: 0. SC, image by image:
    (2, 2) (0, 1) (0, 0) (2, 0) (0, 3): 1 hit, 2 false alarms, 1 miss; (2, 2) (2, 0) (0, 0): 1 hit, 1 miss."""
    found = score("sscnet").compute()
    assert per_class(found) == {"floor": pytest.approx(1 / 3), "chair": pytest.approx(2 / 6), "bed": 0}
    assert found["ssc_miou"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert found["left_out"] == []
    assert found["sc_precision"] == pytest.approx((1 / 3 + 1 / 1) / 2)
    assert found["sc_recall"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found["sc_iou"] == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_image_by_hand():
    """Voxels of torchssc. floor: 1 / 3 in the first image, not in the second. chair: (1, 2) (2, 2) (2, 0) in the first,
    1 / 3, and (0, 2) (2, 2) (2, 0) in the second, 1 / 3. SC: 1 hit, 1 false alarm, 1 miss; 1 hit, 1 miss."""
    found = score("image").compute()
    assert per_class(found) == {"floor": pytest.approx(1 / 3), "chair": pytest.approx(1 / 3), "bed": None}
    assert found["ssc_miou"] == pytest.approx(1 / 3)
    assert found["sc_precision"] == pytest.approx((1 / 2 + 1 / 1) / 2)
    assert found["sc_recall"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found["sc_iou"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_images_weigh_alike_or_by_their_voxels():
    """One chair voxel of one hit in a small image; one of four in a larger: 1 and 1/4, or 2 of 5."""
    scores = {}
    for convention in CONVENTIONS:
        found = CompletionScore(convention, NAMES)
        for truth, pred in ((line(2), line(2)), (line(2, 2, 2, 2), line(2, 0, 0, 0))):
            everywhere = np.ones(truth.shape, bool)
            found.update(pred, truth, everywhere, everywhere)
        scores[convention] = found.compute()
    assert scores["torchssc"]["ssc_miou"] == scores["torchssc"]["sc_iou"] == pytest.approx(2 / 5)
    assert scores["sscnet"]["ssc_miou"] == pytest.approx(2 / 5)
    assert scores["sscnet"]["sc_iou"] == pytest.approx(5 / 8)
    assert scores["image"]["ssc_miou"] == scores["image"]["sc_iou"] == pytest.approx(5 / 8)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("torchssc", (None, 0.0, 0.0)), ("sscnet", (0.0, 0.0, 0.0)), ("image", (None, 0.0, 0.0))],
)
def test_nothing_predicted(convention, expected):
    found = CompletionScore(convention, NAMES)
    everywhere = np.ones((1, 1, 2), bool)
    found.update(line(0, 0), line(1, 0), everywhere, everywhere)
    result = found.compute()
    assert (result["sc_precision"], result["sc_recall"], result["sc_iou"]) == expected
    assert result["ssc_miou"] == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_nothing_to_score(convention):
    empty = CompletionScore(convention, NAMES).compute()
    assert empty["ssc_miou"] is empty["sc_iou"] is empty["sc_precision"] is empty["sc_recall"] is None
    assert empty["left_out"] == list(NAMES[1:])
    found = CompletionScore(convention, NAMES)
    nowhere = np.zeros((1, 1, 3), bool)
    found.update(line(1, 2, 0), line(1, 255, 0), nowhere, nowhere)
    assert found.compute()["sc_iou"] is None
    assert found.compute()["images"] == 1
    json.dumps(found.compute())


def volumes(seed, classes=5, shape=(6, 5, 7)):
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(classes - 1), 255], shape, p=[0.4, *[0.4 / (classes - 2)] * (classes - 2), 0.2])
    pred = np.where(rng.random(shape) < 0.5, truth % 255, rng.integers(0, classes, shape))
    scored = rng.random(shape) < 0.7
    return pred.astype(np.uint8), truth.astype(np.uint8), scored, scored & (rng.random(shape) < 0.5)


def plain(convention, images, classes):
    """The scores voxel by voxel, as the module tells them."""
    ssc, sc = [], []
    for pred, truth, scored, occluded in images:
        pairs, binary = [], []
        for t, p, s, o in zip(truth.ravel().tolist(), pred.ravel().tolist(), scored.ravel(), occluded.ravel()):
            if t == 255 and convention != "sscnet":
                continue
            t = 0 if t == 255 else t
            if s:
                pairs.append((t, p))
            if o and (s or convention == "sscnet"):
                binary.append((t > 0, p > 0))
        ssc.append(pairs)
        sc.append(binary)

    def iou(pairs, c):
        either = sum(c in pair for pair in pairs)
        return sum(pair == (c, c) for pair in pairs) / either if either else None

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    def share(binary, i):
        hits = binary.count((True, True))
        wholes = sum(p for _, p in binary), sum(t for t, _ in binary), sum(t or p for t, p in binary)
        none = 0.0 if convention == "sscnet" and i < 2 else None
        return hits / wholes[i] if wholes[i] else none

    if convention == "image":
        ious = [mean([iou(pairs, c) for pairs in ssc]) for c in range(1, classes)]
    else:
        ious = [iou([pair for pairs in ssc for pair in pairs], c) for c in range(1, classes)]
    groups = [[pair for binary in sc for pair in binary]] if convention == "torchssc" else sc
    return ious, mean(ious), [mean([share(binary, i) for binary in groups]) for i in range(3)]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_scores_are_those_of_plain_loops_and_of_any_split(convention):
    classes = 5
    names = ("empty", "a", "b", "c", "d")  # d is predicted only
    images = [volumes(seed) for seed in range(6)]
    images.append((*images[0][:2], images[0][2], np.zeros_like(images[0][3])))  # an image without occluded voxels
    whole, first, second = (CompletionScore(convention, names) for _ in range(3))
    for i, image in enumerate(images):
        whole.update(*image)
        (first if i % 2 else second).update(*image)
    first.merge(second)
    ious, miou, sc = plain(convention, images, classes)
    for found in (whole.compute(), first.compute()):
        assert [row["iou"] for row in found["per_class"]] == pytest.approx(ious)
        assert found["ssc_miou"] == pytest.approx(miou)
        assert [found["sc_precision"], found["sc_recall"], found["sc_iou"]] == pytest.approx(sc)
        assert found["images"] == 7
    # Joined by their counts alone, as processes do.
    again = CompletionScore(convention, names)
    again.counts = whole.counts * 1
    assert again.compute() == whole.compute()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_perfect_prediction_scores_one(convention):
    _, truth, scored, occluded = volumes(3)
    found = CompletionScore(convention)
    found.update(np.where(truth == 255, 0, truth).astype(np.uint8), truth, scored, occluded)
    result = found.compute()
    assert result["ssc_miou"] == result["sc_iou"] == result["sc_precision"] == result["sc_recall"] == 1


def test_unscored_voxels_do_not_matter():
    pred, truth, scored, occluded = volumes(4)
    for convention in CONVENTIONS:
        given, changed = CompletionScore(convention), CompletionScore(convention)
        given.update(pred, truth, scored, occluded)
        wild = np.where(scored, pred, 200).astype(np.uint8)  # not even classes
        changed.update(wild, truth, scored, occluded)
        assert given.compute() == changed.compute()


def test_errors():
    with pytest.raises(UserError, match="no convention of completion scores 'torchsc'; did you mean 'torchssc'"):
        CompletionScore("torchsc")
    with pytest.raises(UserError, match="scored for empty and at least two classes"):
        CompletionScore(names=("empty", "full"))
    found = CompletionScore(names=NAMES)
    with pytest.raises(UserError, match=r"must be of one size, not \[1, 1, 2\], \[1, 1, 3\], \[1, 1, 2\], \[1, 1, 2\]"):
        found.update(line(0, 0), line(0, 0, 0), mask("11"), mask("11"))
    with pytest.raises(UserError, match=r"1 predicted pixels lie outside the label space, e\.g\. 4"):
        found.update(line(4, 0), line(1, 0), mask("11"), mask("11"))
    with pytest.raises(UserError, match=r"ground truth pixels lie outside the label space, e\.g\. 9"):
        found.update(line(1, 0), line(9, 0), mask("11"), mask("11"))
    assert found.compute()["images"] == 0
    with pytest.raises(UserError, match="of different conventions or classes cannot be merged"):
        found.merge(CompletionScore("image", NAMES))
    with pytest.raises(UserError, match="cannot be merged"):
        found.merge(CompletionScore())
