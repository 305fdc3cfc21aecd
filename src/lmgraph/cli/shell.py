"""Shell completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL; e.g.  lmgraph completion bash >> ~/.bashrc"""
    from lmgraph.cli import lmgraph

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(lmgraph, {}, "lmgraph", "_LMGRAPH_COMPLETE").source())
