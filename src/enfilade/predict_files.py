"""Predict on many files, folders and videos: what `enfilade predict` does."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enfilade import images
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.outputs import FILES, PICTURES, describe, save
from enfilade.predict import Predictor
from enfilade.types import Prediction


@dataclass(frozen=True, slots=True)
class Summary:
    """What `predict_many` did: `describe` of each image done, and each file that failed with the reason."""

    done: list[dict[str, Any]]
    failed: list[tuple[str, str]]


def predict_many(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    predictor: Predictor,
    *,
    files: Sequence[str] = FILES,
    camera: Camera | None = None,
    fov: float | None = None,
    every: int = 1,
    quiet: bool = False,
    on_result: Callable[[str, dict[str, Any] | UserError], object] | None = None,
) -> Summary:
    """Predict on files, folders, patterns and videos, and `save` to `out`. One bad file never stops the rest.

    A folder's sub-folders are kept below `out`. Where two inputs would share a name (a.jpg and a.png), the later one
    is called a-2. Of a video, every `every`-th frame goes to a folder of the video's name, as `<frame number>.*`,
    six digits. Pictures in `out` that an earlier run wrote are not taken as input unless named one by one. `on_result`
    is called after each with its path (a frame's is "clip.mp4#12") and its `describe` or its error. A progress bar is
    drawn on a terminal's stderr unless `quiet`.

    Raises UserError at once for a path that does not exist, an unwritable `out` or an unknown kind of file.
    """
    if unknown := [f for f in files if f not in FILES]:
        raise UserError(f"no such output {', '.join(map(repr, unknown))}: choose among {', '.join(FILES)}")
    out = images.make_folder(out)
    inside = out.resolve()
    found = [f for f in images.find_relative(paths) if f.named or not _is_output(f.path, inside)]
    if not found:
        raise UserError(f"there are only pictures of earlier predictions in {out}: give other images")
    done: list[dict[str, Any]] = []
    failed: list[tuple[str, str]] = []

    def report(path: str, result: dict[str, Any] | UserError) -> None:
        if isinstance(result, UserError):
            failed.append((path, str(result)))
        else:
            done.append(result)
        if on_result is not None:
            on_result(path, result)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    silent = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=console, disable=silent, transient=True) as progress:
        total = sum(_length(f.path, every) for f in found)
        task = progress.add_task("predicting", total=total)
        jobs: list[tuple[str, Path, str]] = []  # those handed to the stream and not yet answered
        sources = _jobs(found, out, every, jobs, report)
        start = time.perf_counter()
        for result in predictor.stream(sources, camera=camera, fov=fov):
            label, folder, stem = jobs.pop(0)
            progress.update(task, description=Path(label).name, advance=1)
            if isinstance(result, Prediction):
                try:
                    written = save(result, folder, stem=stem, files=files)
                    seconds = time.perf_counter() - start
                    result = describe(result, source=label, files=written, seconds=seconds)
                except UserError as error:
                    result = error
            report(label, result)
            start = time.perf_counter()
    return Summary(done, failed)


def _is_output(path: Path, out: Path) -> bool:
    return path.name.endswith(PICTURES) and out in path.resolve().parents


def _length(path: Path, every: int) -> int:
    return math.ceil(images.frame_count(path) / every) if images.is_video(path) else 1


def _jobs(
    found: Sequence[images.Found],
    out: Path,
    every: int,
    jobs: list[tuple[str, Path, str]],
    fail: Callable[[str, UserError], object],
) -> Iterator[images.Source]:
    """The sources to predict on. For each, (label, output folder, stem) is appended to `jobs` first."""
    taken: set[str] = set()
    for path, relative, _ in found:
        place = relative.with_name(relative.stem)
        number = 1
        while str(place).lower() in taken:  # file systems may not tell A from a
            number += 1
            place = relative.with_name(f"{relative.stem}-{number}")
        taken.add(str(place).lower())
        if not images.is_video(path):
            jobs.append((str(path), out / place.parent, place.name))
            yield path
            continue
        try:
            for index, rgb in images.frames(path, every):
                jobs.append((f"{path}#{index}", out / place, f"{index:06d}"))
                yield rgb
        except UserError as error:
            fail(str(path), error)
