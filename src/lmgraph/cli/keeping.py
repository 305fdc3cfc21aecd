"""Commands about what the gateway keeps: API keys and the cache of answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

import click

from lmgraph.cli import settings
from lmgraph.cli.run import JSON
from lmgraph.errors import UserError
from lmgraph.store.base import ApiKey, Store

T = TypeVar("T")
STORE = click.option("--store", help="URL: sqlite:///FILE, sqlite:// (in memory), redis://HOST:PORT/0 (default: LMGRAPH_STORE)")


def with_store(url: str | None, work: Callable[[Store], Awaitable[T]]) -> T:
    """What `work` returns, done on the store that is named."""
    from lmgraph.store import open_store

    async def run() -> T:
        store = open_store(settings(store=url).store)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


@click.group()
def keys() -> None:
    """Make, list and revoke API keys. A store keeps only a key's digest: its secret is shown once."""


@keys.command()
@click.argument("name")
@click.option("--admin", is_flag=True, help="may change the graph, empty the cache and read everybody's history")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="requests a minute (default: no limit)")
@click.option("--concurrent", type=click.IntRange(1), help="requests at the same time (default: no limit)")
@STORE
@JSON
def create(name: str, admin: bool, rate: float | None, concurrent: int | None, store: str | None, as_json: bool) -> None:
    """Make a key for NAME and print its secret."""
    key, secret = ApiKey.make(name, rate_per_minute=rate, concurrent=concurrent, admin=admin)
    with_store(store, lambda kept: kept.add_key(key))
    if as_json:
        print(json.dumps({**_shown(key), "secret": secret}))
        return
    print(secret)
    click.echo(f"Key {key.id} for {name}: this is the only time that its secret is shown.", err=True)


@keys.command("list")
@STORE
@JSON
def show(store: str | None, as_json: bool) -> None:
    """List all keys, revoked ones too."""
    found = with_store(store, lambda kept: kept.keys())
    if as_json:
        print(json.dumps([_shown(key) for key in found]))
        return
    if not found:
        click.echo("No keys. Make one: lmgraph keys create NAME", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "made", "rate a minute", "at the same time", "admin", "revoked")
    for key in found:
        limits = ("-" if limit is None else f"{limit:g}" for limit in (key.rate_per_minute, key.concurrent))
        table.add_row(key.id, key.name, _when(key.created), *limits, "yes" if key.admin else "", _when(key.revoked))
    Console().print(table)


@keys.command()
@click.argument("id")
@STORE
def revoke(id: str, store: str | None) -> None:
    """Take back the key ID. Running gateways let go of it within 5 seconds."""
    if not with_store(store, lambda kept: kept.revoke(id)):
        raise UserError(f"There is no key {id!r} that could be revoked.", "See: lmgraph keys list")
    click.echo(f"Revoked {id}.")


@click.group()
def cache() -> None:
    """Look after the gateway's cache of answers (given again to the same question at temperature 0, for a day)."""


@cache.command()
@STORE
def purge(store: str | None) -> None:
    """Empty the cache."""
    click.echo(f"Removed {with_store(store, lambda kept: kept.purge())} answers.")


def _shown(key: ApiKey) -> dict[str, object]:
    return {name: value for name, value in key.to_json().items() if name != "digest"}


def _when(at: float | None) -> str:
    return "" if at is None else f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}"
