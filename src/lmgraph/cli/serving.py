"""The command that serves a graph over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import socket
from pathlib import Path

import click

from lmgraph.cli import settings
from lmgraph.cli.run import PROFILE
from lmgraph.errors import UserError


@click.command()
@click.argument("path", metavar="[GRAPH]", type=click.Path(path_type=Path), required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one")
@click.option("--open", "is_open", is_flag=True, help="listen beyond this machine although anybody who reaches the port may ask")
@click.option("--max-body", type=click.IntRange(1024), default=4 << 20, show_default=True, help="largest request body, in bytes")
@click.option("--max-active", type=click.IntRange(1), default=1024, show_default=True, help="answers in the making at a time; more get 429")
@PROFILE
def serve(path: Path | None, host: str, port: int, is_open: bool, max_body: int, max_active: int, profile: str | None) -> None:
    """Serve GRAPH (default: ./graph.yaml, else the built-in graph) as one OpenAI-compatible endpoint.

    Point any OpenAI client at http://127.0.0.1:8000/v1 and ask the model `lmgraph`, or pin a node with `lmgraph/NODE`. Ctrl-C lets
    running answers end, then stops.
    """
    import uvicorn

    from lmgraph.cli.show import Bars
    from lmgraph.runtime import Runtime
    from lmgraph.serve.app import Gateway, Limits

    if not is_open and not _loopback(host):
        raise UserError(
            f"{host} can be reached from other machines, and nothing asks for a key yet.",
            "Listen on 127.0.0.1 behind a proxy that checks keys, or say --open.",
        )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with Bars() as bars:
        runtime = Runtime.open(settings(profile=profile), path, bars)
        listener = _listen(host, port)
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        click.echo(f"lmgraph serves {len(runtime.graph.nodes)} nodes at http://{shown}:{number}/v1 (Ctrl-C stops)", err=True)
        app = Gateway(runtime, Limits(body_bytes=max_body, active=max_active))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=30, server_header=False, date_header=False
        )
        uvicorn.Server(config).run([listener])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"Cannot listen on {host}:{port}: {error.strerror or error}.", "Choose another one: --port 0 takes any.") from error
