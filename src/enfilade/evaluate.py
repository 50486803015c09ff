"""The scoring protocols: predictions at the ground truth's own size, one frame at a time, on the usual crop.

Segmentation averages over the data set's confusion matrix; depth averages per image or over all pixels, named. A
reader says which crop is usual for it and which classes its files cannot tell from void.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from enfilade import labels
from enfilade.errors import UserError
from enfilade.metrics import CROPS, DepthScore, SegmentationScore
from enfilade.ops.regions import region_support
from enfilade.types import Prediction, Sample


def score(
    predictor,
    reader,
    *,
    crop: str = "auto",
    depth_average: str = "image",
    depth_cap: float = 10.0,
    limit: int | None = None,
    given: tuple[str, ...] = (),
    quiet: bool = False,
    on_frame: Callable[[int, Sample, Prediction], None] | None = None,
) -> dict[str, Any]:
    """Predict every sample of a reader and score it.

    Args:
        predictor: `enfilade.load(...)`, or any object with `predict(image, camera=...) -> Prediction` and `meta`.
        crop: "auto" (the reader's own: rows 45:471, columns 41:601 for NYUv2), or a name in `metrics.CROPS`.
        depth_average: "image" (mean of per-image scores) or "pixel" (over all pixels of the set).
        depth_cap: metres; deeper truth is not scored, deeper predictions are cut.
        limit: score only the first so many samples (said in the result).
        given: what the predictor is told of each frame although its network could do without: "support", the true
            region support, or "labels". What a network cannot do without is the truth, unless the predictor has a
            guide.
        on_frame: called after each frame, e.g. to write pictures.

    Returns: {"segmentation": ..., "depth": ..., "protocol": ..., "confusion": matrix, "names": ...}, plain types but
    for the matrix; a task without truth or prediction is missing.
    """
    from enfilade.report import progress

    space = reader.space
    meta_space = predictor.meta.get("space", "nyu40")
    lut = None if meta_space == space.name else labels.mapping(meta_space, space.name)
    ignored = tuple(sorted({*reader.ignored, *(predictor.meta.get("ignored", ()) if lut is None else ())}))
    if crop == "auto":
        window = reader.score_crop
        crop = next((name for name, value in CROPS.items() if value == window), "reader")
    elif crop in CROPS:
        window = CROPS[crop]
    else:
        raise UserError(f"no crop {crop!r}: choose auto or one of {', '.join(CROPS)}")
    window = window or (slice(None), slice(None))

    segmentation, depth = SegmentationScore(space.names, ignored), DepthScore(depth_average, cap=depth_cap)
    count = len(reader) if limit is None else min(limit, len(reader))
    if count == 0:
        raise UserError(f"nothing to score: {reader.name} has no samples in this split")
    needs = getattr(getattr(predictor, "network", None), "uses", ())
    guide = getattr(predictor, "guide", None)
    told = [name for name in dict.fromkeys((*needs, *given)) if name in given or name == "hha" or guide is None]
    seen_labels = seen_depth = False
    begun = time.perf_counter()
    for i in progress(range(count), "scoring", quiet):
        sample = reader[i]
        more = {name: true_map(sample, name) for name in told}
        prediction = predictor.predict(sample.image, camera=sample.camera, **more)
        if sample.labels is not None and prediction.labels is not None:
            seen_labels = True
            answer = prediction.labels if lut is None else lut[prediction.labels]
            answer, truth = answer[window], sample.labels[window].copy()
            truth[np.isin(truth, ignored)] = 255
            if (answer == 255).any():  # a class with no counterpart here is a wrong answer, not an ignored one
                answer = np.where(answer == 255, (truth + 1) % len(space.names), answer).astype(np.uint8)
            segmentation.update(np.ascontiguousarray(answer), truth)
        if sample.depth is not None and prediction.depth is not None:
            seen_depth = True
            depth.update(np.ascontiguousarray(prediction.depth[window]), np.ascontiguousarray(sample.depth[window]))
        if on_frame is not None:
            on_frame(i, sample, prediction)
    elapsed = time.perf_counter() - begun
    augmentation, crf = getattr(predictor, "augmentation", None), getattr(predictor, "crf", None)
    also = [other.meta.get("recipe", "given") for other in getattr(predictor, "also", ())]
    protocol = {
        "data": reader.name,
        "frames": count,
        "of": len(reader),
        "crop": crop,
        "segmentation_average": "data set (one confusion matrix)",
        "depth_average": depth_average,
        "depth_cap_m": depth_cap,
        "ignored_classes": [space.names[c] for c in ignored],
        "classes_scored": len(space) - len(ignored),
        **({"also": also} if also else {}),
        **({} if crf is None else {"crf": crf.describe()}),
        **({"given": told} if told else {}),
        **({"guide": guide.meta.get("recipe", "given")} if guide is not None else {}),
        **({"flip": False} if augmentation is None else augmentation.describe(predictor.meta["size"])),
        "seconds_per_frame": elapsed / count,
    }
    result: dict[str, Any] = {"protocol": protocol, "names": list(space.names)}
    if seen_labels:
        result |= {"segmentation": segmentation.compute(), "confusion": segmentation.confusion}
    if seen_depth:
        result["depth"] = depth.compute()
    if not (seen_labels or seen_depth):
        raise UserError(f"nothing to score: {reader.name} has neither labels nor depth that this model predicts")
    return result


def true_map(sample: Sample, name: str) -> Any:
    """A sample's true "hha", "labels" or "support".

    Raises:
        UserError: the data set lacks it.
    """
    if name == "support" and sample.labels is not None and sample.depth is not None:
        return region_support(sample.labels, sample.depth)
    value = getattr(sample, name)
    if value is None:
        raise UserError(f"{sample.name} has no {name}, which this model takes beside RGB: score it on other data")
    return value
