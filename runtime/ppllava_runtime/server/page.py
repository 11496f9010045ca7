"""The web page at /: plain files, each with its hash, and nothing that comes from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ppllava_engines.errors import NotFoundError

# Only what the page has: its own scripts, style, pictures and server; videos and pictures of the
# person's own as blobs, heatmaps as data. Nothing inline, and no text is ever taken for HTML.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "permissions-policy": "camera=(self), microphone=(), geolocation=(), display-capture=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # Asked for each time and answered with 304: a server that was updated is not half the old page.
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page, or what else is the same for everybody.

    Attributes:
        body: Its bytes.
        media_type: What a browser takes it for.
        etag: Of its content.
    """

    body: bytes
    media_type: str
    etag: str

    @staticmethod
    def of(body: bytes, media_type: str) -> Asset:
        """The asset of these bytes."""
        return Asset(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    async def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = _HEADERS | {"etag": self.etag}
        known = request.headers.get("if-none-match", "")
        # A proxy that compresses weakens the tag it passes on.
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


def read_assets() -> dict[str, Asset]:
    """The files of the page by name.

    Raises:
        NotFoundError: The package was installed without them.
    """
    assets = {}
    folder = files("ppllava_runtime.server") / "page"
    for file in folder.iterdir() if folder.is_dir() else ():
        suffix = "." + file.name.rpartition(".")[2]
        if suffix in _TYPES:
            assets[file.name] = Asset.of(file.read_bytes(), _TYPES[suffix])
    if "index.html" not in assets:
        raise NotFoundError(
            f"page: there is no index.html in {folder}: install ppllava-edge again from a wheel"
        )
    return assets


def page_routes() -> list[BaseRoute]:
    """The routes of the page, of its files and of what it has to know of the server.

    Raises:
        NotFoundError: The package was installed without the page's files.
    """
    assets = read_assets()
    routes: list[BaseRoute] = [
        Route("/page/settings.json", _settings, methods=["GET"], include_in_schema=False)
    ]
    for name, asset in assets.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        routes.append(Route(path, asset.answer, methods=["GET"], include_in_schema=False))
    return routes


async def _settings(request: Request) -> Response:
    """What the page has to know before it has a key: nothing that is secret."""
    settings = request.app.state.service.settings
    return JSONResponse(
        {
            "body_bytes": settings.body_bytes,
            "media_bytes": settings.media.num_bytes,
        },
        headers=_HEADERS | {"cache-control": "no-store"},
    )
