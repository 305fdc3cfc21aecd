"""Where a call to a worker goes and what is sent first: a URL and the environment's proxies, worked out once for many calls.

It knows URLs (RFC 3986), Basic authentication (RFC 7617) and how a proxy is asked (RFC 9112 section 3.2). It opens nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass


@dataclass(frozen=True)
class Target:
    """Where calls to one URL go: `prepare` makes it once. `origin` is (TLS, host, port)."""

    origin: tuple[bool, str, int]
    head: bytes
    """request line and the headers that are always the same, each with its line end"""
    proxy: tuple[str, int, bytes] | None
    """host, port, header with its line end (or b'')"""
    tunnel: bytes
    """what is sent to the proxy before TLS begins; b'': nothing"""


def prepare(url: str, headers: Mapping[str, str], method: str = "POST") -> Target:
    """The target of a request to a URL with these headers; the environment may name a proxy. Raises ValueError for a URL that is none."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is no http:// or https:// URL with a host")
    host, port = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname, parts.port
    name = f"[{host}]" if ":" in host else host
    authority = f"{name}:{port}" if port else name
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = {"Host": authority, **headers}
    if parts.username is not None and "Authorization" not in lines:
        lines["Authorization"] = _basic(parts.username, parts.password)
    proxy = _proxy(parts.scheme, host)
    where, tunnel = path, b""
    if proxy and secure:
        there = f"{name}:{port or 443}"
        tunnel = f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n".encode() + proxy[2] + b"\r\n"
    elif proxy:
        where = f"http://{authority}{path}"
    head = f"{method} {where} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    if any(not 32 <= ord(c) < 127 for c in head.replace("\r\n", "")) or head.count("\n") != len(lines) + 1 or " " in where + authority:
        raise ValueError("it holds characters that no URL has")
    begun = head.encode() + (proxy[2] if proxy and not secure else b"")
    return Target((secure, host, port or (443 if secure else 80)), begun, proxy, tunnel)


def _basic(user: str, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()


def _proxy(scheme: str, host: str) -> tuple[str, int, bytes] | None:
    """The proxy that the environment names; none on the way to this machine itself. Raises ValueError for one that is none."""
    if host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    proxies = getproxies()
    named = proxies.get(scheme) or proxies.get("all")
    if not named:
        return None
    parts = urlsplit(named if "//" in named else f"//{named}")
    if parts.scheme not in ("", "http") or not parts.hostname:
        raise ValueError(f"the environment names a proxy of the kind {parts.scheme or 'unknown'}, expected http://host:port")
    header = f"Proxy-Authorization: {_basic(parts.username, parts.password)}\r\n".encode() if parts.username is not None else b""
    return parts.hostname, parts.port or 80, header
