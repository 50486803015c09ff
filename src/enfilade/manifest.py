"""What `predict` has done in a folder, kept there so that a later run goes on from it; and the index made of that.

A manifest is a text file with one JSON object a line, each written whole and at once: a killed process loses the
picture it had in work and no other, and a torn line is passed over. `state` says what a line tells:

* "done": `outputs.describe` of a picture, whose `files` are below the folder. "failed": its `error`.
* "begun": work on it has started. Without a later line, it is to be done.
* "length": a video's number of frames (of each `every`-th). "options": what an options' digest stands for.

All but the last have `place`, which is where the results are, below the folder and without an ending (a video's
folder, and then `frame`), the seconds since 1970, and the `path`, `size` and `mtime` of the source. Of several lines on
one picture, in whatever file, the latest holds. Several processes share a folder by writing a file each.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from enfilade import images
from enfilade.errors import UserError

Line = dict[str, Any]
BOOKKEEPING = ("state", "place", "frame", "time", "options", "path", "size", "mtime", "error")
_PART = re.compile(r"\.[0-9a-f]{12}\.part")  # `images.write_atomic`
STRAY_SECONDS = 600  # no file is written for as long


class Stat(NamedTuple):
    """Which file a result was made of."""

    path: str  # absolute
    size: int
    mtime: int  # nanoseconds


def stat(path: Path) -> Stat:
    """Of a file that is gone, -1 twice: reading it will say so."""
    try:
        found = path.stat()
    except OSError:
        return Stat(os.path.abspath(path), -1, -1)
    return Stat(os.path.abspath(path), found.st_size, found.st_mtime_ns)


class Record(NamedTuple):
    """The last that a folder's manifests say of a picture."""

    state: str
    time: float
    stat: Stat
    options: str
    files: tuple[str, ...]
    file: Path  # where the whole line stands
    offset: int


class Length(NamedTuple):
    time: float
    stat: Stat
    every: int
    frames: int


class History:
    """What all manifests in a folder say, but for the numbers, which `line` reads when they are wanted."""

    def __init__(self, folder: Path):
        self.records: dict[str, dict[int | None, Record]] = {}  # by place, by frame
        self.lengths: dict[str, Length] = {}
        self.options: dict[str, dict[str, Any]] = {}  # by digest
        for path in sorted(folder.glob("manifest*.jsonl")):
            try:
                with path.open("rb") as file:
                    offset = 0
                    for text in file:
                        self._take(text, path, offset)
                        offset += len(text)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}; --no-resume starts anew") from error

    def _take(self, text: bytes, file: Path, offset: int) -> None:
        try:
            line = json.loads(text)
            state, digest = line["state"], sys.intern(line.get("options", ""))
            if state == "options":
                self.options[digest] = line["are"]
                return
            place, at = sys.intern(line["place"]), float(line["time"])
            source = Stat(line["path"], line["size"], line["mtime"])
            frames = self.records.setdefault(place, {})
            if state == "length":
                self.lengths[place] = Length(at, source, line["every"], line["frames"])
                if None in frames and frames[None].time <= at:  # it could not be decoded then
                    del frames[None]
            elif (old := frames.get(line["frame"])) is None or old.time <= at:
                files = tuple(line.get("files", ()))
                frames[line["frame"]] = Record(state, at, source, digest, files, file, offset)
        except (ValueError, KeyError, TypeError, AttributeError):  # torn, or not ours
            return

    def lines(self, records: Iterable[Record]) -> Iterator[Line]:
        """The whole lines of some records."""
        with contextlib.ExitStack() as stack:
            files = {}
            for record in records:
                if record.file not in files:
                    files[record.file] = stack.enter_context(record.file.open("rb"))
                files[record.file].seek(record.offset)
                yield json.loads(files[record.file].readline())

    def answers(self, places: Iterable[str]) -> Iterator[Line]:
        """The last line of each picture that is done or has failed, in the order of `places` and of frames."""
        known = (self.records.get(place, {}) for place in places)
        last = (frames[f] for frames in known for f in sorted(frames, key=lambda frame: -1 if frame is None else frame))
        return self.lines(record for record in last if record.state in ("done", "failed"))


class Manifest:
    """A manifest to write to. `name` is "" for a run that has the folder to itself, else what tells it from others."""

    def __init__(self, folder: Path, name: str = ""):
        self.path = folder / f"manifest{name and '-'}{name}.jsonl"
        try:
            self._file = self.path.open("ab+", buffering=0)
            if size := self._file.seek(0, os.SEEK_END):
                self._file.seek(size - 1)
                if self._file.read(1) != b"\n":  # torn: the next line is to stand by itself
                    self._file.write(b"\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, *lines: Line) -> None:
        """Write lines in one piece."""
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror or error}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def entry(
    state: str, place: str, frame: int | None, source: Stat, options: str, more: dict[str, Any] | None = None
) -> Line:
    """A line of a manifest, without its numbers unless `more` has them."""
    base = {"state": state, "place": place, "frame": frame, "time": time.time(), "options": options}
    return base | source._asdict() | (more or {})


def description(line: Line, folder: Path) -> dict[str, Any]:
    """`outputs.describe` of a line that is done, with the paths of its files."""
    told = {k: v for k, v in line.items() if k not in BOOKKEEPING}
    return told | {"files": [str(folder / file) for file in line["files"]]}


def digest(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


# --- a folder that several runs may share -----------------------------------------------------------------------------


@contextlib.contextmanager
def sweep(folder: Path, below: Iterable[Path]) -> Iterator[dict[Path, set[str]]]:
    """Hold `folder`, and give the names of the files in the folders `below`, cleaned of what killed runs have left.

    A temporary file is a killed run's if nobody else holds the folder, or it is ten minutes old: where a file system
    has no locks, or they do not reach another machine, age has to do.
    """
    lock, alone = None, False
    try:
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:
            _share(lock)
    except (ImportError, OSError):  # Windows; a folder that cannot be opened
        pass
    try:
        names = {place: _clean(place, alone) for place in below}
        if lock is not None and alone:
            _share(lock)
        yield names
    finally:
        if lock is not None:
            os.close(lock)


def _share(lock: int) -> None:
    import fcntl

    for _ in range(50):  # whoever is cleaning is done soon; a broken lock service must not stop us
        with contextlib.suppress(OSError):
            return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        time.sleep(0.1)


def _clean(folder: Path, alone: bool) -> set[str]:
    names = set()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # not there yet; a file where a folder must go
        for entry in entries:
            if not _PART.fullmatch(entry.name):
                names.add(entry.name)
                continue
            with contextlib.suppress(OSError):
                if alone or time.time() - entry.stat().st_mtime > STRAY_SECONDS:
                    os.unlink(entry.path)
    return names


# --- the index --------------------------------------------------------------------------------------------------------


def need_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("the index is a Parquet file, which needs pyarrow: pip install 'enfilade[cluster]'")


def write_index(path: Path, lines: Iterable[Line], rows: int = 4096) -> None:
    """One row of `path`, a Parquet file, for each line that is done or has failed: the numbers of `outputs.describe`,
    each in a column, `classes` as a map from names to shares. `rows` are held in memory at once."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    real, text = pa.float64(), pa.string()
    columns: list[Any] = [("source", text), ("frame", pa.int64()), ("name", text), ("width", pa.int64())]
    columns += [("height", pa.int64()), ("space", text), ("classes", pa.map_(text, real)), ("confidence", real)]
    columns += [("depth_min", real), ("depth_median", real), ("depth_max", real), ("camera", text)]
    columns += [(name, real) for name in ("fx", "fy", "cx", "cy", "fov")]
    columns += [("files", pa.list_(text)), ("seconds", real), ("error", text)]
    schema = pa.schema(columns)

    def write(file) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            waiting = []
            for one in lines:
                waiting.append(_row(one))
                if len(waiting) == rows:
                    writer.write_table(pa.Table.from_pylist(waiting, schema))
                    waiting = []
            writer.write_table(pa.Table.from_pylist(waiting, schema))

    images.write_atomic(path, write)


def _row(line: Line) -> dict[str, Any]:
    row = {k: v for k, v in line.items() if k not in ("depth", "camera", "classes")}
    row |= {f"depth_{k}": v for k, v in (line.get("depth") or {}).items()}
    camera = dict(line.get("camera") or {})
    row |= {"camera": camera.pop("source", None)} | camera
    return row | {"classes": None if line.get("classes") is None else list(line["classes"].items())}


def index_name(shard: Sequence[int] | None) -> str:
    return "index.parquet" if shard is None else f"index-{shard[0]}-of-{shard[1]}.parquet"
