"""Hostile input, and processes killed while they write.

    python benchmarks/abuse.py bombs                    small files that ask for much
    python benchmarks/abuse.py images --count 100000    mutated pictures and depth maps, read
    python benchmarks/abuse.py weights --count 100000   mutated model files, loaded
    python benchmarks/abuse.py kill --count 100         kill -9 while files are written
    python benchmarks/abuse.py schema --examples 300    requests made from /openapi.json (needs schemathesis)
    python benchmarks/abuse.py                          a little of each

Each input must give a result that makes sense, or a UserError, within five seconds of processor time and a gigabyte of
memory; whatever else happens is a finding. Inputs are read in a process of its own, so that a crash is a finding too;
its bytes are kept in --findings. The same --seed makes the same inputs. The exit status is 1 where anything was found.
"""

import argparse
import contextlib
import datetime
import importlib.util
import io
import json
import os
import random
import re
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from gap import hardware, status_bytes  # the script beside this one

PIXELS = 25_000_000  # the service's limit
SLOW = 5.0  # seconds of processor time
HANG = 60.0  # seconds without a word from the worker
MEMORY = 2**30
EDGES = (0, 1, 2, 3, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# What a file may be called while it is written
TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.part|\..+\.\d+\.tmp")

Made = tuple[str, bytes]  # what kind of file, and its bytes


# --- mutations --------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes, other: bytes, head: int) -> bytes:
    """One change of `data`, half of them within the first `head` bytes; `other` is a file to be spliced with."""
    out, size = bytearray(data), len(data)
    at = rng.randrange(min(head, size)) if rng.random() < 0.5 else rng.randrange(size)
    span = min(size - at, rng.choice((1, 2, 4, 16, 64, 256)))
    match rng.choice(("flip", "edge", "edge", "cut", "drop", "repeat", "noise", "splice", "insert")):
        case "flip":
            for _ in range(rng.choice((1, 2, 8))):
                out[rng.randrange(at, size)] ^= 1 << rng.randrange(8)
        case "edge":
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(EDGES) % 256**width
            out[at : at + width] = number.to_bytes(width, rng.choice(("big", "little")))
        case "cut":
            del out[at:]
        case "drop":
            del out[at : at + span]
        case "repeat":
            out[at:at] = out[at : at + span] * rng.choice((1, 2, 30))
        case "noise":
            out[at : at + span] = rng.randbytes(span)
        case "splice":
            out[at:] = other[rng.randrange(len(other)) :]
        case "insert":
            out[at:at] = rng.randbytes(span)
    return bytes(out) or b"\0"


def resealed(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold now; else none would be looked into."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


# --- pictures ---------------------------------------------------------------------------------------------------------


@cache
def pictures() -> dict[str, bytes]:
    """Small valid files by "format/variant": every mode and compression that Pillow writes and we read."""
    from PIL import Image

    noise = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(18), np.arange(24))[..., None] * (3, 5, 7)
    rgb = Image.fromarray(((ramp + noise.integers(0, 40, ramp.shape)) % 256).astype(np.uint8))
    alpha = rgb.copy()
    alpha.putalpha(rgb.getchannel(0))
    grey16 = Image.fromarray(noise.integers(300, 9000, (18, 24)).astype(np.uint16))
    real = Image.fromarray(noise.random((18, 24)).astype(np.float32))
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0xA405: 28, 0x920A: 4.2, 0xA20E: 300.0, 0xA210: 2, 0xA002: 24, 0xA003: 18})
    other = rgb.transpose(Image.Transpose.ROTATE_180)
    frames = {"save_all": True, "append_images": [other, other]}
    made = {
        "PNG/rgb": (rgb, {"pnginfo": None}),
        "PNG/alpha": (alpha, {}),
        "PNG/grey": (rgb.convert("L"), {}),
        "PNG/grey alpha": (rgb.convert("LA"), {}),
        "PNG/bits": (rgb.convert("1"), {}),
        "PNG/palette": (palette, {"transparency": 3}),
        "PNG/16 bits": (grey16, {}),
        "PNG/EXIF": (rgb, {"exif": exif, "dpi": (72, 72), "icc_profile": b"x" * 200}),
        "PNG/animated": (rgb, frames),
        "JPEG/rgb": (rgb, {"quality": 90}),
        "JPEG/grey": (rgb.convert("L"), {}),
        "JPEG/CMYK": (rgb.convert("CMYK"), {}),
        "JPEG/progressive": (rgb, {"progressive": True, "subsampling": 0}),
        "JPEG/EXIF": (rgb, {"exif": exif}),
        "JPEG/restarts": (rgb, {"restart_marker_blocks": 1, "comment": b"here", "icc_profile": b"x" * 200}),
        "WEBP/lossy": (rgb, {"exif": exif}),
        "WEBP/lossless": (alpha, {"lossless": True}),
        "WEBP/alpha": (alpha, {"quality": 50}),
        "WEBP/animated": (rgb, frames),
        "BMP/rgb": (rgb, {}),
        "BMP/grey": (rgb.convert("L"), {}),
        "BMP/palette": (palette, {}),
        "BMP/alpha": (alpha, {}),
        "BMP/bits": (rgb.convert("1"), {}),
        "GIF/palette": (palette, {"transparency": 2}),
        "GIF/animated": (rgb, {**frames, "loop": 0}),
        "TIFF/raw": (rgb, {"exif": exif}),
        "TIFF/16 bits": (grey16, {}),
        "TIFF/floats": (real, {}),
        "TIFF/pages": (rgb, frames),
        **{f"TIFF/{name}": (rgb, {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")},
        "TIFF/group4": (rgb.convert("1"), {"compression": "group4"}),
        "PPM/rgb": (rgb, {}),
        "PPM/grey": (rgb.convert("L"), {}),
        "PPM/bits": (rgb.convert("1"), {}),
        "PPM/16 bits": (grey16, {}),
        "depth/PNG": (grey16, {"format": "PNG"}),
    }
    with contextlib.suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
        made["HEIF/rgb"], made["HEIF/alpha"] = (rgb, {"exif": exif}), (alpha, {})
    found = {}
    for name, (picture, options) in made.items():
        data = io.BytesIO()
        picture.save(data, **{"format": name.split("/")[0], **options})
        found[name] = data.getvalue()
    found["PPM/plain"] = b"P3 # a comment\n4 3 255\n" + b" ".join(b"%d" % (7 * k) for k in range(36)) + b"\n"
    # Adam7, which Pillow reads and does not write: 1 x 1, of one pass
    body = zlib.compress(b"\0\x10\x20\x30")
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)), (b"IDAT", body), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + b"\0" * 4 for k, d in chunks)
    found["PNG/interlaced"] = resealed(png)
    return found


def make_picture(seed: int, index: int) -> Made:
    rng = random.Random(f"{seed} {index}")
    name = rng.choice(list(pictures()))
    data = pictures()[name]
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = mutated(rng, data, rng.choice(list(pictures().values())), 64)
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        data = resealed(data)
    return name.split("/")[0], data


@cache
def bombs() -> list[Made]:
    """Small files that ask for much: of as many pixels as are allowed in every mode, of more, with long texts, with
    thousands of scans."""
    from PIL import Image

    def save(picture, kind: str, **options) -> bytes:
        data = io.BytesIO()
        picture.save(data, kind, **options)
        return data.getvalue()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 5000, 5000
    found = [(f"PNG, {mode}", save(Image.new(mode, side), "PNG")) for mode in ("RGBA", "LA", "P", "I;16", "1")]
    found += [("GIF", save(Image.new("P", side), "GIF")), ("PPM", b"P6 5000 5000 255\n"), ("PPM", b"P2 5000 5000 9\n1")]
    found.append(("BMP", save(Image.new("RGB", (8, 8)), "BMP").replace(struct.pack("<II", 8, 8), b"\x88\x13\0\0" * 2)))
    found.append(("TIFF", save(Image.new("RGBA", side), "TIFF", compression="tiff_deflate")))
    found.append(("WEBP", save(Image.new("RGBA", side, (9, 9, 9, 9)), "WEBP", lossless=True, quality=0, method=0)))
    png = save(Image.new("RGB", (8, 8)), "PNG")
    for width, height in ((5001, 5000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (0, 9)):
        found.append(("PNG, header", resealed(png[:16] + struct.pack(">II", width, height) + png[24:])))
    packed = zlib.compress(bytes(200_000_000), 1)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        found.append((f"PNG, {kind.decode()}", png[:33] + chunk(kind, head + packed) + png[33:]))
    found.append(("PNG, texts", png[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 200 + png[33:]))
    frames = [Image.new("P", (50, 50), k) for k in range(255)]
    found.append(("GIF, frames", save(frames[0], "GIF", save_all=True, append_images=frames * 8)))
    jpeg = save(Image.new("RGB", side), "JPEG", progressive=True)
    scan = min(re.findall(rb"\xff\xda(?:(?!\xff[\x01-\xff]).)*", jpeg, re.DOTALL), key=len)
    found += [(f"JPEG, {n} scans", jpeg[:-2] + scan * n + jpeg[-2:]) for n in (400, 100_000)]
    return found


def make_bomb(seed: int, index: int) -> Made:
    return bombs()[index % len(bombs())]


def judge_bomb(kind: str, data: bytes) -> str:
    """As the service reads photos; what it does not take, as the library does."""
    from enfilade.errors import UserError
    from enfilade.serve.limits import read_image

    if kind.startswith(("PNG", "JPEG", "WEBP")):
        try:
            read_image(data, PIXELS)
        except UserError as error:
            return refused(error)
        return "taken"
    return judge_picture(kind, data)


def judge_picture(kind: str, data: bytes) -> str:
    """ "taken" or "refused"; what is neither raises. A depth map is read as the service reads it."""
    from enfilade import images
    from enfilade.errors import UserError

    try:
        if kind == "depth":
            from enfilade.serve.limits import read_depth

            depth = read_depth(data, PIXELS)
            assert depth.dtype == np.float32
            assert np.isfinite(depth).all()
            assert depth.min() >= 0
            return "taken"
        image = images.read(data, limit=PIXELS)
    except UserError as error:
        return refused(error)
    assert image.rgb.dtype == np.float32
    assert image.rgb.ndim == 3
    assert image.rgb.shape[2] == 3
    assert 0 < image.rgb.shape[0] * image.rgb.shape[1] <= PIXELS
    assert image.rgb.min() >= 0
    assert image.rgb.max() <= 1  # both are false for NaN
    assert image.focal is None or 0 < image.focal < float("inf")
    return "taken"


def refused(error: Exception) -> str:
    text = str(error)
    assert 10 < len(text) < 400, f"no sentence of a sensible length: {text[:500]}"
    assert "\n" not in text, f"more than one line: {text}"
    return "refused"


# --- model files ------------------------------------------------------------------------------------------------------

NUMBERS = (None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"))
TEXTS = ("", "x" * 1000, "\ud800", "../../etc/passwd", "timm", "F64", "F8_E4M3", "BF16", "U64", "BOOL", "C64", "F4")
VALUES = (*NUMBERS, *TEXTS, [], {}, [[]], [0, 2**40], [4, 3], {"a": {}})
ENCODERS = "test_efficientnet", "mobilenetv2_100", "test_vit"


@cache
def model_file() -> bytes:
    """The smallest network of ours, with everything in its header that a trained one has."""
    from enfilade import checkpoint

    arguments = {"backbone": "sscnet", "width": 0.02, "classes": 3, "bn": True, "weights": None}
    meta = {"model": "completion", "arguments": arguments, "recipe": "x", "space": "ssc12", "scale": 0.5}
    meta |= {"size": [24, 32], "focal": 30.0, "ignored": [1], "scores": {"miou": 0.5}, "stage": "final", "epoch": 3}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        checkpoint.save_model(path, checkpoint.build("completion", arguments), meta)
        return path.read_bytes()


def places(tree) -> Iterator[tuple]:
    """Every (container, key) below a JSON value."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def rewritten(rng: random.Random, tree) -> None:
    """One change of a JSON value, in place."""
    found = list(places(tree))
    if not found:
        return
    container, key = rng.choice(found)
    match rng.choice(("value", "value", "value", "near", "drop", "swap", "add")):
        case "value":
            container[key] = json.loads(json.dumps(rng.choice(VALUES)))
        case "near" if isinstance(container[key], int | float):
            container[key] = container[key] * rng.choice((2, 1000, -1)) + rng.choice((0, 1))
        case "drop":
            del container[key]
        case "swap":
            there, other = rng.choice(found)
            value = json.loads(json.dumps(there[other]))  # a copy: no cycles
            container[key] = value
        case _ if isinstance(container, dict):
            container[rng.choice(("encoder", "depth", "__metadata__", "x"))] = rng.choice(
                (*ENCODERS, *NUMBERS, [5] * 9)
            )


def make_model(seed: int, index: int) -> Made:
    """A model file changed in its bytes, in its header's JSON (whose stated length fits again), or in the JSON within
    that describes the network."""
    rng = random.Random(f"{seed} {index}")
    data = model_file()
    length = struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(("bytes", "header", "description", "description"))
    if kind == "bytes":
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = mutated(rng, data, model_file(), 8 + length if rng.random() < 0.7 else 10)
        return kind, data
    header = json.loads(data[8 : 8 + length])
    if kind == "header":
        for _ in range(rng.choice((1, 2))):
            rewritten(rng, header)
    else:
        inner = json.loads(header["__metadata__"]["enfilade"])
        for _ in range(rng.choice((1, 1, 2, 3))):
            arguments = inner.get("arguments")
            rewritten(rng, arguments if rng.random() < 0.5 and isinstance(arguments, dict) else inner)
        text = json.dumps(inner)
        if rng.random() < 0.1:
            text = mutated(rng, text.encode(), text.encode(), len(text)).decode("latin-1")
        if rng.random() < 0.01:
            text = rng.choice(("[", '{"a":')) * 100_000
        header["__metadata__"]["enfilade"] = text
    packed = json.dumps(header).encode("utf-8", "surrogatepass")
    return kind, struct.pack("<Q", len(packed)) + packed + data[8 + length :]


def judge_model(kind: str, data: bytes) -> str:
    from enfilade import checkpoint
    from enfilade.errors import UserError

    path = Path(_folder().name, "m.safetensors")
    path.write_bytes(data)
    try:
        loaded = checkpoint.load(path)
    except UserError as error:
        return refused(error)
    assert not loaded.network.training
    assert all(p.dtype.is_floating_point or p.dim() == 0 for p in loaded.network.state_dict().values())
    json.dumps(loaded.meta)
    return "taken"


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="enfilade-abuse-")


# --- faults that must be found ----------------------------------------------------------------------------------------


def make_planted(seed: int, index: int) -> Made:
    return "planted", bytes([index])


def judge_planted(kind: str, data: bytes) -> str:
    """Input 1 raises, 2 kills its process, 3 takes too much memory; the others are taken."""
    if data == b"\1":
        raise KeyError("planted")
    if data == b"\2":
        os.abort()
    if data == b"\3":
        np.ones(MEMORY + MEMORY // 8, np.uint8)
    return "taken"


# --- the worker, and who watches it -----------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[int, int], Made], Callable[[str, bytes], str]]] = {
    "images": (make_picture, judge_picture),
    "bombs": (make_bomb, judge_bomb),
    "weights": (make_model, judge_model),
    "planted": (make_planted, judge_planted),
}


def judged(judge: Callable[[str, bytes], str], kind: str, data: bytes) -> tuple[str, str]:
    """The outcome, "taken", "refused" or "finding", and what the finding is."""
    try:
        return judge(kind, data), ""
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = "" if where is None else f" at {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        return "finding", f"{type(error).__name__}{line}: {error}"[:300].replace("\n", " ")


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its worst."""
    if Path("/proc/self/status").exists():
        return status_bytes(field)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def work(job: str, seed: int, first: int, count: int) -> None:
    """Judge inputs `first` ... `first + count - 1`, and tell of each on the standard output when it begins and ends.
    Ends early, with what it has told, once its memory has passed the limit."""
    make, judge = KINDS[job]
    out = os.dup(1)
    os.dup2(2, 1)  # decoders print where they like
    for index in range(3) if job != "planted" else ():  # imports and caches are no input's fault
        judged(judge, *(make_picture if job == "bombs" else make)(seed + 1, index))
    make(seed, first)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    base = resident("VmRSS")
    if sys.platform == "linux":  # the machine has other things to do: a hard stop, well beyond the limit
        address = status_bytes("VmSize") + 6 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (address, address))
    os.write(out, b"\n")
    for index in range(first, first + count):
        kind, data = make(seed, index)
        os.write(out, b"begin %d %s\n" % (index, kind.encode()))
        begun = time.process_time()
        outcome, what = judged(judge, kind, data)
        seconds, beyond = time.process_time() - begun, resident("VmHWM") - base
        if seconds > SLOW:
            outcome, what = "finding", f"{seconds:.1f} s of processor time ({outcome} {what})"
        if beyond > MEMORY:
            outcome, what = "finding", f"{beyond / 2**20:.0f} MiB of memory ({outcome} {what})"
        told = {"index": index, "kind": kind, "outcome": outcome, "what": what, "seconds": seconds, "beyond": beyond}
        os.write(out, json.dumps(told).encode() + b"\n")
        if beyond > MEMORY:
            return


def hunt(job: str, seed: int, count: int, findings: Path, say: Callable[[str], object] = print) -> dict:
    """Judge `count` inputs in worker processes; a new one where one died or hung."""
    make = KINDS[job][0]
    table: dict[str, Counter] = defaultdict(Counter)
    slowest: dict[str, float] = defaultdict(float)
    beyond, first, begun = 0, 0, time.perf_counter()
    found: list[str] = []
    command = [sys.executable, __file__, "work", "--job", job, "--seed", str(seed)]

    def note(index: int, kind: str, what: str) -> None:
        findings.mkdir(parents=True, exist_ok=True)
        path = findings / f"{job}-{seed}-{index}.bin"
        path.write_bytes(make(seed, index)[1])
        found.append(what)
        table[kind]["findings"] += 1
        say(f"finding: {kind}, {path}: {what}")

    while first < count:
        with tempfile.TemporaryFile() as errors:
            options = ["--first", str(first), "--count", str(count - first)]
            worker = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors)
            assert worker.stdout is not None
            open_at: tuple[int, str] | None = None
            started = False
            for line in lines(worker):
                if line.startswith("begin "):
                    _, index, kind = line.split(" ", 2)
                    open_at = int(index), kind
                elif line.startswith("{"):
                    told = json.loads(line)
                    open_at, first = None, told["index"] + 1
                    table[told["kind"]]["inputs"] += 1
                    slowest[told["kind"]] = max(slowest[told["kind"]], told["seconds"])
                    beyond = max(beyond, told["beyond"])
                    if told["outcome"] == "finding":
                        note(told["index"], told["kind"], told["what"])
                    else:
                        table[told["kind"]][told["outcome"]] += 1
                else:
                    started = True
            hung = worker.poll() is None
            worker.kill()
            code = worker.wait()
            errors.seek(0)
            last = (errors.read().decode("utf-8", "replace").strip().splitlines() or [""])[-1]
        if not started or (open_at is None and first < count and code):
            raise SystemExit(f"the worker could not go on, status {code}: {last}")
        if open_at is not None:  # it hung or died over this one
            table[open_at[1]]["inputs"] += 1
            note(*open_at, f"no answer within {HANG:g} s" if hung else f"the process died, status {code}: {last[:200]}")
            first = open_at[0] + 1
    rows = {kind: {**table[kind], "slowest_ms": 1e3 * slowest[kind]} for kind in sorted(table)}
    return {
        "job": job,
        "seed": seed,
        "inputs": count,
        "findings": found,
        "seconds": time.perf_counter() - begun,
        "beyond_mib": beyond / 2**20,
        "rows": rows,
    }


def lines(worker: subprocess.Popen) -> Iterator[str]:
    """The worker's lines; ends with them, or after `HANG` seconds without one."""
    assert worker.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while selector.select(HANG):
            if not (data := os.read(worker.stdout.fileno(), 65536)):
                worker.wait()
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in whole)


def show_hunt(result: dict) -> None:
    rate = result["inputs"] / result["seconds"]
    print(f"\n{result['inputs']} inputs in {result['seconds']:.0f} s, {rate:.0f} a second; ", end="")
    print(f"memory at most {result['beyond_mib']:.0f} MiB beyond the loaded library\n")
    print("| kind | inputs | taken | refused in a sentence | findings | slowest |\n|---|--:|--:|--:|--:|--:|")
    total: Counter = Counter()
    for kind, row in result["rows"].items():
        total.update({k: row.get(k, 0) for k in ("inputs", "taken", "refused", "findings")})
        numbers = " | ".join(f"{row.get(k, 0):,}" for k in ("inputs", "taken", "refused", "findings"))
        print(f"| {kind} | {numbers} | {row['slowest_ms']:.0f} ms |")
    print(f"| all | {' | '.join(f'{total[k]:,}' for k in ('inputs', 'taken', 'refused', 'findings'))} | |", flush=True)


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def writers(folder: Path) -> list[Callable[[int], object]]:
    """What writes files: each call writes those of its kind over again, full of a number k below 40."""
    import torch

    from enfilade import checkpoint, images, outputs, report
    from enfilade.camera import Camera
    from enfilade.types import Prediction

    side = 96, 128

    def prediction(k: int) -> Prediction:
        depth = np.full(side, 1 + k / 8, np.float32)
        grey = np.full((*side, 3), k / 255, np.float32)
        camera = Camera.from_fov(side[1], side[0], 60.0)
        return Prediction(grey, np.full(side, k, np.uint8), depth, depth, camera=camera, name="photo")

    class Network(torch.nn.Module):
        def __init__(self, k: int):
            super().__init__()
            self.register_buffer("k", torch.full((200_000,), float(k)))

    meta = {"model": "gad", "arguments": {}}
    plain = ("labels", "depth", "overlay", "arrays", "points")
    return [
        lambda k: outputs.save(prediction(k), folder, files=plain),
        lambda k: outputs.save(prediction(k), folder, files=("colour", "panel")),
        lambda k: checkpoint.save_model(folder / "best.safetensors", Network(k), meta | {"epoch": k}),
        lambda k: checkpoint.write(folder / "last.safetensors", {"k": torch.full((2_000_000,), float(k))}, {"step": k}),
        lambda k: report.write_report({"k": k, "list": [k] * 20_000}, folder / "report.json"),
        lambda k: images.write_png(folder / "big.png", np.full((600, 800, 3), k, np.uint8)),
    ]


def whole(path: Path) -> None:
    """Raises where a file is not the whole of one version."""
    from PIL import Image

    from enfilade import checkpoint

    name = path.name
    if name.endswith(".png"):
        with Image.open(path) as picture:
            picture.load()
            values = np.asarray(picture)
        if name in ("photo.labels.png", "photo.depth.png", "big.png"):
            assert (values == values.flat[0]).all()
    elif name.endswith(".npz"):
        with np.load(path) as arrays:
            found = {k: arrays[k] for k in arrays.files}
        k = int(found["labels"].flat[0])
        assert (found["labels"] == k).all()
        assert (found["depth"] == np.float32(1 + k / 8)).all()
    elif name.endswith(".safetensors"):
        tensors, meta = checkpoint.read(path)
        assert set(tensors) == {"k"}
        assert (tensors["k"] == meta.get("epoch", meta.get("step"))).all()
    elif name.endswith(".json"):
        told = json.loads(path.read_text())
        assert told["list"] == [told["k"]] * 20_000
    elif name.endswith(".ply"):
        head, _, body = path.read_bytes().partition(b"end_header\n")
        found_count = re.search(rb"element vertex (\d+)", head)
        assert found_count is not None
        assert len(body) == 15 * int(found_count[1])
    else:
        raise AssertionError(f"nobody writes {name}")


def kill(seed: int, count: int, say: Callable[[str], object] = print) -> dict:
    """Fork a process that writes files over and over, kill it at a random time, and look at what it left."""
    rng, found, left, checked = random.Random(seed), [], 0, 0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="enfilade-kill-") as place:
        folder = Path(place)
        jobs = writers(folder)
        for write in jobs:
            write(0)  # compiled and imported once, before anything forks
        names = {path.name for path in folder.iterdir()}
        for n in range(count):
            if not (child := os.fork()):
                with contextlib.suppress(BaseException):
                    mine = random.Random(n)
                    while True:
                        mine.choice(jobs)(mine.randrange(40))
                os._exit(1)
            time.sleep(rng.uniform(0.005, 0.25))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                found.append(f"kill {n}: the writer had ended by itself, status {status}")
            for path in sorted(folder.iterdir()):
                if TEMPORARY.fullmatch(path.name):
                    left += 1
                    path.unlink()
                    continue
                checked += 1
                try:
                    whole(path)
                except Exception as error:
                    found.append(f"kill {n}: {path.name}: {type(error).__name__} {error}")
            if missing := names - {path.name for path in folder.iterdir()}:
                found.append(f"kill {n}: {sorted(missing)} vanished")
        for write in jobs:  # nothing that was left is in the way
            write(1)
    for line in found:
        say(f"finding: {line}")
    seconds = time.perf_counter() - begun
    return {"job": "kill", "kills": count, "files": checked, "left": left, "findings": found, "seconds": seconds}


def show_kill(result: dict) -> None:
    print(f"\n{result['kills']} kills in {result['seconds']:.0f} s\n")
    print("| kills | in the middle of a file | files looked at afterwards | not whole |\n|--:|--:|--:|--:|")
    print(f"| {result['kills']} | {result['left']} | {result['files']:,} | {len(result['findings'])} |", flush=True)


# --- schema -----------------------------------------------------------------------------------------------------------


class Rooms:
    """Answers every photo with a room of eight voxels: requests are what is tested."""

    def complete(self, source, depth=None, camera=None, *, fov=None, height=None, estimator=None):
        from enfilade.camera import Camera
        from enfilade.complete import Room
        from enfilade.ops.voxels import VoxelGrid
        from enfilade.types import LabelVolume

        h, w = source.rgb.shape[:2]
        labels = np.full((2, 2, 2), 2, np.uint8)
        return Room(
            volume=LabelVolume(labels, np.zeros(3), 0.08),
            observed=labels > 0,
            confidence=np.ones(labels.shape, np.float32),
            image=source.rgb,
            depth=np.ones((h, w), np.float32),
            depth_source="given",
            camera=Camera.from_fov(w, h, 60.0, np.eye(4)),
            grid=VoxelGrid(np.zeros(3), np.eye(4), 0.02, (8, 8, 8)),
            camera_source="given",
            name=source.name,
        )


def service():
    """The application around a small network with random weights."""
    import torch

    from enfilade import checkpoint
    from enfilade.predict import Predictor
    from enfilade.serve.app import create_app
    from enfilade.serve.limits import Settings

    torch.manual_seed(0)
    arguments = {"classes": 40, "encoder": "test_efficientnet", "weights": None, "bottleneck": 8, "widths": (8, 8)}
    network = checkpoint.build("gad", arguments | {"embedding": 8})
    predictor = Predictor(network, {"size": (24, 32)}, device="cpu", flip=False)
    settings = Settings(models=("tiny",), threads=1, patience=0.0, pixels=1_000_000)
    return create_app(settings, predictors={"tiny": predictor}, completer=Rooms())


def schema(seed: int, examples: int, say: Callable[[str], object] = print) -> dict:
    """Requests that schemathesis makes of /openapi.json, half of their files pictures; each answer must be one that the
    description allows, and never 500."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as fixed
    from hypothesis import strategies as st
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    files = [data for name, data in pictures().items() if name.split("/")[0] in ("PNG", "JPEG", "WEBP", "depth")]
    ours = [positive_data_acceptance, negative_data_rejection]  # the schema knows no pictures, and we change the body
    chosen = st.none() | st.sampled_from(files)
    accepted = st.sampled_from(("*/*", "image/png", "application/x-npz", "application/x-ply", "text/html", "audio/ogg"))
    statuses: dict[str, Counter] = defaultdict(Counter)
    found: list[str] = []
    begun = time.perf_counter()
    api = schemathesis.openapi.from_asgi("/openapi.json", service())
    for operation in (result.ok() for result in api.get_all_operations()):

        def ask(case, alone, file, depth, accept) -> None:
            if alone and isinstance(case.body, dict) and "image" in case.body:  # few cameras and models are good
                case.body = {"image": case.body["image"]}
            for name, data in (("image", file), ("depth", depth)):
                if data is not None and isinstance(case.body, dict) and name in case.body:
                    case.body[name] = data
            answer = case.call(headers={"Accept": accept})
            statuses[case.operation.label][answer.status_code] += 1
            case.validate_response(answer, excluded_checks=ours)

        most = examples if operation.method.upper() == "POST" else min(examples, 20)
        quiet = settings(
            max_examples=most,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
        try:
            fixed(seed)(quiet(given(operation.as_strategy(), st.booleans(), chosen, chosen, accepted)(ask)))()
        except (Exception, BaseExceptionGroup) as error:
            found.append(f"{operation.label}: {type(error).__name__} {error}")
    for line in found:
        say(f"finding: {line}")
    seconds = time.perf_counter() - begun
    rows = {label: dict(sorted(counts.items())) for label, counts in statuses.items()}
    return {"job": "schema", "rows": rows, "findings": found, "seconds": seconds}


def show_schema(result: dict) -> None:
    print(f"\n{sum(sum(row.values()) for row in result['rows'].values())} requests in {result['seconds']:.0f} s\n")
    print("| operation | answers | findings |\n|---|---|--:|")
    for label, row in result["rows"].items():
        told = ", ".join(f"{status}: {count}" for status, count in row.items())
        wrong = sum(line.startswith(f"{label}:") for line in result["findings"])
        print(f"| {label} | {told} | {wrong} |", flush=True)


# --- main -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = ("bombs", "images", "weights", "kill", "schema")
    parser.add_argument("job", nargs="?", choices=(*jobs, "work"), metavar="{bombs,images,weights,kill,schema}")
    parser.add_argument("--count", type=int, help="inputs, or kills; 1000 and 10 where no job is named")
    parser.add_argument("--examples", type=int, default=100, help="requests for each address that takes a photo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir(), "enfilade-findings"))
    parser.add_argument("--json", type=Path, help="also write the tables there")
    parser.add_argument("--job", dest="of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job == "work":
        return work(args.of, args.seed, args.first, args.count)
    print(f"{hardware()}; {datetime.date.today()}; seed {args.seed}", flush=True)
    results = []
    for job in (args.job,) if args.job else jobs:
        if job == "schema" and not args.job and importlib.util.find_spec("schemathesis") is None:
            print("\nschema: left out, for it needs schemathesis: pip install schemathesis")
        elif job == "schema":
            results.append(schema(args.seed, args.examples))
            show_schema(results[-1])
        elif job == "kill":
            results.append(kill(args.seed, args.count or (100 if args.job else 10)))
            show_kill(results[-1])
        else:
            count = len(bombs()) if job == "bombs" else args.count or (100_000 if args.job else 1000)
            results.append(hunt(job, args.seed, count, args.findings))
            show_hunt(results[-1])
    if args.json:
        about = {"hardware": hardware(), "date": datetime.date.today().isoformat(), "results": results}
        temporary = args.json.with_name(args.json.name + ".part")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(temporary, args.json)
    sys.exit(any(result["findings"] for result in results))


if __name__ == "__main__":
    main()
