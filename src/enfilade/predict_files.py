"""Predict on many files, folders and videos: what `enfilade predict` does, in one process or in many."""

import contextlib
import copy
import hashlib
import json
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from enfilade import images, manifest
from enfilade.camera import Camera
from enfilade.errors import UserError, unknown
from enfilade.manifest import History, Line, Manifest, Record
from enfilade.outputs import FILES, KINDS, PICTURES, describe, save
from enfilade.predict import Predictor
from enfilade.types import Prediction

ENGINES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Summary:
    """What `predict_many` did: `describe` of each image that is done, and each file that failed with the reason. `made`
    were done now, `before` had been done by earlier runs."""

    done: list[dict[str, Any]]
    failed: list[tuple[str, str]]
    made: int = 0
    before: int = 0


class Item(NamedTuple):
    """A file to predict on, and where its results go: below the output folder, without an ending. A video's is a
    folder."""

    path: Path
    place: str
    done: frozenset[int] = frozenset()  # frames that need no more work


class Picture(NamedTuple):
    """An image, or a frame of a video."""

    item: Item
    frame: int | None
    stat: manifest.Stat

    @property
    def label(self) -> str:
        return str(self.item.path) if self.frame is None else f"{self.item.path}#{self.frame}"


@dataclass(frozen=True)
class Job:
    """What is the same for all pictures."""

    out: Path
    files: tuple[str, ...]
    camera: Camera | None
    fov: float | None
    every: int
    options: str  # the digest of all that the results depend on, but for the source

    def line(self, picture: Picture, result: dict[str, Any] | UserError | int) -> Line:
        """What the manifest says of a picture: its description, its error, or its number of frames."""
        place = picture.item.place, picture.frame, picture.stat, self.options
        if isinstance(result, UserError):
            return manifest.entry("failed", *place, {"source": picture.label, "error": str(result)})
        if isinstance(result, int):
            return manifest.entry("length", *place, {"every": self.every, "frames": result})
        files = [Path(file).relative_to(self.out).as_posix() for file in result["files"]]
        return manifest.entry("done", *place, result | {"files": files, "error": None})

    def finish(self, picture: Picture, prediction: Prediction, start: float) -> Line:
        """Save a prediction that was begun at `start`, on `time.perf_counter`."""
        place = self.out / picture.item.place
        folder, stem = (place.parent, place.name) if picture.frame is None else (place, f"{picture.frame:06d}")
        try:
            written = save(prediction, folder, stem=stem, files=self.files)
            seconds = time.perf_counter() - start
            result = describe(prediction, source=picture.label, files=written, seconds=seconds)
        except UserError as error:
            result = error
        return self.line(picture, result)

    def answer(self, predictor: Predictor, picture: Picture, source: images.Source) -> Line:
        """Predict and save. What goes wrong costs this picture alone."""
        start = time.perf_counter()
        try:
            prediction = predictor.predict(source, camera=self.camera, fov=self.fov)
        except UserError as error:
            return self.line(picture, error)
        except Exception as error:
            fault = f"{picture.label}: a fault in Enfilade, or too little memory: {type(error).__name__}: {error}"
            return self.line(picture, UserError(" ".join(fault.split())))
        return self.finish(picture, prediction, start)


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
    on_prediction: Callable[[str, Prediction], object] | None = None,
    on_note: Callable[[str], object] | None = None,
    resume: bool = True,
    shard: tuple[int, int] | None = None,
    workers: int | None = None,
    index: bool = False,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    device: str | None = None,
    collect: bool = True,
) -> Summary:
    """Predict on files, folders, patterns and videos, and `save` to `out`. One bad file never stops the rest.

    A folder's sub-folders are kept below `out`. Where two inputs would share a name (a.jpg and a.png), the later one
    is called a-2. Of a video, every `every`-th frame goes to a folder of the video's name, as `<frame number>.*`,
    six digits. Pictures in `out` that an earlier run wrote are not taken as input unless named one by one.

    `out` keeps a manifest (see `enfilade.manifest`). What it says is done, with the same options and from the same
    file (path, size, time of change), is not done again, unless `resume` is False; what failed is tried again. The
    options are all that changes a result: the network and its header, `flip` and its like, `files`, `camera`, `fov`.
    The device is not one. `on_note` is told, in one sentence before the work, what is skipped and what is redone.

    `shard` (i, n) takes the i-th of every n files, from 1; each shard keeps a manifest of its own. `workers` processes
    share the work, and the threads; one that dies costs the picture it had in work. With `engine` "ray" they are
    actors of a Ray cluster, at `address` or started here, on `device` or on GPUs where the cluster has them; by default
    as many as its GPUs, or one for 4 cores. `index` writes index.parquet, see `manifest.write_index`.

    `on_result` is called after each picture with its path (a frame's is "clip.mp4#12") and its `describe` or its error;
    `on_prediction`, in one process only, before it is saved. Neither hears of what was done before. A progress bar is
    drawn on a terminal's stderr unless `quiet`. For millions of files, `collect` False keeps the summary's `done`
    empty.

    Raises UserError at once for a path that does not exist, an unwritable `out`, an unknown kind of file, or options
    that do not go together.
    """
    if strange := [f for f in files if f not in KINDS]:
        raise UserError(f"no such output {', '.join(map(repr, strange))}: choose among {', '.join(KINDS)}")
    _check(shard, workers, engine, address, on_prediction)
    if index:
        manifest.need_pyarrow()
    out = images.make_folder(out)
    inside = out.resolve()
    found = [f for f in images.find_relative(paths) if f.named or not _is_output(f.path, inside)]
    if not found:
        raise UserError(f"there are only pictures of earlier predictions in {out}: give other images")
    items = places(found)[slice(None) if shard is None else slice(shard[0] - 1, None, shard[1])]
    kept = tuple(f for f in KINDS if f in files)
    options = fingerprint(predictor) | {"files": list(kept), "fov": None if fov is None else float(fov)}
    options |= {"camera": camera and [camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height]}
    job = Job(out, kept, camera, fov, every, manifest.digest(options))
    name = "" if shard is None else f"{shard[0]}-of-{shard[1]}"
    numbers = {item.place: number for number, item in enumerate(items)}
    done: list[tuple[tuple[int, int], dict[str, Any]]] = []  # each with its place in the order of the input
    failed: list[tuple[tuple[int, int], tuple[str, str]]] = []
    made = 0

    def keep(line: Line) -> dict[str, Any]:
        told = manifest.description(line, out)
        if collect:
            done.append(((numbers[line["place"]], line["frame"] or 0), told))
        return told

    folders = {(out / item.place).parent for item in items} | {out / i.place for i in items if images.is_video(i.path)}
    with manifest.sweep(out, folders) as names, Manifest(out, name) as log:
        history = History(out)
        plan = _plan(items, history, names, job, options, resume)
        names.clear()
        log.add({"state": "options", "options": job.options, "are": options}, *plan.redone)
        if collect:
            for line in history.lines(plan.before):
                keep(line)
        before = len(plan.before)
        del history
        if on_note is not None and plan.items and (note := plan.note()):
            on_note(note)
        lines = _lines(plan.items, predictor, job, workers, engine, address, device, on_prediction)
        total = sum(_length(item.path, every) - len(item.done) for item in plan.items)
        with contextlib.closing(lines), _bar(quiet, total) as advance:  # closing: Ctrl-C ends other processes at once
            for line in lines:
                log.add(line)
                if line["state"] == "length":
                    continue
                advance(Path(line["source"]).name)
                if line["state"] == "done":
                    made += 1
                    result = keep(line)
                else:
                    result = UserError(line["error"])
                    failed.append(((numbers[line["place"]], line["frame"] or 0), (line["source"], line["error"])))
                if on_result is not None:
                    on_result(line["source"], result)
        if index:
            manifest.write_index(out / manifest.index_name(shard), History(out).answers(i.place for i in items))
            if shard is None:  # it has all that the shards' have
                for part in out.glob("index-*-of-*.parquet"):
                    part.unlink(missing_ok=True)
    first = itemgetter(0)
    return Summary(
        [told for _, told in sorted(done, key=first)], [why for _, why in sorted(failed, key=first)], made, before
    )


def _check(shard, workers, engine, address, on_prediction) -> None:
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise UserError(f"shard {shard[0]}/{shard[1]} is none: of 8 there are 1/8 to 8/8")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if address is not None and engine != "ray":
        raise UserError("an address is one of a Ray cluster: give it with the engine ray")
    if on_prediction is not None and (engine == "ray" or (workers or 1) > 1):
        raise UserError("predictions can be handed on in one process only: leave out workers and the engine ray")
    if engine == "ray":
        from enfilade.cluster import need_ray

        need_ray()


def _lines(items, predictor, job, workers, engine, address, device, on_prediction) -> Generator[Line, None, None]:
    """The manifest's line of each picture, as it is done."""
    if not items:
        return
    if engine == "ray":
        from enfilade.cluster import by_ray

        yield from by_ray(items, predictor, job, workers=workers, address=address, device=device)
    elif (workers or 1) > 1:
        from enfilade.cluster import by_workers

        yield from by_workers(items, predictor, job, workers=workers)
    else:
        yield from _here(items, predictor, job, on_prediction)


def _here(
    items: Sequence[Item],
    predictor: Predictor,
    job: Job,
    on_prediction: Callable[[str, Prediction], object] | None,
) -> Iterator[Line]:
    """In this process, reading the next picture while the network runs."""
    waiting: deque[Picture] = deque()  # those handed to the stream and not yet answered
    aside: deque[Line] = deque()

    def sources() -> Iterator[images.Source]:
        for picture, source in pictures(items, job.every):
            if isinstance(source, UserError | int):
                aside.append(job.line(picture, source))
            else:
                waiting.append(picture)
                yield source

    start = time.perf_counter()
    for result in predictor.stream(sources(), camera=job.camera, fov=job.fov):
        picture = waiting.popleft()
        if isinstance(result, UserError):
            yield job.line(picture, result)
        else:
            if on_prediction is not None:
                on_prediction(picture.label, result)
            yield job.finish(picture, result, start)
        while aside:
            yield aside.popleft()
        start = time.perf_counter()
    yield from aside


def pictures(items: Iterable[Item], every: int) -> Iterator[tuple[Picture, images.Source | UserError | int]]:
    """Each picture of `items` that is not done, with what to predict on. In its place comes, of a video, the error if
    it cannot be decoded, and after its last frame the number of its frames."""
    for item in items:
        whole = Picture(Item(item.path, item.place), None, manifest.stat(item.path))
        if not images.is_video(item.path):
            yield whole, item.path
            continue
        try:
            frames = images.frames(item.path, every)
        except UserError as error:
            yield whole, error
            continue
        count = 0
        for number, rgb in frames:
            count += 1
            if number not in item.done:
                yield whole._replace(frame=number), rgb
        yield whole, count


# --- what is to be done -----------------------------------------------------------------------------------------------


def _is_output(path: Path, out: Path) -> bool:
    return path.name.endswith(PICTURES) and out in path.resolve().parents


def _length(path: Path, every: int) -> int:
    return math.ceil(images.frame_count(path) / every) if images.is_video(path) else 1


def places(found: Sequence[images.Found]) -> list[Item]:
    """Where the results of each file go. That depends on all files, and not on what is done already."""
    taken: set[str] = set()
    items = []
    for path, relative, _ in found:
        place = relative.with_name(relative.stem)
        number = 1
        while str(place).lower() in taken:  # file systems may not tell A from a
            number += 1
            place = relative.with_name(f"{relative.stem}-{number}")
        taken.add(str(place).lower())
        items.append(Item(path, place.as_posix()))
    return items


@dataclass
class Plan:
    items: list[Item]  # with work left
    before: list[Record]  # done, and to be left alone
    redone: list[Line]  # says that what is done anew is not done
    options: Counter[tuple[str, ...]]  # pictures done anew by the options that differ
    reasons: Counter[str]  # and by other reasons

    def note(self) -> str:
        parts = [f"{len(self.before)} done before"] if self.before else []
        for names, count in self.options.items():
            parts.append(f"{count} done anew, as made with other {' and '.join(names) or 'options'}")
        return "; ".join(parts + [f"{count} {reason}" for reason, count in self.reasons.items()])


def _plan(
    items: Sequence[Item],
    history: History,
    names: dict[Path, set[str]],
    job: Job,
    options: dict[str, Any],
    resume: bool,
) -> Plan:
    """Compare the files with what earlier runs did; `names` are those of the files in the folders of results."""
    plan = Plan([], [], [], Counter(), Counter())
    new = json.loads(json.dumps(options))  # as a manifest tells them

    def is_good(item: Item, frame: int | None, record: Record, now: manifest.Stat) -> bool:
        if record.state != "done":
            return False
        if not resume:
            pass
        elif record.stat != now or (frame is not None) != images.is_video(item.path):
            plan.reasons["done anew, as the source has changed"] += 1
        elif record.options != job.options:
            old = history.options.get(record.options, {})
            plan.options[tuple(k for k in new if old and old.get(k) != new[k])] += 1
        elif any(file not in names.get(place, ()) for place, file in map(_split(job.out), record.files)):
            plan.reasons["done anew, as results are gone"] += 1
        else:
            return True
        plan.redone.append(manifest.entry("begun", item.place, frame, now, job.options))
        return False

    for item in items:
        known = history.records.get(item.place)
        if not known:
            plan.items.append(item)
            continue
        now, video = manifest.stat(item.path), images.is_video(item.path)
        wanted = {frame: record for frame, record in known.items() if frame is None or frame % job.every == 0}
        good = {frame: record for frame, record in wanted.items() if is_good(item, frame, record, now)}
        plan.before += good.values()
        length = history.lengths.get(item.place)
        if not video and good:
            continue
        if video and length and (length.stat, length.every) == (now, job.every) and len(good) == length.frames:
            continue
        plan.items.append(item._replace(done=frozenset(f for f in good if f is not None)))
    return plan


def _split(out: Path) -> Callable[[str], tuple[Path, str]]:
    def split(file: str) -> tuple[Path, str]:
        place = out / file
        return place.parent, place.name

    return split


def fingerprint(predictor: Predictor) -> dict[str, Any]:
    """All of a predictor that its answers depend on, in plain values. The device is left out: its roundings differ, its
    answers do not."""
    state = hashlib.sha256()
    kind = type(predictor.network)
    state.update(json.dumps([kind.__module__, kind.__qualname__, predictor.meta], sort_keys=True, default=str).encode())
    for name, tensor in predictor.network.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    options: dict[str, Any] = {"model": state.hexdigest()[:16]} | predictor.augmentation.options()
    options |= {"precision": predictor.precision, "crf": predictor.crf and predictor.crf.describe()}
    others = {"also": [fingerprint(other) for other in predictor.also]} if predictor.also else {}
    return options | others | {"guide": predictor.guide and fingerprint(predictor.guide)}


def portable(predictor: Predictor) -> Predictor:
    """A copy on the CPU, which can be sent to another process."""
    return moved(predictor, torch.device("cpu"), network=copy.deepcopy(predictor.network))


def moved(predictor: Predictor, device: torch.device, network: torch.nn.Module | None = None) -> Predictor:
    """The predictor on another device; its network, if no other is given, moves there."""

    def along(companion: Predictor) -> Predictor:
        return moved(companion, device, None if network is None else copy.deepcopy(companion.network))

    other = copy.copy(predictor)
    other.device, other.network = device, (predictor.network if network is None else network).to(device)
    other.guide = predictor.guide and along(predictor.guide)
    other.also = tuple(map(along, predictor.also))
    return other


@contextlib.contextmanager
def _bar(quiet: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal's stderr, and the function that moves it on by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    silent = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=silent, transient=True) as progress:
        task = progress.add_task("predicting", total=total)
        yield lambda name: progress.update(task, description=name, advance=1)
