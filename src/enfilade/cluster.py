"""The job of `predict_files` on many processes: workers of this machine, or actors of a Ray cluster.

Each process holds the network and answers for one picture at a time. Where it dies, that picture has failed and the
others are not touched: the results are those of one process, file by file.
"""

import contextlib
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from enfilade import manifest
from enfilade.errors import UserError
from enfilade.manifest import Line, Manifest
from enfilade.predict import Predictor
from enfilade.predict_files import Item, Job, Picture, moved, pictures, portable

PATIENCE = 10.0  # seconds, for a cluster to say that it is there

# --- workers of this machine ------------------------------------------------------------------------------------------


def by_workers(items: Sequence[Item], predictor: Predictor, job: Job, *, workers: int) -> Iterator[Line]:
    """The manifest's line of each picture, as `workers` processes are done with it. They share this one's threads.

    Raises:
        UserError: no worker can start.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    threads = max(1, torch.get_num_threads() // workers)
    packed = pickle.dumps(portable(predictor))
    tasks = pictures(items, job.every)
    crew: dict[Any, tuple[Any, Picture | None]] = {}  # connection: process, what it has in work
    leaving: list[Any] = []

    def hire() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, packed, str(predictor.device), threads, job), daemon=True)
        with _inherited(threads):
            process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        crew[ours] = process, None

    work_left = True
    try:
        for _ in range(workers):
            hire()
        while crew:
            ready: list[Any] = multiprocessing.connection.wait(list(crew))
            for connection in ready:
                process, picture = crew[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    del crew[connection]
                    if picture is not None:
                        yield job.line(picture, _died(picture, f"by {_signal(process.exitcode)}"))
                        if work_left:
                            hire()
                    elif not crew:
                        how = _signal(process.exitcode)
                        raise UserError(f"the workers end as they start ({how}): take fewer, or more memory") from None
                    continue
                if isinstance(message, UserError):
                    raise message
                if message is not None:
                    yield message
                task = next(tasks, None)
                while task is not None and isinstance(result := task[1], UserError | int):
                    yield job.line(task[0], result)
                    task = next(tasks, None)
                if task is None:
                    work_left = False
                    leaving.append(crew.pop(connection)[0])
                else:
                    crew[connection] = process, task[0]
                with contextlib.suppress(OSError):  # it died just now: `recv` will tell
                    connection.send(task)
    finally:
        for process, _ in crew.values():
            process.terminate()
        for process in [*leaving, *(process for process, _ in crew.values())]:
            process.join(10)
            process.kill()
            process.join()


def _work(connection, packed: bytes, device: str, threads: int, job: Job) -> None:
    """What a worker does: None says that it is ready, or is told that nothing is left."""
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):  # whoever started it is gone
        try:
            predictor = moved(pickle.loads(packed), torch.device(device))
        except Exception as error:
            return connection.send(UserError(f"a worker cannot load the model: {type(error).__name__}: {error}"))
        connection.send(None)
        while (task := connection.recv()) is not None:
            connection.send(job.answer(predictor, *task))


@contextlib.contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What a process inherits that is started within: as many threads as it may have, before a library starts them,
    and no ear for Ctrl-C, which the terminal sends to all: the first process ends the others."""
    wanted = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    before = {name: os.environ.get(name) for name in wanted}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _signal(code: int | None) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-(code or 0)).name
    return f"exit code {code}"


def _died(picture: Picture, how: str = "") -> UserError:
    return UserError(
        f"{picture.label}: the process that had it in work was ended {how and how + ' '}(for lack of memory?); "
        f"run again to try it again"
    )


# --- Ray --------------------------------------------------------------------------------------------------------------


def need_ray() -> None:
    missing = [name for name in ("ray", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the engine ray needs {' and '.join(missing)}: pip install 'enfilade[cluster]'")


def by_ray(
    items: Sequence[Item],
    predictor: Predictor,
    job: Job,
    *,
    workers: int | None = None,
    address: str | None = None,
    device: str | None = None,
) -> Iterator[Line]:
    """The manifest's line of each picture, as a pool of Ray Data's actors is done with it.

    Each file is a row; a video is one actor's. Files, results and this installation must be at the same paths on all
    nodes. Without `address`, RAY_ADDRESS or a running Ray, one is started here and ended afterwards. An actor that dies
    is started anew by Ray, which gives it its rows again: from the manifest that each actor keeps for the time of the
    run it knows which are done, and which one it died of.

    Raises:
        UserError: no Ray at `address`; actors that cannot start.
    """
    need_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a Ray started here; 15 would wait for everyone else
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]
    import ray.exceptions  # pyright: ignore[reportMissingImports]

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that it has no bar
    started = not ray.is_initialized()
    run = secrets.token_hex(4)
    try:
        if started:
            _start(address, max(torch.get_num_threads(), workers or 1))
        size = _size(workers, device)
        rows = [{"item": json.dumps([str(i.path), i.place, sorted(i.done)])} for i in items]
        # Few rows a block: those are what is handed out, and handed out again where an actor dies
        blocks = min(len(rows), max(8 * size["workers"], len(rows) // 16))
        data = ray.data.from_items(rows, override_num_blocks=blocks)
        data.context.target_max_block_size = 1  # each line comes as soon as there is one
        data.context.enable_progress_bars = False
        held = ray.put(portable(predictor))  # for actors that are started again, too
        data = data.flat_map(
            Actor,
            fn_constructor_args=(held, job, device, size["num_cpus"], run, os.getcwd()),
            compute=ray.data.ActorPoolStrategy(size=size["workers"]),
            num_cpus=size["num_cpus"],
            num_gpus=size["num_gpus"],
        )
        for row in data.iter_rows():
            yield json.loads(row["line"])
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Ray has given up ({type(error).__name__}): {reason[-400:]}; run again to go on") from error
    finally:
        if started:
            ray.shutdown()
    for part in job.out.glob(f"manifest-ray-{run}-*.jsonl"):  # all of it is in the manifest by now
        part.unlink(missing_ok=True)


def _start(address: str | None, cores: int) -> None:
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _knock(address)
    import ray  # pyright: ignore[reportMissingImports]

    more = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"no Ray at {address}: {reason}; start one, or leave the address out") from error


def _knock(address: str) -> None:
    """Raise UserError where nothing listens at "host:port" or "ray://host:port": Ray itself tries for minutes. Other
    words ("local", "auto") are Ray's own."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 2**16):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"no Ray at {address}: {reason}; start one, or leave the address out") from error


def _size(workers: int | None, device: str | None) -> dict[str, Any]:
    """How many actors, and the cores and GPUs of each."""
    import ray  # pyright: ignore[reportMissingImports]

    resources = ray.cluster_resources()
    cores = int(resources.get("CPU", 1))
    largest = max(int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"])
    gpus = resources.get("GPU", 0) if device is None or device.startswith("cuda") else 0
    count = workers or int(gpus) or max(1, cores // 4)
    return {
        "workers": count,
        "num_cpus": max(1, min(cores // count, largest)),  # an actor is on one node
        "num_gpus": min(1, gpus / count),
    }


class Actor:
    """Holds a predictor, and answers for the files of rows."""

    def __init__(self, reference, job: Job, device: str | None, threads: int, run: str, folder: str):
        import ray  # pyright: ignore[reportMissingImports]

        with contextlib.suppress(OSError):  # no matter where all paths are absolute
            os.chdir(folder)
        torch.set_num_threads(threads)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.predictor, self.job = moved(ray.get(reference), torch.device(device)), job
        name = f"ray-{run}-{ray.get_runtime_context().get_actor_id()}"
        self.earlier: dict[tuple[str, int | None], Line] = {}  # said before this actor died
        with contextlib.suppress(FileNotFoundError):
            for text in (job.out / f"manifest-{name}.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    self.earlier[line["place"], line["frame"]] = line
        self.log = Manifest(job.out, name)

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, str]]:
        path, place, done = json.loads(row["item"])
        for picture, source in pictures([Item(Path(path), place, frozenset(done))], self.job.every):
            yield {"line": json.dumps(self._line(picture, source))}

    def _line(self, picture: Picture, source) -> Line:
        if isinstance(source, UserError | int):
            return self.job.line(picture, source)
        place = picture.item.place, picture.frame
        earlier = self.earlier.get(place)
        if earlier is not None and earlier["state"] != "begun":
            return earlier
        if earlier is not None:
            line = self.job.line(picture, _died(picture))
        else:
            self.log.add(manifest.entry("begun", *place, picture.stat, self.job.options))
            line = self.job.answer(self.predictor, picture, source)
        self.log.add(line)
        return line
