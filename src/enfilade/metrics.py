"""Scores of segmentation and depth, from counts that can be added up.

Both scores keep nothing but sums (`.counts`, one float64 array), so that images may come one by one, in any order and
on any number of processes: adding two `.counts` is what `merge` does. Pixel counts are whole numbers and therefore
exact; sums of real numbers agree to the last roundings of float64.

Arrays are numpy. A tensor's owner calls `.numpy()`; importing this module does not import torch.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Integer, Shaped
from numba import njit

from enfilade.errors import UserError

IGNORE = 255

# The part of a 480x640 Kinect frame that holds projected depth, as Eigen et al. 2014 score it: rows, columns.
NYU_CROP = (slice(45, 471), slice(41, 601))
CROPS: dict[str, tuple[slice, slice] | None] = {"none": None, "nyu": NYU_CROP}
NYU_SIZE = (480, 640)


def crop(array: Shaped[np.ndarray, "h w *more"], name: str = "nyu") -> Shaped[np.ndarray, "_ _ *more"]:
    """The part of an image that the protocol `name` (a key of `CROPS`) scores; a view.

    Raises UserError for an unknown name, and where "nyu" is asked of an image that is not 480 rows by 640 columns."""
    if name not in CROPS:
        raise UserError(f"no crop is named {name!r}: use one of {', '.join(CROPS)}")
    window = CROPS[name]
    if window is None:
        return array
    if array.shape[:2] != NYU_SIZE:
        size = "x".join(str(n) for n in array.shape[1::-1])
        raise UserError(f"the crop {name!r} is meant for 640x480 images, not {size}: score with crop='none'")
    return array[window]


# ---------------------------------------------------------------------------------------------- confusion matrices


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _count(pred, target, classes, ignore, counts):
    """Adds to counts[4, k * k]; returns how many pixels had a bad target, a bad prediction, and one example of each."""
    bad_target, bad_pred, example_target, example_pred = 0, 0, 0, 0
    for i in range(len(pred)):
        t, p = np.int64(target[i]), np.int64(pred[i])
        if t == ignore:
            continue
        if t < 0 or t >= classes:
            bad_target, example_target = bad_target + 1, t
        elif p < 0 or p >= classes:
            bad_pred, example_pred = bad_pred + 1, p
        else:
            # Neighbours mostly hit the same cell; four tables in turn spare each from waiting for the last store.
            counts[i & 3, t * classes + p] += 1
    return bad_target, bad_pred, example_target, example_pred


@njit(cache=True, nogil=True)
@no_type_check
def _argmax_count(logits, target, start, stop, ignore, counts):
    """As `_count` on pixels start..stop of logits[k, n]; additionally returns how many logits were NaN."""
    classes, width = len(logits), 512  # one block of running maxima stays in the first-level cache
    best, where = np.empty(width, np.float32), np.empty(width, np.int32)
    bad_target, example_target, nan = 0, 0, 0
    for left in range(start, stop, width):
        n = min(width, stop - left)
        first = logits[0, left : left + n]
        for i in range(n):
            best[i], where[i] = first[i], 0
            nan += first[i] != first[i]
        for c in range(1, classes):
            row = logits[c, left : left + n]
            for i in range(n):  # selects, no branches: this loop is vectorised
                above = row[i] > best[i]
                best[i] = row[i] if above else best[i]
                where[i] = c if above else where[i]
                nan += row[i] != row[i]
        for i in range(n):
            t = np.int64(target[left + i])
            if t == ignore:
                continue
            if t < 0 or t >= classes:
                bad_target, example_target = bad_target + 1, t
            else:
                counts[i & 3, t * classes + where[i]] += 1
    return bad_target, example_target, nan


def _refuse_labels(kind: str, number, example, classes: int, ignore: int) -> None:
    if number:
        but = f" (or {ignore}, ignored)" if kind == "ground truth" else ""
        raise UserError(
            f"{number} {kind} pixels lie outside the label space, e.g. {example}: labels must be 0..{classes - 1}{but}"
        )


def confusion(
    pred: Integer[np.ndarray, "*s"], target: Integer[np.ndarray, "*_s"], classes: int, ignore: int = IGNORE
) -> Int64[np.ndarray, "k k"]:
    """Pixel counts, rows = truth, columns = prediction. Pixels whose target is `ignore` are skipped.

    Raises UserError where sizes differ, and where a counted pixel's label or prediction is not in 0..classes-1: a wrong
    label space would otherwise pass as a poor score."""
    if pred.shape != target.shape:
        raise UserError(f"a prediction of shape {pred.shape} cannot be scored against labels of {target.shape}")
    counts = np.zeros((4, classes * classes), np.int64)
    bad_target, bad_pred, example_target, example_pred = _count(
        np.ascontiguousarray(pred).reshape(-1), np.ascontiguousarray(target).reshape(-1), classes, ignore, counts
    )
    _refuse_labels("ground truth", bad_target, example_target, classes, ignore)
    _refuse_labels("predicted", bad_pred, example_pred, classes, ignore)
    return counts.sum(0).reshape(classes, classes)


def confusion_reference(
    pred: Integer[np.ndarray, "*s"], target: Integer[np.ndarray, "*s"], classes: int, ignore: int = IGNORE
) -> Int64[np.ndarray, "k k"]:
    """`confusion`, plainly; labels outside the space end in an IndexError or a wrong count."""
    matrix = np.zeros((classes, classes), np.int64)
    valid = target != ignore
    np.add.at(matrix, (target[valid].astype(np.int64), pred[valid].astype(np.int64)), 1)
    return matrix


def argmax_confusion(
    logits: Float32[np.ndarray, "k *s"], target: Integer[np.ndarray, "*_s"], ignore: int = IGNORE, threads: int = 1
) -> Int64[np.ndarray, "k k"]:
    """`confusion(logits.argmax(0), target, k)` in one pass, without the label map; the lowest index wins a tie.

    `logits` is read fastest when contiguous. Raises UserError on sizes that differ, labels outside 0..k-1 and
    NaN logits."""
    if logits.shape[1:] != target.shape:
        raise UserError(f"logits of shape {logits.shape} cannot be scored against labels of {target.shape}")
    classes = len(logits)
    flat, labels = np.ascontiguousarray(logits).reshape(classes, -1), np.ascontiguousarray(target).reshape(-1)
    edges = np.linspace(0, len(labels), threads + 1).astype(int)
    counts = np.zeros((threads, 4, classes * classes), np.int64)

    def part(i):
        return _argmax_count(flat, labels, int(edges[i]), int(edges[i + 1]), ignore, counts[i])

    if threads == 1:
        found = [part(0)]
    else:  # the kernel releases the GIL; no OpenMP, which would not survive the fork of a data loader
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(part, range(threads)))
    if nan := sum(f[2] for f in found):
        raise UserError(f"{nan} logits are NaN: the network has diverged, or its input was not finite")
    for bad, example, _ in found:
        _refuse_labels("ground truth", bad, example, classes, ignore)
    return counts.sum((0, 1)).reshape(classes, classes)


# ---------------------------------------------------------------------------------------------------- segmentation


def _ratio(a: Float64[np.ndarray, "k"], b: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "k"]:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


def _iou(matrix: Float64[np.ndarray, "k k"]) -> Float64[np.ndarray, "k"]:
    hit = matrix.diagonal()
    return _ratio(hit, matrix.sum(0) + matrix.sum(1) - hit)


class SegmentationScore:
    """Segmentation scores of a data set, from one confusion matrix over all its pixels.

    Conventions:

    * Pixels labelled 255 or with one of the `ignored` classes are skipped, whatever was predicted there. A prediction
      of an ignored class on a counted pixel is wrong: it costs the true class, as any other confusion does.
    * mIoU and mean accuracy average over the classes that occur in the ground truth and are not ignored. A class that
      is only ever predicted has no term of its own; those pixels count as misses of their true classes. `left_out`
      names the classes without a term, `classes_present` says how many have one.
    * fwIoU weighs each class's IoU with its share of the ground-truth pixels (Long et al. 2015).
    * `mean_image_iou` is another score, not another estimate of mIoU: per class, the mean of the image's own IoU over
      those images where it is not zero, then the mean over classes that have such an image. It forgives every miss
      and is here only because the released evaluation of GAD reports it. Never set it beside a `miou`.

    `counts` is [k + 2, k]: the confusion matrix (rows = truth), then per class the sum of the non-zero image IoUs and
    the number of those images. To join processes, add their `counts`.
    """

    def __init__(self, space_names: Sequence[str], ignored: Sequence[int] = ()):
        self.names, self.ignored = tuple(space_names), tuple(ignored)
        k = len(self.names)
        if not k:
            raise UserError("a segmentation score needs the names of at least one class")
        if any(not 0 <= c < k for c in self.ignored):
            raise UserError(f"ignored classes {list(self.ignored)} must lie in 0..{k - 1}")
        self.counts = np.zeros((k + 2, k))

    @property
    def confusion(self) -> Int64[np.ndarray, "k k"]:
        """Pixels, rows = truth, columns = prediction; rows of ignored classes are zero."""
        return self.counts[: len(self.names)].astype(np.int64)

    def update(self, pred: Integer[np.ndarray, "h w"], target: Integer[np.ndarray, "_h _w"]) -> None:
        """Add one image. Labels 0..k-1; target 255 is ignored. Raises UserError on sizes or labels that do not fit."""
        self._add(confusion(pred, target, len(self.names)))

    def update_logits(
        self, logits: Float32[np.ndarray, "k h w"], target: Integer[np.ndarray, "_h _w"], threads: int = 1
    ) -> None:
        """As `update(logits.argmax(0), target)`, several times faster."""
        if len(logits) != len(self.names):
            raise UserError(f"logits of {len(logits)} classes cannot be scored as {len(self.names)} classes")
        self._add(argmax_confusion(logits, target, threads=threads))

    def _add(self, matrix: Int64[np.ndarray, "k k"]) -> None:
        k, matrix = len(self.names), matrix.astype(np.float64)
        matrix[list(self.ignored)] = 0
        iou = np.nan_to_num(_iou(matrix))
        self.counts[:k] += matrix
        self.counts[k] += iou
        self.counts[k + 1] += iou > 0

    def merge(self, other: "SegmentationScore") -> None:
        """Add the images of `other`, which must score the same classes."""
        if (self.names, self.ignored) != (other.names, other.ignored):
            raise UserError("scores over different classes cannot be merged")
        self.counts += other.counts

    def compute(self) -> dict:
        """Scores as fractions in plain Python types (None where nothing was there to score), ready for JSON.

        Keys: pixel_accuracy, mean_accuracy, miou, fwiou, mean_image_iou, pixels, classes_present, left_out (names),
        ignored (names) and per_class: a list of dicts of name, iou, accuracy, pixels, predicted_pixels."""
        k = len(self.names)
        matrix, image_sum, image_number = self.counts[:k], self.counts[k], self.counts[k + 1]
        pixels, predicted, hit = matrix.sum(1), matrix.sum(0), matrix.diagonal()
        present, total = pixels > 0, matrix.sum()
        iou, accuracy = _iou(matrix), _ratio(hit, pixels)

        def mean(values, where):
            return float(values[where].mean()) if where.any() else None

        return {
            "pixel_accuracy": float(hit.sum() / total) if total else None,
            "mean_accuracy": mean(accuracy, present),
            "miou": mean(iou, present),
            "fwiou": float((pixels[present] / total) @ iou[present]) if total else None,
            "mean_image_iou": mean(_ratio(image_sum, image_number), image_number > 0),
            "pixels": int(total),
            "classes_present": int(present.sum()),
            "left_out": [n for c, n in enumerate(self.names) if not present[c] and c not in self.ignored],
            "ignored": [self.names[c] for c in self.ignored],
            "per_class": [
                {
                    "name": self.names[c],
                    "iou": float(iou[c]) if present[c] else None,
                    "accuracy": float(accuracy[c]) if present[c] else None,
                    "pixels": int(pixels[c]),
                    "predicted_pixels": int(predicted[c]),
                }
                for c in range(k)
                if c not in self.ignored
            ],
        }


# ----------------------------------------------------------------------------------------------------------- depth

# What one image contributes, in this order: sums over its valid pixels.
_SUMS = ("pixels", "delta1", "delta2", "delta3", "abs_rel", "sq_rel", "square", "log_square", "log_si", "log10")


@njit(cache=True, nogil=True)
@no_type_check
def _valid_depths(pred, target, minimum, cap, p, t):
    """Writes clipped predictions and truths of the valid pixels to p and t; returns their number, and that of NaNs."""
    n, nan = 0, 0
    for i in range(len(pred)):
        truth = np.float64(target[i])
        if 0 < truth <= cap:
            value = np.float64(pred[i])
            nan += value != value
            p[n], t[n] = min(max(value, minimum), cap), truth
            n += 1
    return n, nan


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})  # sums in vectors
@no_type_check
def _depth_sums(p, t, ratio, log):
    """The sums of `_SUMS`; ratio = p / t and its logarithm come from numpy, which has them in vectors."""
    delta1, delta2, delta3 = 0, 0, 0
    abs_rel, sq_rel, square, log_square, log_abs, shifted, shifted_square = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    origin = log[0]  # moments about the first error: a constant error then has a variance of exactly 0
    for i in range(len(p)):
        worst, error = max(ratio[i], 1 / ratio[i]), abs(p[i] - t[i])
        relative, about = error / t[i], log[i] - origin
        delta1 += worst < 1.25
        delta2 += worst < 1.25**2
        delta3 += worst < 1.25**3
        abs_rel += relative
        sq_rel += relative * error
        square += error * error
        log_square += log[i] * log[i]
        log_abs += abs(log[i])
        shifted += about
        shifted_square += about * about
    spread = max(shifted_square - shifted * shifted / len(p), 0.0)
    log10 = log_abs / math.log(10.0)
    return np.array([len(p), delta1, delta2, delta3, abs_rel, sq_rel, square, log_square, spread, log10])


def _depth_means(m: Float64[np.ndarray, "10"]) -> dict[str, float]:
    """The scores from means over pixels, ordered as `_SUMS`."""
    return {
        "delta1": float(m[1]),
        "delta2": float(m[2]),
        "delta3": float(m[3]),
        "abs_rel": float(m[4]),
        "sq_rel": float(m[5]),
        "rmse": math.sqrt(m[6]),
        "rmse_log": math.sqrt(m[7]),
        "rmse_log_si": math.sqrt(m[8]),
        "log_si": float(m[8]),
        "log10": float(m[9]),
    }


DEPTH_KEYS = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "rmse_log_si", "log_si", "log10")


class DepthScore:
    """Depth scores: those of Mousavian et al. 2016, Section 4.2 and Table 2, and log10. With prediction d, truth d*
    (metres) and D = ln d - ln d*, over the T valid pixels:

    * `delta1`, `delta2`, `delta3`: share with max(d / d*, d* / d) < 1.25, 1.25^2, 1.25^3 (higher is better)
    * `abs_rel` = `mean |d - d*| / d*`; `sq_rel` = `mean (d - d*)^2 / d*`
    * `rmse` = sqrt(mean (d - d*)^2), metres ; `rmse_log` = sqrt(mean D^2), natural logarithm
    * `log_si` = mean(D^2) - mean(D)^2, the variance of D within an image, and `rmse_log_si`, its square root: the
      RMSE of the logarithm once the image's mean log depth is made equal to the truth's (item 6 of their list, and
      Eigen et al.'s "scale-invariant" column). Their Eq. (4) is twice `log_si`; Eigen et al. 2014 Eq. (1) is half.
      Table 2's .061 for a `rmse_log` of .314 is in the range of `log_si`, not of its root, so compare with both.
    * `log10` = `mean |log10 d - log10 d*|`

    Valid: 0 < d* <= `cap`. Predictions are clipped to [`minimum`, `cap`] first. `crop` names an entry of `CROPS`.

    `average="image"` (default) scores each image and takes the mean over images that have a valid pixel;
    `average="pixel"` takes all means over the pixels of the whole data set, so that images with more valid depth
    weigh more, and roots are taken last. The scale-invariant scores remove each image's own mean in both.

    `counts` is [12]: images with valid depth, images without, and ten sums, of the images' scores or over pixels. To
    join processes, add their `counts`.
    """

    def __init__(self, average: str = "image", cap: float = 10.0, minimum: float = 1e-3, crop: str = "none"):
        if average not in ("image", "pixel"):
            raise UserError(f"average={average!r} is not known: use 'image' or 'pixel'")
        if not 0 < minimum < cap:
            raise UserError(
                f"depth is scored between minimum={minimum} and cap={cap} m: they must satisfy 0 < min < cap"
            )
        if crop not in CROPS:
            raise UserError(f"no crop is named {crop!r}: use one of {', '.join(CROPS)}")
        self.average, self.cap, self.minimum, self.crop = average, float(cap), float(minimum), crop
        self.counts = np.zeros(2 + len(_SUMS))

    def update(self, pred: Float[np.ndarray, "h w"], target: Float[np.ndarray, "_h _w"]) -> None:
        """Add one image, metres. Raises UserError on sizes that differ, or a prediction that is NaN where it counts."""
        if pred.shape != target.shape:
            raise UserError(f"a depth map of shape {pred.shape} cannot be scored against one of {target.shape}")
        flat_pred, flat_target = (np.ascontiguousarray(crop(a, self.crop)).reshape(-1) for a in (pred, target))
        p, t = np.empty(flat_pred.size), np.empty(flat_pred.size)
        n, nan = _valid_depths(flat_pred, flat_target, self.minimum, self.cap, p, t)
        if nan:
            raise UserError(f"the predicted depth is NaN at {nan} pixels that have a true depth")
        if not n:
            self.counts[1] += 1
            return
        ratio = p[:n] / t[:n]
        sums = _depth_sums(p[:n], t[:n], ratio, np.log(ratio))
        self.counts[0] += 1
        if self.average == "pixel":
            self.counts[2:] += sums
        else:
            scores = _depth_means(sums / sums[0])
            self.counts[2:] += [scores[key] for key in DEPTH_KEYS]

    def merge(self, other: "DepthScore") -> None:
        """Add the images of `other`, which must follow the same conventions."""
        if self._conventions() != other._conventions():
            raise UserError(f"scores as {self._conventions()} and {other._conventions()} cannot be merged")
        self.counts += other.counts

    def _conventions(self) -> dict:
        return {"average": self.average, "cap": self.cap, "minimum": self.minimum, "crop": self.crop}

    def compute(self) -> dict:
        """`DEPTH_KEYS` (None where no pixel was valid), images, images_without_depth and the conventions, for JSON."""
        images, without, sums = int(self.counts[0]), int(self.counts[1]), self.counts[2:]
        if not images:
            scores = dict.fromkeys(DEPTH_KEYS)
        elif self.average == "pixel":
            scores = _depth_means(sums / sums[0])
        else:
            scores = {key: float(value / images) for key, value in zip(DEPTH_KEYS, sums)}
        return scores | {"images": images, "images_without_depth": without} | self._conventions()
