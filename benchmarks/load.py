"""`enfilade serve` under load, with malformed uploads among the good ones.

    python benchmarks/load.py --clients 4 --seconds 300
    python benchmarks/load.py --clients 32 --seconds 300
    python benchmarks/load.py --url http://127.0.0.1:8000 --pid 1234     a service that runs already

Each client sends one upload after the other: a photo, or with the chance --bad one of a dozen things that are none.
A photo must be answered with 200, or 503 with Retry-After, upon which the client waits for --pause; what is bad with
4xx, or the same 503 before it was looked at. Any other answer, and any broken connection, is counted as wrong. Times
are from the request to the last byte of its answer, as the client sees them. The exit status is 1 where anything was
wrong.
"""

import argparse
import datetime
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gap import hardware  # the script beside this one
from PIL import Image

Request = dict[str, Any]  # arguments of httpx.post
SAMPLE = 0.5  # seconds between two looks at the server's memory


def picture(width: int, height: int, kind: str) -> bytes:
    """A smooth picture with some noise, which compresses as photos do."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (9 + c) + y / (30 - c)) for c in range(3)], -1)
    data = io.BytesIO()
    Image.fromarray((128 + 90 * waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)).save(data, kind)
    return data.getvalue()


def bad_requests(photo: bytes, megabytes: float) -> dict[str, Callable[[random.Random], Request]]:
    """What is no photo, by name."""
    png = picture(32, 24, "PNG")

    def upload(data: bytes, field: str = "image", **fields: str) -> Request:
        return {"files": {field: ("photo.jpg", data)}, "data": fields}

    def typed(kind: str, data: bytes) -> Request:
        return {"headers": {"Content-Type": kind}, "content": data}

    huge = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    return {
        "cut off": lambda rng: upload(photo[: rng.randrange(20, len(photo) * 9 // 10)]),
        "text": lambda rng: upload(b"no photo at all" * rng.randrange(1, 1000)),
        "noise": lambda rng: upload(rng.randbytes(10_000)),
        "damaged PNG": lambda rng: upload(png[:40] + rng.randbytes(200) + png[240:]),
        "GIF": lambda rng: upload(picture(32, 24, "GIF")),
        "60000 x 60000": lambda rng: upload(huge),
        "empty": lambda rng: upload(b""),
        "another field": lambda rng: upload(photo, "picture"),
        "no form": lambda rng: typed("text/plain", b"image=photo.jpg"),
        "no boundary": lambda rng: typed("multipart/form-data", b"--x\r\n"),
        "broken form": lambda rng: typed("multipart/form-data; boundary=x", b"--x\r\nContent-Disp\r\n\r\n" + photo),
        "no number": lambda rng: upload(photo, fov="wide"),
        "no such model": lambda rng: upload(photo, model="x" * rng.randrange(1, 1000)),
        "too large": lambda rng: upload(bytes(round(1.05e6 * megabytes))),
    }


@contextmanager
def service(args: argparse.Namespace):
    """(address, process id or None) of the service, started here unless --url names one."""
    if args.url:
        yield args.url.rstrip("/"), args.pid
        return
    command = [sys.executable, "-m", "enfilade", "serve", "--port", "0", "--completion", "none", *args.serve]
    command += ["--models", *args.models]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = process.stderr
    assert log is not None
    told: list[str] = []
    for line in log:
        told.append(line)
        if found := re.search(r"running on (http://\S+)", line):
            break
    else:
        raise SystemExit("the service did not start: " + "".join(told[-3:]))
    faults: list[str] = []
    reader = threading.Thread(target=lambda: faults.extend(x for x in log if "Traceback" in x), daemon=True)
    reader.start()
    try:
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait(60)
        if faults:
            print(f"{len(faults)} tracebacks in the service's log")


def resident(pid: int | None) -> float | None:
    """MiB of a process, where the system tells (Linux)."""
    try:
        found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def client(number: int, args: argparse.Namespace, address: str, photos: list[bytes], end: float, told: list) -> None:
    """Sends until `end`; appends (when, what, status or the error's name, whether that is right, seconds)."""
    rng = random.Random(f"{args.seed} {number}")
    bad = bad_requests(photos[0], args.megabytes)
    # What is large takes the client's time too
    names, weights = list(bad), [0.2 if name == "too large" else 1.0 for name in bad]
    with httpx.Client(timeout=args.timeout) as http:
        while time.monotonic() < end:
            what = rng.choices(names, weights)[0] if rng.random() < args.bad else "photo"
            request: Request = {"files": {"image": rng.choice(photos)}} if what == "photo" else bad[what](rng)
            begun = time.monotonic()
            try:
                answer = http.post(f"{address}/predict", **request)
                status: Any = answer.status_code
                busy = status == 503 and answer.headers.get("retry-after", "").isdigit()
                right = busy or (status == 200 if what == "photo" else 400 <= status < 500)
                if status != 200:
                    right = right and set(answer.json()) == {"error"}
            except (httpx.HTTPError, ValueError) as error:
                status, right, busy = type(error).__name__, False, False
            told.append((begun, what, status, right, time.monotonic() - begun))
            if busy:
                time.sleep(args.pause)


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) if values else float("nan")


def load(args: argparse.Namespace) -> dict:
    """Run the clients, and sum up."""
    width, height = (int(side) for side in args.size.split("x"))
    photos = [picture(width, height, kind) for kind in ("JPEG", "PNG", "WEBP")]
    memory: list[tuple[float, float]] = []
    with service(args) as (address, pid):
        for photo in photos:  # nobody's first request
            httpx.post(f"{address}/predict", files={"image": photo}, timeout=args.timeout).raise_for_status()
        start = time.monotonic()
        end, told = start + args.seconds, [[] for _ in range(args.clients)]
        threads = [
            threading.Thread(target=client, args=(k, args, address, photos, end, told[k])) for k in range(args.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if (mib := resident(pid)) is not None:
                memory.append((time.monotonic() - start, mib))
            time.sleep(SAMPLE)
        seconds = time.monotonic() - start
        health = httpx.get(f"{address}/health", timeout=args.timeout).json()
    every = [entry for one in told for entry in one]
    good = [taken for _, what, status, _, taken in every if what == "photo" and status == 200]
    refused = [taken for _, what, status, _, taken in every if what != "photo" and status != 503]
    kinds = sorted({what for _, what, *_ in every if what != "photo"})
    wrong = Counter((what, str(status)) for _, what, status, right, _ in every if not right)

    def statuses(kind: str) -> dict[str, int]:
        return dict(sorted(Counter(str(status) for _, what, status, *_ in every if what == kind).items()))

    def at(share: float) -> float | None:
        """The mean of the server's memory over a twentieth of the run that begins there."""
        window = [mib for when, mib in memory if share * seconds <= when <= (share + 0.05) * seconds]
        return float(np.mean(window)) if window else None

    return {
        "clients": args.clients,
        "seconds": seconds,
        "requests": len(every),
        "good_per_s": len(good) / seconds,
        "all_per_s": len(every) / seconds,
        "good_ms": {"p50": 1e3 * percentile(good, 0.5), "p99": 1e3 * percentile(good, 0.99)},
        "refused_ms": {"p50": 1e3 * percentile(refused, 0.5), "p99": 1e3 * percentile(refused, 0.99)},
        "statuses": {"photo": statuses("photo")} | {kind: statuses(kind) for kind in kinds},
        "busy": sum(status == 503 for _, _, status, *_ in every),
        "wrong": {f"{what}: {status}": count for (what, status), count in sorted(wrong.items())},
        "rss_mib": {"start": at(0.0), "quarter": at(0.25), "half": at(0.5), "end": at(0.95)},
        "rss_peak_mib": max((mib for _, mib in memory), default=None),
        "health": health["status"],
    }


def show(result: dict) -> None:
    wrong = sum(result["wrong"].values())
    print("| clients | seconds | uploads | answered photos a second | p50 | p99 | 503 | wrong answers |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    good = result["good_ms"]
    print(
        f"| {result['clients']} | {result['seconds']:.0f} | {result['requests']:,} | {result['good_per_s']:.2f} ",
        end="",
    )
    print(f"| {good['p50']:.0f} ms | {good['p99']:.0f} ms | {result['busy']:,} | {wrong} |\n")
    bad = result["refused_ms"]
    print(
        f"Bad uploads: p50 {bad['p50']:.0f} ms, p99 {bad['p99']:.0f} ms. After it, the service is {result['health']}.\n"
    )
    print("| upload | answers |\n|---|---|")
    for what, counts in result["statuses"].items():
        print(f"| {what} | {', '.join(f'{status}: {count:,}' for status, count in counts.items())} |")
    rss = result["rss_mib"]
    if rss["start"] is not None:
        times = " | ".join("-" if rss[k] is None else f"{rss[k]:.0f} MiB" for k in ("start", "quarter", "half", "end"))
        print("\n| server's memory at the start | a quarter | half | end | most |\n|--:|--:|--:|--:|--:|")
        print(f"| {times} | {result['rss_peak_mib']:.0f} MiB |")
    for what, count in result["wrong"].items():
        print(f"wrong: {what} ({count})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--bad", type=float, default=0.5, help="share of malformed uploads")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds that a client waits after a 503")
    parser.add_argument("--size", default="640x480", metavar="WIDTHxHEIGHT", help="of the photos")
    parser.add_argument("--models", nargs="+", default=["gad-nyuv2"], help="of the service that is started")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="the rest goes to enfilade serve")
    parser.add_argument("--url", help="of a service that runs already, instead of starting one")
    parser.add_argument("--pid", type=int, help="its process, whose memory is watched")
    parser.add_argument("--megabytes", type=float, default=20.0, help="the service's limit of a request")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a client waits for an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    result = load(args)
    about = {"hardware": hardware(), "date": datetime.date.today().isoformat(), "load_before": load_before}
    print(f"{about['hardware']}; {about['date']}; load of the machine before: {load_before:.1f}; ", end="")
    print(f"{args.size}, {args.bad:.0%} bad\n")
    show(result)
    if args.json:
        temporary = args.json.with_name(args.json.name + ".part")
        temporary.write_text(json.dumps(about | result, indent=1) + "\n")
        os.replace(temporary, args.json)
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
