"""The routes of the web service, as an ASGI application.

    POST /predict   a photo to labels and depth, as JSON, picture, arrays or points, by the Accept header
    POST /complete  a photo to its room, as JSON, page, arrays or mesh
    GET  /          a page for people        /models   what is served
    GET  /health    for probes               /metrics  for Prometheus      /openapi.json   for clients

Every error is JSON, {"error": one sentence}.
"""

import asyncio
import base64
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

import enfilade
from enfilade import images, labels, viz
from enfilade.camera import Camera
from enfilade.errors import UserError, unknown
from enfilade.options import use_threads
from enfilade.serve.limits import BodyLimit, Intrinsics, Settings, demand_size, read_depth, read_image
from enfilade.serve.metrics import TYPE, Metrics, Watch
from enfilade.serve.worker import Full, Job, Worker
from enfilade.shipped import DEFAULT, SHIPPED
from enfilade.types import Prediction

STATIC = Path(__file__).parent / "static"
ROUTES = ("/", "/app.js", "/predict", "/complete", "/health", "/models", "/metrics", "/openapi.json")
# Media types by what `predict.save` and `room_output.save` call their files; JSON is made of several
PREDICT = {
    "application/json": ("labels", "depth"),
    "image/png": ("panel",),
    "application/x-npz": ("arrays",),
    "application/octet-stream": ("arrays",),
    "application/x-ply": ("points",),
}
COMPLETE = {
    "application/json": (),
    "text/html": ("page",),
    "application/x-npz": ("arrays",),
    "application/octet-stream": ("arrays",),
    "application/x-ply": ("mesh",),
}
ENDINGS = {"image/png": "png", "text/html": "html", "application/x-ply": "ply"}
# The pages may load what is theirs and nothing else. A room's page has its code inside.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
ROOM_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
FAULT = "something went wrong on the server's side, and its log says what: try another image, or tell its keeper"


def negotiate(accept: str, offered: Sequence[str]) -> str:
    """The offered media type that an Accept header likes best (RFC 9110, 12.5.1); the first of equals. HTTPException
    406 where it likes none."""
    ranges = []
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        media, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        ranges.append((media, weight))

    def liked(media: str) -> float:
        for pattern in (media, media.split("/")[0] + "/*", "*/*"):  # the most specific range counts
            if weights := [weight for name, weight in ranges if name == pattern]:
                return max(weights)
        return 0.0

    best = max(offered, key=liked)
    if not liked(best) > 0:
        raise HTTPException(406, f"this address answers as {', '.join(offered)}: ask for one of them")
    return best


def load_models(settings: Settings) -> tuple[dict[str, Any], Any]:
    """The predictors by name, warmed up, and the completer or None. A file is called by its stem, a run by its folder's
    name. Raises UserError, see `checkpoint.load`, and for two models of one name."""
    from enfilade.complete import load as load_completer
    from enfilade.predict import load

    use_threads(settings.threads)
    predictors: dict[str, Any] = {}
    for model in settings.models:
        name = called(model)
        if name in predictors:
            raise UserError(f"two models are called {name!r}: rename a file or a folder")
        options: dict[str, Any] = {"flip": settings.flip, "precision": settings.precision, "crf": settings.crf}
        predictors[name] = predictor = load(model, settings.device, **options)
        if "hha" not in getattr(predictor.network, "uses", ()):  # the first run compiles: no visitor should wait for it
            height, width = predictor.meta["size"]
            predictor.predict(np.full((int(height), int(width), 3), 128, np.uint8))
    completer = None if settings.completion is None else load_completer(settings.completion, settings.device)
    return predictors, completer


def called(model: str) -> str:
    """The name by which requests ask for a model."""
    if model in SHIPPED:
        return model
    return Path(model).resolve().name if Path(model).is_dir() else Path(model).stem


def written(save: Callable[..., list[str]], result: Any, files: Sequence[str], **options: Any) -> list[bytes]:
    """What `save` writes to a folder for each of `files`, as bytes: so the service's files are the command line's."""
    with tempfile.TemporaryDirectory(prefix="enfilade-") as folder:
        return [Path(path).read_bytes() for f in files for path in save(result, folder, files=(f,), **options)]


def describe(prediction: Prediction, model: str, seconds: float, pictures: Mapping[str, bytes]) -> dict[str, Any]:
    """The JSON of a prediction: `predict.describe`, the range of depth that its colours span, and PNGs as base64."""
    from enfilade.outputs import describe as facts

    told: dict[str, Any] = facts(prediction, seconds=seconds) | {"model": model}
    for here in ("source", "name", "files"):  # of the command line
        del told[here]
    if told["depth"] is not None and prediction.depth is not None:
        near, far = viz.depth_range(prediction.depth)
        told["depth"] = {**told["depth"], "near": near, "far": far}
    return told | {"images": {name: base64.b64encode(data).decode() for name, data in pictures.items()}}


def _answer(media: str, data: bytes, stem: str) -> Response:
    headers = {"Cache-Control": "no-store", "Vary": "Accept"}
    if media == "text/html":
        headers["Content-Security-Policy"] = ROOM_POLICY
    else:
        headers["Content-Disposition"] = f'inline; filename="{stem}.{ENDINGS.get(media, "npz")}"'
    return Response(data, media_type=media, headers=headers)


def _errors(app: FastAPI) -> None:
    """Every error becomes one sentence in JSON."""

    def told(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": " ".join(str(sentence).split())}, status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def of_http(request, error):
        return told(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_fields(request, error):
        first = error.errors()[0]
        field = str(first["loc"][-1])
        if first["type"] == "missing":
            return told(422, f"{field} is missing: send it as a field of multipart/form-data")
        return told(422, f"{field} does not fit: {first['msg'][:1].lower()}{first['msg'][1:]}")

    @app.exception_handler(UserError)
    async def of_input(request, error):
        return told(422, str(error))

    @app.exception_handler(Full)
    async def of_queue(request, error):
        return told(503, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Exception)
    async def of_ours(request, error):  # the server logs the traceback
        return told(500, FAULT)


def _documented(media: Sequence[str], more: Mapping[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """Answers for /openapi.json."""
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    why = {
        400: "A body that is no form",
        406: "No such format",
        408: "The body did not arrive in time",
        413: "Too many bytes",
        415: "A body of another type",
        422: "An input that does not fit",
        500: "A fault of the server",
        503: "The queue is full: see Retry-After",
        504: "It took too long",
    }
    answers: dict[int | str, dict[str, Any]] = {200: {"content": {name: {} for name in media}}}
    why |= more or {}
    return answers | {k: {"description": v, "content": {"application/json": {"schema": error}}} for k, v in why.items()}


Photo = Annotated[UploadFile, File(description="PNG, JPEG or WebP")]
Depth = Annotated[UploadFile | None, File(description="16-bit grey PNG, millimetres, 0 unknown, of the photo's size")]
ModelName = Annotated[str | None, Form(description="One of /models; the first is the default")]
Pixels = Annotated[float | None, Form(description="Of the camera, in pixels of the upright photo")]
Degrees = Annotated[float | None, Form(description="Horizontal field of view instead, degrees")]
Metres = Annotated[float | None, Form(description="Height of the camera above the floor, metres")]


def create_app(settings: Settings, *, predictors: Mapping[str, Any] | None = None, completer: Any = None) -> FastAPI:
    """The application. `predictors` by name and `completer` are those of the settings, unless they are given.

    Its worker starts and stops with the application's lifespan: at the end what runs is finished, what waits and what
    is new gets 503. Raises UserError for a model that cannot be loaded."""
    if predictors is None:
        predictors, completer = load_models(settings)
    served, default = dict(predictors), next(iter(predictors))
    completion = called(settings.completion or "completion") if completer is not None else None
    estimator = served.get(DEFAULT, served[default])
    pool = ThreadPoolExecutor(2, thread_name_prefix="pictures")
    metrics = Metrics()
    worker = Worker(
        waiting=settings.waiting,
        batch=settings.batch,
        patience=settings.patience,
        begin=lambda: use_threads(settings.threads),
        on_run=lambda count, seconds: (
            metrics.add("enfilade_network_images", value=float(count)),
            metrics.add("enfilade_network_seconds", value=seconds),
        ),
    )
    metrics.gauges["enfilade_queue_length"] = "Requests that wait for the network.", lambda: worker.length

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Enfilade",
        version=enfilade.__version__,
        description="Labels, metric depth and the completed room of a photo.",
        docs_url=None,  # its page loads its code from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.worker, app.state.metrics = worker, metrics
    limits: dict[str, Any] = {"limit": settings.bytes, "timeout": settings.timeout, "uploads": settings.uploads}
    app.add_middleware(BodyLimit, **limits, forms=("/predict", "/complete"))
    app.add_middleware(Watch, metrics=metrics, routes=ROUTES)  # the outer one
    _errors(app)

    async def work(request: Request, prepare: Callable[[], Job], finish: Callable[[Any], Response]) -> Response:
        """Decode in the pool, run in the worker, encode in the pool; give up after the timeout, or when the client has
        hung up."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(settings.timeout):
                with worker.place() as place:
                    future = place.put(await loop.run_in_executor(pool, prepare))
                result = asyncio.wrap_future(future)
                try:
                    while not (await asyncio.wait((result,), timeout=0.5))[0]:
                        if await request.is_disconnected():
                            return Response(status_code=499)  # nobody reads it; the metrics do
                finally:
                    result.cancel()  # what still waits is not run
                return await loop.run_in_executor(pool, finish, result.result())
        except TimeoutError:
            metrics.add("enfilade_timeouts_total")
            sentence = f"no answer within {settings.timeout:g} seconds: try again later, or a smaller image"
            raise HTTPException(504, sentence) from None

    @app.post("/predict", responses=_documented(list(PREDICT)), response_class=Response)
    async def predict(
        request: Request,
        image: Photo,
        depth: Depth = None,
        model: ModelName = None,
        fx: Pixels = None,
        fy: Pixels = None,
        cx: Pixels = None,
        cy: Pixels = None,
        fov: Degrees = None,
    ) -> Response:
        """Labels and metric depth of a photo."""
        from enfilade.outputs import save

        media = negotiate(request.headers.get("accept", ""), list(PREDICT))
        name = model or default
        if name not in served:
            raise unknown("model", name, served)
        predictor, intrinsics = served[name], Intrinsics(fx, fy, cx, cy, fov)
        photo, given = await image.read(), None if depth is None else await depth.read()

        def prepare() -> Job:
            read = read_image(photo, settings.pixels)
            height, width = read.rgb.shape[:2]
            camera = intrinsics.camera(width, height)
            maps = _maps(predictor, name, given, read, camera, fov, settings.pixels)

            def run(items):
                start = time.perf_counter()
                pictures, more = [item[0] for item in items], [item[1] for item in items]
                options = {"camera": camera, "fov": fov, "given": more, "batch_size": settings.batch}
                found = predictor.batch(pictures, **options)
                return [(prediction, time.perf_counter() - start) for prediction in found]

            return Job(run, (read, maps), (name, height, width, intrinsics, tuple(maps)))

        def finish(result: tuple[Prediction, float]) -> Response:
            prediction, seconds = result
            if media == "application/json":
                kinds = [k for k in PREDICT[media] if getattr(prediction, k) is not None]
                pictures = dict(zip(kinds, written(save, prediction, kinds)))
                headers = {"Cache-Control": "no-store", "Vary": "Accept"}
                return JSONResponse(describe(prediction, name, seconds, pictures), headers=headers)
            files = written(save, prediction, PREDICT[media])
            if not files:
                raise UserError(f"model {name} gives no depth, and so no points: ask for another format or model")
            return _answer(media, files[0], "photo")

        return await work(request, prepare, finish)

    @app.post("/complete", responses=_documented(list(COMPLETE), {404: "No completion model"}), response_class=Response)
    async def complete(
        request: Request,
        image: Photo,
        depth: Depth = None,
        fx: Pixels = None,
        fy: Pixels = None,
        cx: Pixels = None,
        cy: Pixels = None,
        fov: Degrees = None,
        height: Metres = None,
    ) -> Response:
        """The room behind a photo, completed."""
        from enfilade import room_output
        from enfilade.complete import describe

        media = negotiate(request.headers.get("accept", ""), list(COMPLETE))
        if completer is None:
            raise HTTPException(404, "this service completes no rooms: start it with --completion")
        make, intrinsics = completer.complete, Intrinsics(fx, fy, cx, cy, fov)
        if height is not None and not 0 < height < 100:
            raise UserError(f"the camera's height lies between 0 and 100 metres, not {height:g}")
        photo, given = await image.read(), None if depth is None else await depth.read()

        def prepare() -> Job:
            read = read_image(photo, settings.pixels)
            metres = None
            if given is not None:
                demand_size(metres := read_depth(given, settings.pixels), read)
            camera = intrinsics.camera(read.rgb.shape[1], read.rgb.shape[0])
            options = {"fov": fov, "height": height, "estimator": estimator}
            return Job(lambda items: [make(items[0], metres, camera, **options)], read)

        def finish(room) -> Response:
            if media == "application/json":
                facts = describe(room) | {"model": completion, "voxels": list(room.volume.labels.shape)}
                del facts["name"]
                return JSONResponse(facts, headers={"Cache-Control": "no-store", "Vary": "Accept"})
            return _answer(media, written(room_output.save, room, COMPLETE[media], model=completion)[0], "room")

        return await work(request, prepare, finish)

    @app.get("/health", responses={503: {"description": "The service is stopping"}})
    async def health() -> JSONResponse:
        """Whether requests are taken."""
        well = worker.alive and not worker.stopping
        facts = {"status": "ok" if well else "stopping", "waiting": worker.length, "version": enfilade.__version__}
        return JSONResponse(facts, 200 if well else 503)

    facts = {
        "models": [_facts(name, predictor) for name, predictor in served.items()],
        "completion": completion,
        "limits": {"megabytes": settings.bytes / 1e6, "megapixels": settings.pixels / 1e6},
        "ramp": viz.colour_depth(np.linspace(1, 2, 256, dtype=np.float32)[None], 1.0, 2.0)[0].tobytes().hex(),
    }

    @app.get("/models")
    async def models() -> JSONResponse:
        """What is served: the models (the first is the default) with their classes, the completion model or null, the
        limits, and the 256 colours of depth from near to far (hexadecimal RGB)."""
        return JSONResponse(facts)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counted() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), headers={"Content-Type": TYPE})

    page, script = (STATIC / "index.html").read_bytes(), (STATIC / "app.js").read_bytes()

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/app.js", include_in_schema=False)
    async def code() -> Response:
        return Response(script, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    return app


def _facts(name: str, predictor: Any) -> dict[str, Any]:
    space = labels.get(predictor.meta.get("space", "nyu40"))
    classes = [{"name": n, "colour": c.tolist()} for n, c in zip(space.names, space.colours)]
    uses = "hha" in getattr(getattr(predictor, "network", None), "uses", ())
    return {"name": name, "space": space.name, "classes": classes, "takes_depth": uses}


def _maps(
    predictor: Any,
    name: str,
    given: bytes | None,
    image: images.Image,
    camera: Camera | None,
    fov: float | None,
    limit: int,
) -> dict[str, np.ndarray]:
    """What a network takes beside RGB: HHA, made of the depth map."""
    wants = "hha" in getattr(getattr(predictor, "network", None), "uses", ())
    if given is None:
        if wants:
            raise UserError(f"model {name} takes depth beside the photo: send depth, a 16-bit PNG of millimetres")
        return {}
    if not wants:
        raise UserError(f"model {name} takes no depth: leave it out, or choose another model")
    demand_size(depth := read_depth(given, limit), image)
    height, width = depth.shape
    if camera is None and fov is not None:
        camera = Camera.from_fov(width, height, float(fov))
    if camera is None and image.focal is not None:
        camera = Camera(image.focal, image.focal, (width - 1) / 2, (height - 1) / 2, width, height)
    if camera is None:
        raise UserError("depth needs its camera: send fx (and fy, cx, cy) or fov, for the photo's EXIF tells none")
    from enfilade.ops.hha import hha

    return {"hha": (hha(depth, camera) / 255).astype(np.float32)}
