"""The page: the files of `web/`, read once from the package, each with its type, ETag and security headers.

It knows files and headers. It does not know requests, the graph nor the API: what the page shows, it asks for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: no inline script, no inline style, nothing from elsewhere"""
KINDS = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "mjs": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
    "txt": b"text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class File:
    """One file as it is sent: `headers` has everything but content-type and content-length; `etag` is in it too, quotes and all."""

    body: bytes
    kind: bytes
    etag: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def load() -> Mapping[str, File]:
    """Path (`/`, `/web/NAME`) -> file. No path but these is served, so none can lead out of the folder."""
    files = {}
    for entry in resources.files("lmgraph.serve").joinpath("web").iterdir():
        kind = KINDS.get(entry.name.rpartition(".")[2])
        if kind and entry.is_file():
            files["/" if entry.name == "index.html" else f"/web/{entry.name}"] = _file(entry.read_bytes(), kind)
    return files


def _file(body: bytes, kind: bytes) -> File:
    etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'.encode()
    headers = [
        (b"etag", etag),
        (b"cache-control", b"no-cache"),  # kept, but asked about each time: files of two versions never mix
        (b"content-security-policy", POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]
    return File(body, kind, etag, headers)


FILES = load()


def find(path: str) -> File | None:
    """The file at a path, None when there is none. For `If-None-Match: <etag>` the door answers 304 with the same headers."""
    return FILES.get(path)
