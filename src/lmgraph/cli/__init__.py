"""The command line: a lazy table of commands, so that `--help` loads nothing heavy, and the one place where errors are shown.

It knows names of commands and how a failure looks to a person. What commands do lives in the modules beside it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from lmgraph import __version__
from lmgraph.errors import LmgraphError, UserError

COMMANDS = {
    "ask": ("run", "Ask a question: decision, rewritten query, streamed answer."),
    "route": ("run", "Only decide: one query, or a JSON Lines file or stdin."),
    "chat": ("run", "Talk in the terminal, with the whole graph."),
    "serve": ("serving", "Serve the graph as one OpenAI-compatible endpoint."),
    "keys": ("keeping", "Make, list and revoke the gateway's API keys."),
    "cache": ("keeping", "Look after the gateway's cache of answers."),
    "graph": ("graphs", "Make, look at, check and edit graph.yaml."),
    "kubernetes": ("clusters", "From a graph to a cluster: manifests, sizes, simulation."),
    "pull": ("weights", "Fetch weights now instead of on first use."),
    "bundle": ("weights", "Look at master bundles, mix them."),
    "train": ("training", "Train a master, fit rows, export a GGUF."),
    "evaluate": ("measuring", "Measure routers on data that was not used for training."),
    "completion": ("shell", "Print the completion script of a shell."),
}


class Lazy(click.Group):
    """A group whose commands are imported when they are called: name -> (module of this folder, what it does)."""

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._table:
            return None
        return getattr(importlib.import_module(f"lmgraph.cli.{self._table[name][0]}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])


@click.group(cls=Lazy, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lmgraph")
def lmgraph() -> None:
    """Many language models as one: a trained master sends every query to the right expert of a graph.

    Start with:  lmgraph ask "What is the derivative of x^3 at x = 2?"
    """


def main(arguments: list[str] | None = None) -> None:
    """Run a command; turn every failure into a message and an exit code (1 failure, 2 usage, 130 interrupted)."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries below draw bars of their own on stderr; a user sees ours
    try:
        result = lmgraph.main(args=arguments, prog_name="lmgraph", standalone_mode=False)
        _flush()
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nInterrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _let_go()
        sys.exit(141)
    except LmgraphError as error:
        _show(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Exception as error:
        if os.environ.get("PYTHONDEVMODE"):
            raise
        click.secho(f"Internal error: {type(error).__name__}: {error}", fg="red", err=True)
        click.echo("This is a bug in lmgraph. Run again with PYTHONDEVMODE=1 for the traceback and report it.", err=True)
        sys.exit(70)


def _flush() -> None:
    """Write out what is left here, where a reader that went away is no surprise; Python's own flush at the end would complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
        sys.exit(141)


def _let_go() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(error: LmgraphError) -> None:
    click.secho("Error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(error.message, err=True)
    if error.hint:
        click.echo(error.hint, err=True)


def settings(**overrides: Any) -> Any:
    """Settings from the environment, overridden by options that were given."""
    from dataclasses import replace

    from lmgraph.settings import read

    return replace(read(), **{name: value for name, value in overrides.items() if value is not None})
