"""Scores of semantic scene completion, under the three conventions that published numbers follow.

Scene completion (SC) asks where something is, semantic scene completion (SSC) also what. The conventions differ by
points; numbers of two of them never go into one table. `classes` are 1..k-1, 0 is empty.

* "torchssc" (the default; Chen et al., CVPR 2020, and most papers since): SSC on the voxels of `scored` whose truth is
  known (not 255); intersection over union of each class from sums over the data set; the mean over the classes that
  occur in truth or prediction. SC on those of them that are `occluded`; precision, recall and IoU from sums.
* "sscnet" (the official MATLAB script of Song et al., CVPR 2017): an unknown truth counts as empty. SSC on all of
  `scored`, from sums; the mean over the classes. SC on all of `occluded`, for each image alone; the mean over images.
  Precision is 0 where nothing is hit, recall where nothing is there. The script's mean is NaN where a class is in
  neither truth nor prediction of the whole data set, or an image has no union; here such are left out.
* "image": voxels as in "torchssc", but everything for each image alone. A class's IoU is the mean over the images where
  it occurs in truth or prediction, SSC the mean over classes of that; precision is the mean over the images where
  something was predicted, recall over those where something is there, IoU over those with either. Rare classes and
  small rooms weigh more.

The masks are those of `data.volumes.encode`; for "sscnet" make them with `masks="sscnet"`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Integer

from enfilade.errors import UserError, unknown
from enfilade.labels import SPACES
from enfilade.metrics import IGNORE, confusion

CONVENTIONS = ("torchssc", "sscnet", "image")
SC_KEYS = ("sc_precision", "sc_recall", "sc_iou")


class CompletionScore:
    """Completion scores of a data set; see the module for what each convention means.

    Keeps nothing but sums: `counts` is [k + 5, k], with k classes and "empty" among them: the confusion matrix of SSC
    (rows = truth); per class the sum of its images' IoUs and their number; in the first three columns of the next two
    rows, for SC, the sums of precision, recall and IoU over images and the numbers of images (or, where SC comes from
    sums: hits, false alarms and misses, and zeros); and first in the last row the images. To join processes, add their
    `counts`.
    """

    def __init__(self, convention: str = "torchssc", names: Sequence[str] = SPACES["ssc12"].names):
        if convention not in CONVENTIONS:
            raise unknown("convention of completion scores", convention, CONVENTIONS)
        if len(names) < 3:
            raise UserError(f"completion is scored for empty and at least two classes, not for {list(names)}")
        self.convention, self.names = convention, tuple(names)
        self.counts = np.zeros((len(self.names) + 5, len(self.names)))

    def update(
        self,
        pred: Integer[np.ndarray, "i j k"],
        truth: Integer[np.ndarray, "_i _j _k"],
        scored: Bool[np.ndarray, "_i _j _k"],
        occluded: Bool[np.ndarray, "_i _j _k"],
    ) -> None:
        """Add one image: labels 0..k-1, 255 in the truth where it is unknown, and the masks of SSC and SC.

        Raises UserError on sizes that differ, and where a scored voxel's label or prediction is no class."""
        if not pred.shape == truth.shape == scored.shape == occluded.shape:
            shapes = ", ".join(str(list(a.shape)) for a in (pred, truth, scored, occluded))
            raise UserError(f"prediction, truth and masks must be of one size, not {shapes}")
        if self.convention == "sscnet":
            truth = np.where(truth == IGNORE, 0, truth)
        else:
            scored = scored & (truth != IGNORE)
            occluded = occluded & scored
        k = len(self.names)
        semantic = confusion(pred[scored], truth[scored], k).astype(np.float64)
        binary = confusion(pred[occluded], truth[occluded], k)
        hits, alarms, misses = binary[1:, 1:].sum(), binary[0, 1:].sum(), binary[1:, 0].sum()
        iou = _ious(semantic)
        self.counts[:k] += semantic
        self.counts[k] += np.nan_to_num(iou)
        self.counts[k + 1] += ~np.isnan(iou)
        if self.convention == "torchssc":
            self.counts[k + 2, :3] += hits, alarms, misses
        else:
            parts, wholes = np.array([hits] * 3), np.array([hits + alarms, hits + misses, hits + alarms + misses])
            self.counts[k + 2, :3] += parts / np.maximum(wholes, 1)
            self.counts[k + 3, :3] += wholes > 0
            if self.convention == "sscnet":  # precision and recall are 0 where there is nothing to divide by
                self.counts[k + 3, :2] += wholes[:2] == 0
        self.counts[k + 4, 0] += 1

    def merge(self, other: "CompletionScore") -> None:
        """Add the images of `other`, which must follow the same convention and classes."""
        if (self.convention, self.names) != (other.convention, other.names):
            raise UserError("completion scores of different conventions or classes cannot be merged")
        self.counts += other.counts

    def compute(self) -> dict:
        """Scores as fractions in plain Python types (None where nothing was there to score), ready for JSON.

        Keys: sc_precision, sc_recall, sc_iou; ssc_miou; left_out (the classes without a term in it); images;
        convention; per_class, a list of dicts of name, iou, precision and recall (both from sums), voxels and
        predicted_voxels."""
        k = len(self.names)
        matrix = self.counts[:k]
        iou = _ratio(self.counts[k], self.counts[k + 1]) if self.convention == "image" else _ious(matrix)
        hit, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        precision, recall = _ratio(hit, predicted), _ratio(hit, truth)
        sums, numbers = self.counts[k + 2, :3], self.counts[k + 3, :3]
        if self.convention == "torchssc":
            hits, alarms, misses = sums
            sc = _ratio(np.full(3, hits), np.array([hits + alarms, hits + misses, hits + alarms + misses]))
        else:
            sc = _ratio(sums, numbers)
        there = [c for c in range(1, k) if not np.isnan(iou[c])]
        return {
            **{key: _plain(value) for key, value in zip(SC_KEYS, sc)},
            "ssc_miou": float(iou[there].mean()) if there else None,
            "left_out": [self.names[c] for c in range(1, k) if c not in there],
            "per_class": [
                {
                    "name": self.names[c],
                    "iou": _plain(iou[c]),
                    "precision": _plain(precision[c]),
                    "recall": _plain(recall[c]),
                    "voxels": int(truth[c]),
                    "predicted_voxels": int(predicted[c]),
                }
                for c in range(1, k)
            ],
            "images": int(self.counts[k + 4, 0]),
            "convention": self.convention,
        }


def _ratio(a: Float64[np.ndarray, "n"], b: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


def _ious(matrix: Float64[np.ndarray, "k k"]) -> Float64[np.ndarray, "k"]:
    hit = matrix.diagonal()
    return _ratio(hit, matrix.sum(0) + matrix.sum(1) - hit)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
