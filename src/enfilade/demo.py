"""The first thing to run: a rendered room, whose truth is known, and a photo of yours, labelled and measured."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from enfilade import images, labels, viz
from enfilade.shipped import DEFAULT
from enfilade.types import IGNORE, Prediction, Sample


def demo(
    image: str | Path | None = None,
    *,
    out: str | Path = "demo",
    seed: int = 12,
    model: str | Path = DEFAULT,
    size: tuple[int, int] = (640, 480),
    say: Callable[[str], object] = print,
) -> list[str]:
    """Render room `seed` at `size` (width, height), predict on it and on `image`, and write to `out`, for each, the
    files of `predict.save`: panel with legend, overlay, label and depth PNG, arrays, coloured point cloud. For the
    room also `room.truth.png`: the prediction above, the truth below. Returns the paths.

    `say` gets a line about each step. Raises UserError for an image that cannot be read, an unknown model or an
    unwritable folder, before the room is rendered.
    """
    from enfilade.data.rooms import room
    from enfilade.outputs import save
    from enfilade.predict import load

    folder = images.make_folder(out)
    photo = None if image is None else images.read(image)
    predictor = load(model)

    say(f"rendering room {seed} (the first time, the renderer is compiled: a quarter of a minute)")
    begun = time.perf_counter()
    sample = room(seed, width=size[0], height=size[1])
    say(f"rendered at {size[0]}x{size[1]} in {time.perf_counter() - begun:.1f} s")

    begun = time.perf_counter()
    prediction = predictor.predict(images.Image(sample.image, None, "room"), camera=sample.camera)
    seconds = time.perf_counter() - begun
    prediction = replace(prediction, camera_source="rendered")
    written = save(prediction, folder, stem="room")
    truth = truth_of(sample, prediction.space)
    written.append(str(folder / "room.truth.png"))
    images.write_png(written[-1], np.asarray(compare(prediction, truth)))
    say(f"predicted on it in {seconds:.1f} s; {agreement(prediction, truth)}")

    if photo is not None:
        begun = time.perf_counter()
        prediction = predictor.predict(photo)
        seconds = time.perf_counter() - begun
        # A photo that is itself called room must not overwrite the room
        written += save(prediction, folder, stem="photo" if photo.name == "room" else photo.name)
        say(f"predicted on {image} in {seconds:.1f} s; {camera_line(prediction)}")

    say(f"in {folder}:")
    for path in written:
        say(f"  {path}")
    return written


def truth_of(sample: Sample, space: str) -> Prediction:
    """What a perfect prediction of a rendered room would be, in the label space `space`."""
    return Prediction(
        image=sample.image,
        labels=None if sample.labels is None else labels.mapping("nyu40", space)[sample.labels],
        depth=sample.depth,
        camera=sample.camera,
        camera_source="rendered",
        space=space,
        name=sample.name,
    )


def compare(prediction: Prediction, truth: Prediction) -> Image.Image:
    """The panels of a prediction and of the truth, one above the other."""
    panels = [viz.panel(prediction), viz.panel(truth)]
    return viz.contact_sheet(panels, columns=1, titles=["predicted", "the truth"], width=panels[0].width)


def agreement(prediction: Prediction, truth: Prediction) -> str:
    """How near a prediction comes to the truth, in words."""
    parts = []
    if prediction.labels is not None and truth.labels is not None:
        counts = truth.labels != IGNORE
        right = (prediction.labels == truth.labels)[counts].mean() if counts.any() else 0.0
        parts.append(f"{right:.0%} of the pixels have the true label")
    if prediction.depth is not None and truth.depth is not None:
        known = truth.depth > 0  # a closed room: every pixel sees a wall at least
        relative = np.abs(prediction.depth - truth.depth)[known] / truth.depth[known]
        parts.append(f"half of the depths are off by less than {np.median(relative):.0%}")
    return ", ".join(parts)


def camera_line(prediction: Prediction) -> str:
    """Which camera a photo's metres rest on, in words."""
    camera, source = prediction.camera, prediction.camera_source
    if camera is None:
        return "no camera"
    words = {"exif": "focal length from its EXIF", "assumed": "camera assumed, so metres may be off by a factor"}
    return f"{words.get(source, 'camera ' + source)}: {camera.fov_degrees:.0f} degrees across"
