"""Runs what the documentation tells its readers to run, in a fresh folder, with the Enfilade of this checkout.

python docs/check.py                  # README.md and the pages of PAGES, in order; a table, and 1 where anything failed
python docs/check.py docs/faq.md      # other pages
python docs/check.py --list           # what would be run or skipped, and why, without running it

Every ```console block's `$ command` lines go to bash and every ```python block is run, in the order of the page; the
Python blocks of a page share their variables. The folder holds what the pages take for granted:

    photos/                             three rendered rooms, JPEG
    photo.jpg, street.jpg, frame.png    one of them each
    depth.png, depth.npy, camera.json   of photo.jpg
    p.npy                               probabilities for photo.jpg
    clip.mp4                            three small frames
    scan/                               three RGB-D frames: rgb/, depth/ (16 bit, millimetres), labels/, camera.json

What cannot be run is only parsed, by the same parser, and named in the table:

* a block after `<!-- check: skip REASON -->`, for what takes hours or changes the machine;
* a command with a word in capitals (DIR, FILE), which stands for something of the reader's;
* `pip install`, and those targets of make that have a run of their own.

`enfilade serve` is started at a free port, asked whether it is well, and stopped. `make demo` runs with the Makefile of
this checkout and the Python that runs this script.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/quickstart.md")
SECONDS = 300.0  # for one command, where nothing else is said

_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,})(?P<language>[\w{}-]*)[^`\n]*$")
_MARKER = re.compile(r"^<!-- check: skip (?P<why>.+?) *-->$")
_PLACEHOLDER = re.compile(r"(?<![\w.=/-])(?:[A-Z][A-Z0-9]+)(?![\w=])|(?<==)[A-Z][A-Z]+\b|\.\.\.")
_ELSEWHERE = re.compile(r"^(pip install|make (test|lint|docs|bench|check-docs|clean)\b)")


@dataclass(frozen=True)
class Step:
    """A command line, or a block of Python."""

    page: str
    line: int  # from 1
    language: str  # "console" or "python"
    text: str
    skip: str | None = None  # the reason

    @property
    def title(self) -> str:
        return self.text.strip().split("\n")[0].split("  #")[0].strip()


def blocks(text: str) -> Iterator[tuple[int, str, list[str], str | None]]:
    """The fenced blocks of a page: number of the first line inside, language, lines, and a marker's reason."""
    lines = text.split("\n")
    why, k = None, 0
    while k < len(lines):
        if found := _MARKER.match(lines[k].strip()):
            why = found["why"]
        elif fence := _FENCE.match(lines[k]):
            end = k + 1
            while end < len(lines) and lines[end].strip() != fence["marks"]:
                end += 1
            indent = len(fence["indent"])
            yield k + 2, fence["language"], [line[indent:] for line in lines[k + 1 : end]], why
            why, k = None, end
        elif lines[k].strip():
            why = None  # a marker is for the block right below it
        k += 1


def commands(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The `$ command` lines of a console block and where they stand in it; a backslash goes on in the next line."""
    k = 0
    while k < len(lines):
        if lines[k].startswith("$ "):
            first, command = k, lines[k][2:]
            while command.endswith("\\") and k + 1 < len(lines):
                k += 1
                command = f"{command[:-1].rstrip()} {lines[k].strip()}"
            if not command.lstrip().startswith("#"):
                yield first, command
        k += 1


def steps(page: str, text: str) -> list[Step]:
    """All commands and Python blocks of a page, in order."""
    found = []
    for first, language, lines, why in blocks(text):
        if language == "console":
            for at, command in commands(lines):
                found.append(Step(page, first + at, language, command, why or unfit(command)))
        elif language == "python":
            found.append(Step(page, first, language, "\n".join(lines), why))
    return found


def unfit(command: str) -> str | None:
    """Why a command cannot be run as it stands."""
    bare = command.split("  #")[0]
    if found := _ELSEWHERE.match(bare):
        return "installs" if found[1].startswith("pip") else "has a run of its own"
    words = dict.fromkeys(word for word in _PLACEHOLDER.findall(bare))
    return f"needs {', '.join(words)}" if words else None


# ------------------------------------------------------------------------------------------------------------- parsing


def verb_words(command: str) -> list[str] | None:
    """The words after `enfilade` in a command line, with those of a launcher left out; None where it calls no verb."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            break
        words.append(word)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # OMP_NUM_THREADS=1 enfilade ...
        words = words[1:]
    if words[:1] == ["enfilade"]:
        return words[1:]
    for k in range(len(words) - 1):
        if words[k] == "-m" and words[k + 1] in ("enfilade", "enfilade.cli"):
            return words[k + 2 :]
    return None


def complaint(command: str) -> str | None:
    """What the command line's parser has against a command, without running it; None where it is content or where the
    command is no call of Enfilade. A `...` stands for what is left out, and nothing is said of such a call."""
    import tyro
    from tyro.conf import FlagCreatePairsOff

    from enfilade import data, recipes, tables
    from enfilade.verbs import VERBS

    words = verb_words(command)
    if not words or "..." in words or words[0] in ("-h", "--help", "-V", "--version", "VERB"):
        return None
    words = [word for word in words if word != "--debug"]
    length = 2 if words[0] == "data" else 1
    name = " ".join(words[:length])
    if name not in VERBS:
        return f"no verb {name!r}"
    if "--help" in words or "-h" in words:
        return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            verb: Any = tyro.cli(
                VERBS[name], prog=f"enfilade {name}", args=words[length:], config=(FlagCreatePairsOff,)
            )
    except SystemExit:
        return " ".join(re.sub(r"[^ -~]", " ", said.getvalue()).split()) or "the parser stopped"
    known = {"recipe": recipes.RECIPES, "table": tables.TABLES, "data": data.READERS}
    known |= {"name": data.READERS} if name.startswith("data ") else {}
    for option, names in known.items():
        value = getattr(verb, option, None)
        if isinstance(value, str) and value not in names and value != value.upper():
            return f"no {option} {value!r}"
    return None


# ------------------------------------------------------------------------------------------------------------- running


def prepare(folder: Path) -> None:
    """Fill the folder with what the pages take for granted."""
    import cv2
    import numpy as np

    from enfilade.data.rooms import room
    from enfilade.images import write_png

    def jpeg(name: str, rgb) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.cvtColor((255 * rgb).round().astype(np.uint8), cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(path), pixels):
            raise OSError(f"cannot write {path}")

    rooms: list[Any] = [room(2_000_012 + k, width=640, height=480, threads=1) for k in range(3)]
    for k, sample in enumerate(rooms):
        jpeg(f"photos/{k}.jpg", sample.image)
        jpeg(f"scan/rgb/{k:04d}.jpg", sample.image)
        for kind, values, dtype in (("depth", 1000 * sample.depth, np.uint16), ("labels", sample.labels, np.uint8)):
            (folder / "scan" / kind).mkdir(parents=True, exist_ok=True)
            write_png(folder / "scan" / kind / f"{k:04d}.png", np.rint(values).astype(dtype))
    first, camera = rooms[0], rooms[0].camera
    numbers = '{"fx": %r, "fy": %r, "cx": %r, "cy": %r, "width": %r, "height": %r}\n'
    text = numbers % (camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height)
    (folder / "camera.json").write_text(text)
    (folder / "scan/camera.json").write_text(text)
    for name in ("photo.jpg", "street.jpg", "frame.png"):
        jpeg(name, first.image)
    write_png(folder / "depth.png", np.rint(1000 * first.depth).astype(np.uint16))
    np.save(folder / "depth.npy", first.depth)
    likely = np.full((40, 120, 160), 0.01, np.float32)
    small = first.labels[2::4, 2::4]
    likely[small, np.arange(120)[:, None], np.arange(160)] += 0.6
    np.save(folder / "p.npy", likely)
    clip = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (320, 240))
    for sample in rooms:
        frame = cv2.resize((255 * sample.image).astype(np.uint8), (320, 240), interpolation=cv2.INTER_AREA)
        clip.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    clip.release()


def environment(folder: Path) -> dict[str, str]:
    """The environment of commands: `enfilade` and `python` are this checkout's and this script's."""
    programs = folder / ".bin"
    programs.mkdir()
    for name, words in (("enfilade", "-m enfilade"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}


@dataclass
class Runner:
    """Runs steps in `folder`; Python blocks in this process, with one set of variables a page."""

    folder: Path
    env: dict[str, str]
    seconds: float = SECONDS
    variables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, step: Step) -> str | None:
        """None, or what went wrong: the last lines that the step printed."""
        if step.language == "python":
            return self.python(step)
        if (verb_words(step.text) or [""])[0] == "serve":
            return self.serve(step.text.split("  #")[0])
        return self.shell(self.rewritten(step.text))

    def rewritten(self, command: str) -> str:
        if not re.match(r"make\b", command):
            return command
        stamp = Path(sys.prefix) / ".enfilade"  # taken for old: the environment is the one that is being checked
        words = ["make", "--file", str(ROOT / "Makefile"), "--old-file", str(stamp), f"PYTHONPATH={ROOT / 'src'}"]
        return f"VIRTUAL_ENV={shlex.quote(sys.prefix)} {shlex.join(words)} {command[4:]}"

    def shell(self, command: str) -> str | None:
        job = ["bash", "-c", f"set -o pipefail\n{command}"]
        try:
            done = subprocess.run(
                job, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=self.seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end after {self.seconds:g} s"
        return None if done.returncode == 0 else f"exit code {done.returncode}: {tail(done.stderr or done.stdout)}"

    def python(self, step: Step) -> str | None:
        own = self.variables.setdefault(step.page, {"__name__": "__main__"})
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = "\n" * (step.line - 1) + step.text  # a traceback then names the page's line
                exec(compile(code, step.page, "exec"), own)
        except Exception:
            return tail(traceback.format_exc(limit=-2))
        finally:
            os.chdir(here)
        return None

    def serve(self, command: str) -> str | None:
        """Start the service, ask /health, stop it as Ctrl-C does."""
        log = self.folder / ".serve.log"
        with log.open("w") as file:
            job = ["bash", "-c", f"exec {command} --port 0"]
            service = subprocess.Popen(job, cwd=self.folder, env=self.env, stdout=file, stderr=file)
        try:
            address = None
            for _ in range(round(2 * self.seconds)):
                if service.poll() is not None or address is not None:
                    break
                time.sleep(0.5)
                found = re.search(r"running on (http://\S+)", log.read_text())
                address = found[1] if found else None
            if address is None:
                return f"did not start: {tail(log.read_text())}"
            with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
                if answer.status != 200:
                    return f"/health answered {answer.status}"
            service.send_signal(signal.SIGINT)
            code = service.wait(60)
            return None if code in (0, 130, -signal.SIGINT) else f"exit code {code}: {tail(log.read_text())}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{error}: {tail(log.read_text())}"
        finally:
            if service.poll() is None:
                service.kill()
                service.wait()


def tail(text: str) -> str:
    return " | ".join(text.strip().split("\n")[-3:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help=f"default: {', '.join(PAGES)}")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that one command may take")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "src"))
    paths = [Path(page) if args.pages else ROOT / page for page in args.pages or PAGES]
    todo = [step for path in paths for step in steps(path.name, path.read_text(encoding="utf-8"))]

    ran, skipped, failed, begun = 0, 0, 0, time.perf_counter()

    def tell(state: str, seconds: float | None, step: Step, why: str | None) -> None:
        shown = f"{seconds:7.1f}" if seconds is not None else " " * 7
        place = f"{step.page}:{step.line}"
        title = step.title if step.language == "console" else f"(python) {step.title}"
        print(f"{state:<7}{shown}  {place:<20} {title}{f'   [{why}]' if why else ''}", flush=True)

    print(f"{'':<7}seconds  {'where':<20} what")
    with tempfile.TemporaryDirectory(prefix="enfilade-docs-") as name:
        folder = Path(name)
        runner = None
        for step in todo:
            wrong = complaint(step.text) if step.language == "console" else None
            if wrong is not None:
                failed += 1
                tell("FAILED", None, step, wrong)
            elif step.skip is not None:
                skipped += 1
                tell("skipped", None, step, step.skip)
            elif args.list:
                tell("would", None, step, None)
            else:
                if runner is None:
                    prepare(folder)
                    runner = Runner(folder, environment(folder), args.seconds)
                start = time.perf_counter()
                why = runner.run(step)
                ran, failed = ran + 1, failed + (why is not None)
                tell("ok" if why is None else "FAILED", time.perf_counter() - start, step, why)
    took, work = time.perf_counter() - begun, sum(os.times()[:4])
    print(f"{ran} run, {skipped} skipped, {failed} failed, {took:.0f} s, {work:.0f} s of processor time")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
