"""What a request may hold, and how much of it: bytes, pixels, formats, cameras. Nothing here opens a file.

A body is counted while it arrives, whatever its Content-Length says. An image is looked at (its first bytes, then its
header) before a pixel of it is decoded.
"""

import asyncio
import io
import math
import re
import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import PIL.Image
from fastapi import HTTPException
from jaxtyping import Float32
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from enfilade import images
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.shipped import DEFAULT

NAME = "photo"  # of every image: the file name that a browser sends is not looked at
PNG = b"\x89PNG\r\n\x1a\n"
# Of a JPEG: each may cost as much as a picture, and be 20 bytes long. Photos have 1 to 20; but what is stored behind
# a picture, a video for one, has the same two bytes by chance, about 15 times in a megabyte.
SCANS = 500
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the service serves, and its limits. Sizes are per request.

    `models` are shipped names, model files or run folders, the first the default; no other is ever loaded. `crf`
    refines the labels of all or none of them; without it each does as its file says. `waiting` requests may wait for
    the network, which takes up to `batch` of one kind together and waits `patience` seconds for them. `timeout` seconds
    after a request's body has come, and again after it was read, the service gives up.
    """

    models: tuple[str, ...] = (DEFAULT,)
    completion: str | None = None
    device: str | None = None
    precision: str = "auto"
    flip: bool = True
    crf: bool | None = None
    threads: int | None = None
    waiting: int = 8
    batch: int = 4
    patience: float = 0.005
    timeout: float = 60.0
    bytes: int = 20_000_000
    pixels: int = 25_000_000
    uploads: int = 32

    def __post_init__(self):
        if not self.models:
            raise UserError("the service needs at least one model: give --models")
        for name in ("waiting", "batch", "timeout", "bytes", "pixels", "uploads"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be more than 0, not {getattr(self, name)}")
        if not 0 <= self.patience <= 1:
            raise UserError(f"patience lies between 0 and 1 second, not {self.patience:g}")
        if self.pixels > images.PIXEL_LIMIT:
            raise UserError(f"images of more than {images.PIXEL_LIMIT / 1e6:g} megapixels are never decoded")


def demand_form(content_type: bytes) -> str | None:
    """Why a body of this Content-Type is not read, or None. A form may name the charset of its fields, and some that
    Python knows take time that grows with the square of a field's length: no other than the usual ones."""
    if content_type.split(b";")[0].strip().lower() != b"multipart/form-data":
        return "the body must be multipart/form-data with the photo as its field image"
    named = re.findall(rb"charset", content_type, re.IGNORECASE)
    usual = re.findall(rb';\s*charset="?(?:utf-?8|us-ascii)"?\s*(?=;|$)', content_type, re.IGNORECASE)
    return None if len(named) == len(usual) else "the fields of a form are UTF-8: leave its charset out"


class BodyLimit:
    """ASGI middleware: bodies of more than `limit` bytes are refused (413) while they arrive, those that take longer
    than `timeout` seconds to arrive too (408), and more than `uploads` at once (503). What is posted to the paths
    `forms` must be a form (415)."""

    def __init__(self, app: ASGIApp, *, limit: int, timeout: float, uploads: int, forms: Collection[str] = ()):
        self.app, self.limit, self.timeout, self.uploads, self.forms = app, limit, timeout, uploads, frozenset(forms)
        self.arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"")
        form = scope["method"] == "POST" and scope["path"] in self.forms
        if form and (problem := demand_form(headers.get(b"content-type", b""))) is not None:
            return await self._refuse(415, problem, scope, receive, send)
        if stated.isdigit() and int(stated) > self.limit:
            return await self._refuse(413, self._too_large(), scope, receive, send)
        if scope["method"] == "POST" and self.arriving >= self.uploads:
            return await self._refuse(503, "too many uploads at once: try again later", scope, receive, send)
        deadline, seen, arriving = time.monotonic() + self.timeout, 0, scope["method"] == "POST"
        self.arriving += arriving

        async def counted():
            nonlocal seen, arriving
            if not arriving:  # whoever asks now waits for the client to hang up
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time", {"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, self._too_large(), {"Connection": "close"})
            if not message.get("more_body", False):
                arriving = False
                self.arriving -= 1
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.arriving -= arriving

    def _too_large(self) -> str:
        return f"the request is larger than {self.limit / 1e6:g} MB: send a smaller or more compressed image"

    async def _refuse(self, status: int, sentence: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Connection": "close"} | ({"Retry-After": "5"} if status == 503 else {})
        await JSONResponse({"error": sentence}, status, headers)(scope, receive, send)


def read_image(data: bytes, limit: int) -> images.Image:
    """A photo: PNG, JPEG or WebP, and HEIF where its decoder is installed. Raises UserError for anything else, for a
    damaged file and for more than `limit` pixels."""
    if not data:
        raise UserError("the image is empty (0 bytes)")
    known = data.startswith((PNG, b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    if not known and not (data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS):
        raise UserError("the image is neither PNG nor JPEG nor WebP: convert it")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS:
        raise UserError(f"the image is a JPEG of more than {SCANS} scans, too many to decode safely: save it anew")
    return images.read(data, name=NAME, limit=limit)


def read_depth(data: bytes, limit: int) -> Float32[np.ndarray, "h w"]:
    """A depth map in metres from a 16-bit grey PNG of millimetres; 0 and 65535, which mean unknown, become 0."""
    wanted = "the depth map must be a 16-bit grey PNG of millimetres"
    # Bytes 24 and 25 of a PNG: bits per sample, and 0 for grey
    if not data.startswith(PNG) or data[24:26] != b"\x10\x00":
        raise UserError(wanted)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width * picture.height > limit:
                size = f"{picture.width} x {picture.height}"
                raise UserError(f"the depth map is {size} pixels, more than the limit of {limit / 1e6:g} megapixels")
            stored = np.asarray(picture).astype(np.int64)
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise UserError("the depth map is cut off or damaged") from error
    if not (known := (stored > 0) & (stored < 65535)).any():
        raise UserError("the depth map holds no depth: not a pixel lies between 1 and 65534 mm")
    return (np.where(known, stored, 0) / 1000).astype(np.float32)


def demand_size(depth: Float32[np.ndarray, "h w"], image: images.Image) -> None:
    """Raise UserError where a depth map and its image differ in size."""
    (height, width), (h, w) = depth.shape, image.rgb.shape[:2]
    if (height, width) != (h, w):
        raise UserError(f"the depth map is {width} x {height} pixels, the upright image {w} x {h}: align them first")


@dataclass(frozen=True, slots=True)
class Intrinsics:
    """What a request says of its camera, in pixels of the upright image, or the horizontal field of view, degrees."""

    fx: float | None = None
    fy: float | None = None
    cx: float | None = None
    cy: float | None = None
    fov: float | None = None

    def __post_init__(self):
        given = [name for name in ("fx", "fy", "cx", "cy") if getattr(self, name) is not None]
        for name in (*given, *(["fov"] if self.fov is not None else [])):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} must be a finite number")
        if given and self.fov is not None:
            raise UserError("give the camera once: by fx, fy, cx and cy, or by fov")
        if given and self.fx is None:
            raise UserError("a camera needs fx, its focal length in pixels")
        if self.fov is not None and not 1 <= self.fov <= 170:
            raise UserError(f"a horizontal field of view lies between 1 and 170 degrees, not {self.fov:g}")

    def camera(self, width: int, height: int) -> Camera | None:
        """The camera of an image of this size, or None where only its field of view is told, or nothing."""
        if self.fx is None:
            return None
        fy = self.fx if self.fy is None else self.fy
        diagonal = math.hypot(width, height)
        for name, focal in (("fx", self.fx), ("fy", fy)):
            if not 0.05 * diagonal < focal < 100 * diagonal:
                raise UserError(f"{name} of {focal:g} pixels fits no lens of an image of {width} x {height}")
        cx = (width - 1) / 2 if self.cx is None else self.cx
        cy = (height - 1) / 2 if self.cy is None else self.cy
        if not (-width < cx < 2 * width and -height < cy < 2 * height):
            raise UserError(f"the principal point ({cx:g}, {cy:g}) is far outside the image of {width} x {height}")
        return Camera(float(self.fx), float(fy), float(cx), float(cy), width, height)
