"""Counts and times of the service, in Prometheus' text format (version 0.0.4)."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
TYPE = "text/plain; version=0.0.4; charset=utf-8"
# name: (kind, help, labels)
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "enfilade_requests_total": ("counter", "Requests answered.", ("route", "status")),
    "enfilade_request_seconds": ("summary", "Seconds from request to answer.", ("route",)),
    "enfilade_rejected_total": ("counter", "Requests refused before the network saw them.", ("reason",)),
    "enfilade_timeouts_total": ("counter", "Requests that took too long.", ()),
    "enfilade_network_seconds": ("summary", "Seconds of each run of a network.", ()),
    "enfilade_network_images": ("summary", "Images of each run of a network.", ()),
}
REASONS = {406: "format", 408: "slow", 413: "bytes", 422: "input", 503: "queue"}


class Metrics:
    """Thread-safe counters. `gauges` are asked when `text` is made."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]] | None = None):
        self.gauges = dict(gauges or {})
        self._lock = threading.Lock()
        self._counts: dict[str, dict[tuple[str, ...], float]] = {name: defaultdict(float) for name in FAMILIES}
        self._numbers: dict[str, dict[tuple[str, ...], int]] = {name: defaultdict(int) for name in FAMILIES}

    def add(self, name: str, *labels: str, value: float = 1.0) -> None:
        """Count up, or for a summary add one observation."""
        with self._lock:
            self._counts[name][labels] += value
            self._numbers[name][labels] += 1

    def text(self) -> str:
        lines = []
        with self._lock:
            for name, (kind, told, labels) in FAMILIES.items():
                lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
                found = sorted(self._counts[name].items()) or ([] if labels else [((), 0.0)])
                for values, total in found:
                    where = ",".join(f'{k}="{_escaped(v)}"' for k, v in zip(labels, values))
                    where = f"{{{where}}}" if where else ""
                    if kind == "summary":
                        lines.append(f"{name}_sum{where} {total:.9g}")
                        lines.append(f"{name}_count{where} {self._numbers[name].get(values, 0)}")
                    else:
                        lines.append(f"{name}{where} {total:.15g}")
        for name, (told, value) in self.gauges.items():
            lines += [f"# HELP {name} {told}", f"# TYPE {name} gauge", f"{name} {value():.15g}"]
        return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Watch:
    """ASGI middleware: counts and times each request under its route, and adds the headers that every answer has.
    Paths outside `routes` are counted as "other", so that a scan does not grow the list."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: Collection[str]):
        self.app, self.metrics, self.routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.add("enfilade_requests_total", route, str(status))
            self.metrics.add("enfilade_request_seconds", route, value=time.perf_counter() - start)
            if scope["method"] == "POST" and status in REASONS:
                self.metrics.add("enfilade_rejected_total", REASONS[status])
