"""Which kernels the dense CRF behind a model should have: mIoU on the frames that choose, and on all others.

    python benchmarks/crf_settings.py --root DIR                       # NYUv2; the default model
    python benchmarks/crf_settings.py --root DIR --model gad-nyuv2 --only 0 1 2

Every fifth validation frame chooses among the settings; the rest judges those named by --only. The network answers
once for each frame, and every setting refines the same answers.
"""

import argparse

import numpy as np
import torch

import enfilade
from enfilade.metrics import SegmentationScore
from enfilade.ops.crf import Kernel
from enfilade.ops.decide import decide
from enfilade.refine import CRF, MEASURED
from enfilade.report import progress
from enfilade.shipped import DEFAULT

EVERY = 5
PLACE = Kernel(xy=3.0)


def colours(xy: float, rgb: float, weight: float = 4.0, place: float = 1.0) -> CRF:
    return CRF((Kernel(xy=xy, rgb=rgb), PLACE), (weight, place))


def and_depth(kernel: Kernel, weight: float) -> CRF:
    return CRF((Kernel(xy=80.0, rgb=8.0), kernel, PLACE), (4.0, weight, 1.0))


SETTINGS: list[CRF | None] = [
    None,
    CRF(),
    CRF((Kernel(xy=160.0, rgb=8.0), Kernel(xy=100.0, depth=0.2), PLACE), (4.0, 1.0, 1.0)),  # until 2026-11-22
    *(colours(xy, 8.0) for xy in (50.0, 60.0, 100.0, 160.0)),
    *(colours(80.0, rgb) for rgb in (5.0, 6.5, 10.0)),
    *(colours(80.0, 8.0, weight) for weight in (3.0, 6.0, 8.0)),
    *(colours(80.0, 8.0, place=place) for place in (0.0, 2.0)),
    MEASURED,
    and_depth(Kernel(xy=40.0, depth=0.1), 1.0),
    and_depth(Kernel(xy=80.0, depth=0.5), 0.5),
    CRF((Kernel(xy=80.0, rgb=8.0, depth=1.0), PLACE), (4.0, 1.0)),
]


class Recorder:
    """Stands where the CRF would, and keeps what it is given."""

    def __call__(self, probabilities, image, depth):
        self.seen = probabilities.half(), image.half(), depth
        return probabilities


def answers(model: str, reader) -> list[tuple]:
    """Of each frame: what the CRF is given, and the true labels."""
    predictor, found = enfilade.load(model, crf=False, device="cpu"), []
    predictor.crf = recorder = Recorder()  # pyright: ignore[reportAttributeAccessIssue]
    for i in progress(range(len(reader)), "answers"):
        sample = reader[i]
        predictor.predict(sample.image, camera=sample.camera)
        truth = np.where(np.isin(sample.labels, reader.ignored), 255, sample.labels).astype(np.uint8)
        found.append((recorder.seen, truth))
    return found


def score(crf: CRF | None, frames: list[tuple], reader) -> SegmentationScore:
    scores, window = SegmentationScore(reader.space.names, reader.ignored), reader.score_crop
    for (probabilities, image, depth), truth in frames:
        refined = probabilities.float() if crf is None else crf(probabilities.float(), image.float(), depth)
        labels, _ = decide(refined[0].numpy(), *truth.shape)
        scores.update(np.ascontiguousarray(labels[window]), np.ascontiguousarray(truth[window]))
    return scores


def show(title: str, scores: dict[int, SegmentationScore]) -> None:
    print(f"\n| {title} | mIoU | pixel acc. | mean acc. |\n|---|---|---|---|")
    for number, found in scores.items():
        told, crf = found.compute(), SETTINGS[number]
        numbers = " | ".join(f"{100 * told[k]:.1f}" for k in ("miou", "pixel_accuracy", "mean_accuracy"))
        print(f"| {'no CRF' if crf is None else crf.describe()} | {numbers} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of NYUv2")
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--only", type=int, nargs="*", default=[0, 1, 2], help="settings to judge by all other frames")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reader = enfilade.open_dataset("nyuv2", args.root, "val")
    found = answers(args.model, reader)
    judge = [frame for i, frame in enumerate(found) if i % EVERY]
    chose = {number: score(crf, found[::EVERY], reader) for number, crf in enumerate(SETTINGS)}
    show(f"{len(found) - len(judge)} frames that choose", chose)
    judged = {number: score(SETTINGS[number], judge, reader) for number in args.only}
    show(f"{len(judge)} frames that judge", judged)
    for number, scores in judged.items():
        scores.merge(chose[number])
    show(f"{len(found)} frames together", judged)


if __name__ == "__main__":
    main()
