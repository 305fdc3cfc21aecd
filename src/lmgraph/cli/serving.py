"""The command that serves a graph over HTTP."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmgraph.cli import settings
from lmgraph.cli.keeping import STORE
from lmgraph.cli.run import PROFILE
from lmgraph.errors import UserError

if TYPE_CHECKING:
    from lmgraph.runtime import Runtime


@click.command()
@click.argument("path", metavar="[GRAPH]", type=click.Path(path_type=Path), required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one")
@click.option("--open", "is_open", is_flag=True, help="beyond this machine: let in anybody who reaches the port, without a key")
@click.option("--require-keys", is_flag=True, help="ask for an API key on this machine too (beyond it, that is the rule)")
@STORE
@click.option("--max-body", type=click.IntRange(1024), default=4 << 20, show_default=True, help="largest request body, in bytes")
@click.option("--max-active", type=click.IntRange(1), default=1024, show_default=True, help="answers in the making at a time; more get 429")
@click.option("--grace", type=click.IntRange(0), default=30, show_default=True, help="seconds that running answers may take when it stops")
@click.option("--log", type=click.Choice(["json", "off"]), default="off", show_default=True, help="a line a request, without its text")
@PROFILE
def serve(
    path: Path | None,
    host: str,
    port: int,
    is_open: bool,
    require_keys: bool,
    store: str | None,
    max_body: int,
    max_active: int,
    grace: int,
    log: str,
    profile: str | None,
) -> None:
    """Serve GRAPH (default: ./graph.yaml, else the built-in graph) as one OpenAI-compatible endpoint.

    Point any OpenAI client at http://127.0.0.1:8000/v1 and ask the model `lmgraph`, or pin a node with `lmgraph/NODE`. Beyond this
    machine an API key is asked for (lmgraph keys create NAME). Ctrl-C lets running answers end, then stops.
    """
    import uvicorn

    from lmgraph.cli.show import Bars
    from lmgraph.files import graph_file
    from lmgraph.runtime import Runtime
    from lmgraph.serve.app import Gateway
    from lmgraph.serve.editing import Editor
    from lmgraph.serve.guard import Guard, loopback
    from lmgraph.serve.http import Limits
    from lmgraph.serve.tracing import open_tracing
    from lmgraph.store import open_store
    from lmgraph.store.shield import Shielded

    using = settings(profile=profile, store=store)
    required = require_keys or not (is_open or loopback(host))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("lmgraph.serve").setLevel(logging.INFO if log == "json" else logging.WARNING)
    with Bars() as bars:
        runtime = Runtime.open(using, path, bars)
        listener = _listen(host, port)
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        at = f"http://{shown}:{number}"
        click.echo(f"lmgraph serves {len(runtime.graph.nodes)} nodes at {at}/v1, its page at {at}/ (Ctrl-C stops)", err=True)
        if required:
            click.echo("An API key is asked for; make one: lmgraph keys create NAME", err=True)
        _look(runtime)
        kept = Shielded(open_store(using.store))
        editor = Editor(runtime, graph_file(path or using.graph))
        guard = Guard(kept, required=required, local=loopback(host))
        app = Gateway(runtime, kept, guard, editor, Limits(body_bytes=max_body, active=max_active), open_tracing(os.environ))
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=grace,
            server_header=False,
            date_header=False,
            proxy_headers=False,  # nothing here depends on a client's address
        )
        gc.collect()
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again and again
        gc.set_threshold(5_000, 20, 50)
        uvicorn.Server(config).run([listener])


def _look(runtime: Runtime) -> None:
    """Say which servers do not have what the graph names. The gateway serves all the same: fallbacks answer, and it looks again."""
    from lmgraph.workers.survey import survey

    for found in asyncio.run(survey(runtime.graph)):
        if found.problem:
            click.secho(f"Node {found.node} cannot be answered by its server now: {found.problem}", fg="red", err=True)
        elif found.note:
            click.echo(f"Node {found.node}: {found.note}", err=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"Cannot listen on {host}:{port}: {error.strerror or error}.", "Choose another one: --port 0 takes any.") from error
