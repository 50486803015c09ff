"""The verb `enfilade serve`: a web service and a page around `predict` and `complete`."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from enfilade.errors import UserError
from enfilade.options import Count, Device, Flag, MaybeCount, Name, Precision, Refining, positive
from enfilade.shipped import COMPLETION, DEFAULT

NEEDED = ("fastapi", "uvicorn", "python_multipart")


@dataclass(frozen=True)
class Serve(Refining):
    """Serve predict and complete over HTTP, with a page to try them in a browser.

    Whoever reaches the port may use it, so it listens to this machine alone unless --host says otherwise. Ctrl-C or
    SIGTERM ends it once the requests that were taken are answered.
    """

    host: Name = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine."""
    port: Count = 8000
    """Port to listen at; 0 for any that is free."""
    models: Annotated[tuple[str, ...], arg(metavar="NAME|FILE|RUN [...]")] = (DEFAULT,)
    """Models to choose among, the first the default; requests can name no others."""
    completion: Annotated[str | None, arg(metavar="NAME|FILE|RUN|none", help_behavior_hint="")] = None
    """Model that completes rooms; default: sscnet-rooms where it is installed; none for no completion."""
    device: Device = None
    """cpu, cuda, cuda:1 ...; default: a GPU where there is one."""
    precision: Precision = "auto"
    """Of the network's arithmetic; auto is bf16 on a GPU."""
    flip: Flag = True
    """Without it the answers for the image and its mirror image are averaged: better, at twice the time."""
    threads: MaybeCount = None
    """Threads of the network; default: OMP_NUM_THREADS, or all cores."""
    waiting: Count = 8
    """Requests that may wait for the network; more are turned away (503)."""
    batch: Count = 4
    """Images of one size that go through the network together."""
    patience: Annotated[float, arg(metavar="MS")] = 5.0
    """Milliseconds to wait for such company."""
    timeout: Annotated[float, arg(metavar="SECONDS")] = 60.0
    """Time for an answer, and for a body to arrive (504, 408)."""
    megabytes: Annotated[float, arg(metavar="X")] = 20.0
    """Largest request (413)."""
    megapixels: Annotated[float, arg(metavar="X")] = 25.0
    """Largest image (422)."""

    def run(self) -> int:
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise UserError(f"serve needs {missing[0].replace('_', '-')}: pip install 'enfilade[serve]'")
        positive("--threads", self.threads)
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port lies between 0 and 65535, not {self.port}")
        # Before torch is imported: threads that spin while they wait starve those that decode and encode
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import uvicorn

        from enfilade.serve.app import create_app
        from enfilade.serve.limits import Settings

        settings = Settings(
            models=self.models,
            completion=self._completion(),
            device=self.device,
            precision=self.precision,
            flip=self.flip,
            crf=self.refines(),
            threads=self.threads,
            waiting=self.waiting,
            batch=self.batch,
            patience=self.patience / 1000,
            timeout=self.timeout,
            bytes=round(self.megabytes * 1e6),
            pixels=round(self.megapixels * 1e6),
        )
        uvicorn.run(
            create_app(settings),
            host=self.host,
            port=self.port,
            log_level="info",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(2 * self.timeout)),
        )
        return 0

    def _completion(self) -> str | None:
        if self.completion is not None:
            return None if self.completion == "none" else self.completion
        from enfilade.checkpoint import resolve

        return COMPLETION if resolve(COMPLETION).is_file() else None
