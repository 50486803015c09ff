"""Scores against scikit-learn, torchmetrics and the formulas; and that no split of the data changes them."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, recall_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from enfilade.errors import UserError
from enfilade.metrics import (
    CROPS,
    DEPTH_KEYS,
    DepthScore,
    SegmentationScore,
    argmax_confusion,
    confusion,
    confusion_reference,
    crop,
)
from enfilade.report import confusion_picture, progress, table, write_report

NAMES = tuple("abcdefg")
K = len(NAMES)


def labels(seed=0, shape=(5, 30, 40), absent=(), classes=K):
    """Predictions and ground truth with a tenth of it ignored; `absent` classes never occur in the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([c for c in range(classes) if c not in absent], shape)
    pred = np.where(rng.random(shape) < 0.6, truth, rng.integers(0, classes, shape))
    truth[rng.random(shape) < 0.1] = 255
    return pred.astype(np.uint8), truth.astype(np.uint8)


def scored(pred, truth, names=NAMES, ignored=()):
    score = SegmentationScore(names, ignored)
    for p, t in zip(pred, truth):
        score.update(p, t)
    return score


# ------------------------------------------------------------------------------------------------------- confusion


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.int16])
def test_confusion_is_scikit_learns(kind):
    pred, truth = (a.astype(kind) for a in labels())
    valid = truth != 255
    expected = confusion_matrix(truth[valid], pred[valid], labels=range(K))
    np.testing.assert_array_equal(confusion(pred, truth, K), expected)
    np.testing.assert_array_equal(confusion_reference(pred, truth, K), expected)
    half = pred[..., ::2], truth[..., ::2]  # not contiguous
    np.testing.assert_array_equal(confusion(*half, K), confusion_reference(*half, K))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (31, 47), (2, 5)])
def test_argmax_confusion_is_argmax_then_confusion(shape, threads):
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((K, *shape)).astype(np.float32)
    logits = np.round(logits, 1)  # ties: the first class wins, as in numpy
    logits[:, 0, 0] = -np.inf
    truth = labels(shape=shape)[1]
    expected = confusion_reference(logits.argmax(0), truth, K)
    np.testing.assert_array_equal(argmax_confusion(logits, truth, threads=threads), expected)
    last = np.ascontiguousarray(logits.transpose(1, 2, 0)).transpose(2, 0, 1)  # channels last
    np.testing.assert_array_equal(argmax_confusion(last, truth, threads=threads), expected)


def test_labels_outside_the_space_are_refused():
    truth, pred = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    pred[1, 2:] = K
    with pytest.raises(UserError, match=r"2 predicted pixels .* e\.g\. 7: labels must be 0\.\.6$"):
        confusion(pred, truth, K)
    truth[1, 2:] = 255
    assert confusion(pred, truth, K).sum() == 14  # where the truth is ignored, so is the prediction
    truth[3, 3] = 41
    with pytest.raises(UserError, match=r"1 ground truth pixels .* e\.g\. 41: .* 255, ignored"):
        confusion(np.zeros_like(pred), truth, K)
    with pytest.raises(UserError, match=r"1 ground truth pixels"):
        argmax_confusion(np.zeros((K, 4, 4), np.float32), truth)
    with pytest.raises(UserError, match="1 predicted pixels"):
        confusion(np.full((1, 1), -1), np.zeros((1, 1), np.int64), K)


def test_nan_logits_are_refused():
    logits = np.zeros((3, 2, 2), np.float32)
    logits[1, 1, 1] = np.nan
    with pytest.raises(UserError, match="1 logits are NaN"):
        argmax_confusion(logits, np.zeros((2, 2), np.uint8))


# ---------------------------------------------------------------------------------------------------- segmentation


def test_scores_are_scikit_learns_and_torchmetrics():
    pred, truth = labels()
    got = scored(pred, truth).compute()
    valid = truth != 255
    p, t = pred[valid], truth[valid]
    close = pytest.approx
    assert got["pixel_accuracy"] == close((p == t).mean())
    assert got["miou"] == close(jaccard_score(t, p, average="macro"))
    assert got["fwiou"] == close(jaccard_score(t, p, average="weighted"))
    assert got["mean_accuracy"] == close(recall_score(t, p, average="macro"))
    assert [c["iou"] for c in got["per_class"]] == close(jaccard_score(t, p, average=None))
    f1 = f1_score(t, p, average=None)  # IoU = F1 / (2 - F1): a second way to the same number
    assert [c["iou"] for c in got["per_class"]] == close(f1 / (2 - f1))
    assert [c["pixels"] for c in got["per_class"]] == [int((t == c).sum()) for c in range(K)]
    assert [c["predicted_pixels"] for c in got["per_class"]] == [int((p == c).sum()) for c in range(K)]
    assert (got["classes_present"], got["left_out"], got["pixels"]) == (K, [], int(valid.sum()))

    tensors = torch.from_numpy(pred).long(), torch.from_numpy(truth).long()
    # torchmetrics sums in float32
    assert got["miou"] == close(float(MulticlassJaccardIndex(K, ignore_index=255)(*tensors)), rel=1e-6)
    assert got["mean_accuracy"] == close(float(MulticlassAccuracy(K, ignore_index=255)(*tensors)), rel=1e-6)


def test_classes_absent_from_the_truth_are_left_out_and_named():
    pred, truth = labels(absent=(2, 5))
    assert (pred == 2).any()
    got = scored(pred, truth).compute()
    valid = truth != 255
    there = [0, 1, 3, 4, 6]
    assert got["left_out"] == ["c", "f"]
    assert got["classes_present"] == 5
    expected = jaccard_score(truth[valid], pred[valid], labels=there, average="macro")
    assert got["miou"] == pytest.approx(expected)
    assert got["per_class"][2]["iou"] is None
    assert got["per_class"][2]["predicted_pixels"] > 0


def test_ignored_classes_are_skipped_in_the_truth_and_wrong_in_the_prediction():
    pred, truth = labels()
    got = scored(pred, truth, ignored=(1, 4)).compute()
    valid = (truth != 255) & (truth != 1) & (truth != 4)
    p, t, there = pred[valid], truth[valid], [0, 2, 3, 5, 6]
    assert got["pixel_accuracy"] == pytest.approx((p == t).mean())
    assert got["miou"] == pytest.approx(jaccard_score(t, p, labels=there, average="macro"))
    assert (got["ignored"], got["left_out"], got["pixels"]) == (["b", "e"], [], int(valid.sum()))
    assert [c["name"] for c in got["per_class"]] == list("acdfg")


def test_mean_image_iou_follows_its_definition():
    pred, truth = labels(shape=(6, 4, 5), absent=(3,))
    per_class = []
    for c in range(K):
        ious = []
        for p, t in zip(pred, truth):
            p, t = p[t != 255], t[t != 255]
            union = ((p == c) | (t == c)).sum()
            if union and ((p == c) & (t == c)).sum():
                ious.append(((p == c) & (t == c)).sum() / union)
        if ious:
            per_class.append(np.mean(ious))
    got = scored(pred, truth).compute()
    assert got["mean_image_iou"] == pytest.approx(np.mean(per_class))
    # Images that miss the class altogether do not count: that is why it must never stand beside mIoU.
    assert got["mean_image_iou"] > got["miou"]


def test_perfect_all_ignored_empty_and_single_class():
    _, truth = labels()
    perfect = scored(np.where(truth == 255, 0, truth), truth).compute()
    for key in ("pixel_accuracy", "mean_accuracy", "miou", "fwiou", "mean_image_iou"):
        assert perfect[key] == 1

    nothing = SegmentationScore(NAMES)
    nothing.update(truth[0], np.full_like(truth[0], 255))
    nothing.update(np.zeros((0, 4), np.uint8), np.zeros((0, 4), np.uint8))
    got = nothing.compute()
    assert got == SegmentationScore(NAMES).compute()
    for key in ("pixel_accuracy", "mean_accuracy", "miou", "fwiou", "mean_image_iou"):
        assert got[key] is None
    assert (got["pixels"], got["left_out"]) == (0, list(NAMES))

    one = SegmentationScore(["all"])
    one.update(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
    assert one.compute()["miou"] == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.permutations(range(6)), st.integers(0, 99))
def test_segmentation_does_not_depend_on_order_or_split(cuts, order, seed):
    pred, truth = labels(seed, shape=(6, 3, 5))
    whole = scored(pred, truth)
    parts = [scored(pred[list(o)], truth[list(o)]) for o in np.split(np.array(order), sorted(cuts))]
    for part in parts[1:]:
        parts[0].merge(part)
    np.testing.assert_array_equal(parts[0].confusion, whole.confusion)
    # Only mean_image_iou adds real numbers, whose order may show in the last digit.
    assert parts[0].compute()["mean_image_iou"] == pytest.approx(whole.compute()["mean_image_iou"], rel=1e-12)
    for key, value in whole.compute().items():
        assert key == "mean_image_iou" or parts[0].compute()[key] == value
    joined = SegmentationScore(NAMES)  # what processes do: add `counts`
    joined.counts = sum((scored(p[None], t[None]).counts for p, t in zip(pred, truth)), np.zeros((K + 2, K)))
    assert joined.compute()["miou"] == whole.compute()["miou"]


def test_update_logits_is_update_of_the_argmax():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((K, 20, 30)).astype(np.float32)
    truth = labels(shape=(20, 30))[1]
    a, b = SegmentationScore(NAMES, (2,)), SegmentationScore(NAMES, (2,))
    a.update_logits(logits, truth)
    b.update(logits.argmax(0), truth)
    np.testing.assert_array_equal(a.counts, b.counts)
    with pytest.raises(UserError, match="logits of 6 classes cannot be scored as 7"):
        a.update_logits(logits[:-1], truth)
    with pytest.raises(UserError, match="cannot be scored against labels"):
        a.update_logits(logits[:, :-1], truth)


def test_misuse_of_segmentation_scores_is_told():
    zeros = np.zeros((4, 4), np.uint8)
    with pytest.raises(UserError, match="cannot be scored against"):
        SegmentationScore(NAMES).update(zeros, zeros[:2])
    with pytest.raises(UserError, match="different classes"):
        SegmentationScore(NAMES).merge(SegmentationScore(NAMES, ignored=(1,)))
    with pytest.raises(UserError, match=r"must lie in 0\.\.6"):
        SegmentationScore(NAMES, ignored=(7,))
    with pytest.raises(UserError, match="at least one class"):
        SegmentationScore([])


# ----------------------------------------------------------------------------------------------------------- depth


def depths(seed=0, count=4, shape=(20, 30)):
    """True depth with holes, more from image to image, and values beyond the cap; predictions some per cent off."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.5, 11, (count, *shape))
    pred = truth * np.exp(rng.normal(0.05, 0.2, truth.shape)) + 0.01
    for i in range(count):
        truth[i][rng.random(shape) < 0.2 + 0.6 * i / count] = 0
    return pred.astype(np.float32), truth.astype(np.float32)


def formulas(pred, truth, cap=10.0, minimum=1e-3):
    """Section 4.2 of the paper, written down directly for one set of pixels."""
    pred, truth = pred.astype(np.float64), truth.astype(np.float64)
    valid = (truth > 0) & (truth <= cap)
    d, t = np.clip(pred[valid], minimum, cap), truth[valid]
    worst, log = np.maximum(d / t, t / d), np.log(d) - np.log(t)
    equalised = np.log(d * np.exp(-log.mean())) - np.log(t)
    return {
        "delta1": (worst < 1.25).mean(),
        "delta2": (worst < 1.25**2).mean(),
        "delta3": (worst < 1.25**3).mean(),
        "abs_rel": (abs(d - t) / t).mean(),
        "sq_rel": ((d - t) ** 2 / t).mean(),
        "rmse": np.sqrt(((d - t) ** 2).mean()),
        "rmse_log": np.sqrt((log**2).mean()),
        "rmse_log_si": np.sqrt((equalised**2).mean()),
        "log_si": np.mean((log[:, None] - log[None, :]) ** 2) / 2,  # Eq. (4) is the sum over pairs, twice the variance
        "log10": abs(np.log10(d) - np.log10(t)).mean(),
    }


def scored_depth(pred, truth, **options):
    score = DepthScore(**options)
    for p, t in zip(pred, truth):
        score.update(p, t)
    return score


def test_depth_per_image_follows_the_formulas():
    pred, truth = depths()
    got = scored_depth(pred, truth).compute()
    each = [formulas(p, t) for p, t in zip(pred, truth)]
    assert set(each[0]) == set(DEPTH_KEYS)
    for key in DEPTH_KEYS:
        assert got[key] == pytest.approx(np.mean([e[key] for e in each]), rel=1e-9), key
    assert (got["images"], got["images_without_depth"], got["average"]) == (4, 0, "image")


def test_depth_per_pixel_pools_all_pixels():
    pred, truth = depths()
    got = scored_depth(pred, truth, average="pixel", cap=8.0, minimum=0.7).compute()
    pooled = formulas(pred, truth, cap=8.0, minimum=0.7)
    # The scale is each image's own: its variance is pooled, not the variance of all pixels together.
    counts = [((t > 0) & (t <= 8)).sum() for t in truth]
    pooled["log_si"] = np.average([formulas(p, t, 8.0, 0.7)["log_si"] for p, t in zip(pred, truth)], weights=counts)
    pooled["rmse_log_si"] = math.sqrt(pooled["log_si"])
    for key in DEPTH_KEYS:
        assert got[key] == pytest.approx(pooled[key], rel=1e-9), key


def test_the_two_averages_differ_as_they_should():
    """One bad image with few valid pixels counts half per image, and by its pixels otherwise."""
    truth = np.full((2, 10, 10), 2.0)
    truth[1, 1:] = 0  # ten valid pixels against a hundred
    pred = truth * [[[1.0]], [[1.5]]]
    image = scored_depth(pred, truth).compute()
    pixel = scored_depth(pred, truth, average="pixel").compute()
    assert image["abs_rel"] == pytest.approx(0.25)
    assert pixel["abs_rel"] == pytest.approx(0.5 * 10 / 110)
    assert image["rmse"] == pytest.approx(0.5)
    assert pixel["rmse"] == pytest.approx(math.sqrt(10 / 110))
    same = scored_depth(pred[:1], truth[:1])
    assert same.compute()["abs_rel"] == scored_depth(pred[:1], truth[:1], average="pixel").compute()["abs_rel"]


def test_a_perfect_prediction():
    _, truth = depths()
    got = scored_depth(truth, truth).compute()
    assert [got[k] for k in DEPTH_KEYS] == [1, 1, 1] + [0] * 7


def test_scale_invariance():
    pred, truth = depths()
    truth, pred = np.clip(truth, 0, 4), np.clip(pred, 0.1, 4)
    # Scales that clip nothing to [1e-3, 10].
    a, b = (scored_depth(pred * s, truth).compute() for s in (1.0, 2.0))
    for key in ("rmse_log_si", "log_si"):
        assert a[key] == pytest.approx(b[key], rel=1e-6)  # float32 inputs
    assert b["rmse_log"] > 1.5 * a["rmse_log"]
    constant = scored_depth(truth * 2, truth).compute()
    assert constant["rmse_log_si"] == 0
    assert constant["rmse_log"] == pytest.approx(math.log(2))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["image", "pixel"]),
    st.lists(st.integers(0, 5), max_size=4),
    st.permutations(range(6)),
    st.integers(0, 99),
)
def test_depth_does_not_depend_on_order_or_split(average, cuts, order, seed):
    pred, truth = depths(seed, count=6, shape=(3, 4))
    truth[seed % 6] = 0  # an image without depth
    whole = scored_depth(pred, truth, average=average).compute()
    parts = [
        scored_depth(pred[list(o)], truth[list(o)], average=average) for o in np.split(np.array(order), sorted(cuts))
    ]
    for part in parts[1:]:
        parts[0].merge(part)
    split = parts[0].compute()
    for key in DEPTH_KEYS:
        assert split[key] == pytest.approx(whole[key], rel=1e-12)  # sums in another order
    assert (split["images"], split["images_without_depth"]) == (whole["images"], whole["images_without_depth"])


@pytest.mark.parametrize("average", ["image", "pixel"])
def test_depth_of_nothing(average):
    score = DepthScore(average=average)
    score.update(np.ones((3, 3)), np.zeros((3, 3)))
    score.update(np.ones((3, 3)), np.full((3, 3), np.nan))  # unknown, too
    score.update(np.full((3, 3), np.nan), np.full((3, 3), 10.5))  # beyond the cap: whatever was predicted
    got = score.compute()
    assert all(got[key] is None for key in DEPTH_KEYS)
    assert (got["images"], got["images_without_depth"]) == (0, 3)


def test_the_crop_is_the_usual_one():
    pred, truth = depths(count=1, shape=(480, 640))
    got = scored_depth(pred, truth, crop="nyu").compute()
    inside = scored_depth(pred[:, 45:471, 41:601], truth[:, 45:471, 41:601]).compute()
    assert {k: got[k] for k in DEPTH_KEYS} == {k: inside[k] for k in DEPTH_KEYS}
    assert got["crop"] == "nyu"
    assert crop(np.zeros((480, 640, 3))).shape == (426, 560, 3)
    assert crop(np.zeros((7, 9)), "none").shape == (7, 9)
    assert list(CROPS) == ["none", "nyu"]
    with pytest.raises(UserError, match="meant for 640x480 images, not 9x7"):
        crop(np.zeros((7, 9)))
    with pytest.raises(UserError, match="no crop is named 'eigen': use one of none, nyu"):
        crop(np.zeros((7, 9)), "eigen")


def test_misuse_of_depth_scores_is_told():
    ones = np.ones((4, 4))
    with pytest.raises(UserError, match="NaN at 16 pixels"):
        DepthScore().update(ones * np.nan, ones)
    with pytest.raises(UserError, match="cannot be scored against"):
        DepthScore().update(ones, ones[:2])
    with pytest.raises(UserError, match="cannot be merged"):
        DepthScore().merge(DepthScore(average="pixel"))
    with pytest.raises(UserError, match="use 'image' or 'pixel'"):
        DepthScore(average="batch")
    with pytest.raises(UserError, match="0 < min < cap"):
        DepthScore(cap=0.0)
    with pytest.raises(UserError, match="no crop is named"):
        DepthScore(crop="eigen")


# ---------------------------------------------------------------------------------------------------------- report


def result():
    pred, truth = labels(absent=(2,))
    segmentation = scored(pred, truth, names=("floor", *NAMES[1:]), ignored=(6,)).compute()
    return {"recipe": "gad [1]", "segmentation": segmentation, "depth": scored_depth(*depths()).compute()}


def test_report_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_report(result(), path)
    assert json.loads(path.read_text()) == result()
    write_report({"a": np.float32(0.5), "b": float("nan"), "c": np.arange(3), "d": path}, path)
    assert json.loads(path.read_text()) == {"a": 0.5, "b": None, "c": [0, 1, 2], "d": str(path)}
    with pytest.raises(TypeError):
        write_report({"a": object()}, path)
    assert json.loads(path.read_text())["a"] == 0.5  # the old report is whole
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_table_shows_scores_by_frequency():
    r = result()
    text = table(r)
    assert "recipe: gad [1]" in text  # not taken for markup
    lines = text.splitlines()
    score = next(line for line in lines if "mean IoU" in line)
    assert score.split()[-1] == f"{100 * r['segmentation']['miou']:.1f}"
    assert next(line for line in lines if "RMSE, m" in line).split()[2] == f"{r['depth']['rmse']:.3f}"
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["class", "share"]) + 2
    shares = [float(line.split()[1]) for line in lines[start : start + r["segmentation"]["classes_present"]]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.01 * len(shares))
    assert "left out: c" in text
    assert "ignored: g" in text
    assert max(map(len, lines)) <= 100
    assert "mean IoU" in table(r["segmentation"])
    assert "mean IoU" not in table(r["depth"])
    empty = table({"segmentation": SegmentationScore(NAMES).compute(), "depth": DepthScore().compute()})
    assert "left out: a, b, c, d, e, f, g" in empty


def test_picture_of_a_confusion_matrix(tmp_path):
    path = tmp_path / "confusion.png"
    matrix = np.array([[90, 10, 0], [50, 50, 0], [0, 0, 0]])
    confusion_picture(matrix, ["floor", "wall", "sofa"], path)
    image = np.asarray(Image.open(path).convert("L")).astype(int)
    # Cells are 56 pixels here; find them by the grey row of the class that never occurs.
    ys, xs = np.nonzero(np.all(np.asarray(Image.open(path)) == (226, 226, 230), axis=-1))
    top, left = ys.min(), xs.min()
    corner = [[image[top - 56 * (2 - i) + 3, left + 56 * j + 3] for j in range(3)] for i in range(2)]
    assert corner[0][0] < corner[1][0] == corner[1][1] < corner[0][1] < corner[0][2] == corner[1][2] == 255
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.png"]
    confusion_picture(np.zeros((0, 0), np.int64), [], path)
    with pytest.raises(ValueError, match="needs 3 names, not 2"):
        confusion_picture(matrix, ["a", "b"], path)


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_passes_items_on_and_keeps_the_output_clean(capsys, quiet):
    assert list(progress(range(5), "scoring", quiet)) == list(range(5))
    assert list(progress(iter("ab"), "scoring", quiet)) == ["a", "b"]
    assert capsys.readouterr().out == ""
