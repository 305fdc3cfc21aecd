"""Commands that simulate a service: kubernetes size, kubernetes simulate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmgraph.cli import settings
from lmgraph.cli.run import JSON
from lmgraph.errors import DataError, MissingExtra, UserError

if TYPE_CHECKING:
    from lmgraph.simulate.draft import Draft
    from lmgraph.simulate.scenario import Scenario

SEED = click.option("--seed", type=int, default=0, show_default=True, help="of the random numbers: the same seed, the same figures")


@click.command()
@click.argument("path", metavar="[GRAPH]", type=click.Path(path_type=Path), required=False)
@click.option("--rate", type=click.FloatRange(0, 1e6, min_open=True), required=True, help="requests a second, on average")
@click.option("--arrivals", type=click.Choice(["poisson", "bursty", "diurnal"]), default="poisson", show_default=True, help="how they come")
@click.option(
    "--peak", type=click.FloatRange(1, 100), help="bursty: the rate in a burst over the mean (3); diurnal: at the top of the day (1.6)"
)
@click.option(
    "--p99",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="seconds within which 99 of 100 first tokens come",
)
@click.option(
    "--load", type=click.FloatRange(0, 0.95, min_open=True), default=0.7, show_default=True, help="most of a part's capacity to plan with"
)
@click.option(
    "--master",
    type=click.Choice(["auto", "embedded", "batched"]),
    default="auto",
    show_default=True,
    help="one in every gateway, or on GPUs",
)
@click.option("--hardware", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True, help="of the workers")
@click.option(
    "--balance",
    type=click.Choice(["random", "two"]),
    default="random",
    show_default=True,
    help="which replica gets a call: any, or the better of two",
)
@click.option(
    "--billions", "sizes", multiple=True, metavar="MODEL=N", help="billions of parameters of a model whose name does not tell (repeat)"
)
@click.option("--share", "shares", multiple=True, metavar="NODE=WEIGHT", help="how often a node is chosen (repeat; default: all alike)")
@click.option("--hops", type=click.FloatRange(1, 20), help="worker calls of a request on average (default: 1; the voters of a vote)")
@click.option("--prompt", type=click.FloatRange(1, 1e6), help="tokens of a prompt on average")
@click.option("--output", type=click.FloatRange(1, 1e6), help="tokens of an answer on average")
@click.option(
    "--large", type=click.FloatRange(0.1, 75), default=70.0, show_default=True, help="billions of the one large model to compare with"
)
@click.option("--scenario", "file", type=click.Path(path_type=Path), help="a scenario with times of your own, instead of a graph")
@SEED
@JSON
def size(
    path: Path | None,
    rate: float,
    arrivals: str,
    peak: float | None,
    p99: float,
    load: float,
    master: str,
    hardware: str,
    balance: str,
    sizes: tuple[str, ...],
    shares: tuple[str, ...],
    hops: float | None,
    prompt: float | None,
    output: float | None,
    large: float,
    file: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """How many gateways, masters, Redis shards and workers GRAPH needs (default: ./graph.yaml, else the built-in graph).

    Simulates the service with measured times where there are some and assumed ones where not, and raises what is to blame until the
    target holds. Nothing is asked of a cluster. The tables end with every assumption; replace them with times of your own by --scenario
    (docs/scaling.md).
    """
    from lmgraph.files import read_graph

    if file and path:
        raise UserError("Found a graph and --scenario, expected one of them.", "A scenario names its workers itself.")
    _need_simpy()
    from lmgraph.cli.measuring import typed
    from lmgraph.cli.show import Bars, out
    from lmgraph.simulate import advice as advising
    from lmgraph.simulate.draft import draft, draft_of
    from lmgraph.simulate.load import Arrivals
    from lmgraph.simulate.size import Target

    top = Arrivals(rate, arrivals, peak=peak or 3.0, swing=min(1.0, (peak or 1.6) - 1))
    if arrivals == "diurnal":  # what has to be carried is the top of the day
        top = Arrivals(top.most())
    if file:
        made = draft_of(replace(_read(file), arrivals=top), file.name, large=large)
    else:
        given, _ = read_graph(path or settings().graph)
        made = draft(
            given,
            rate,
            arrivals=top,
            hardware=hardware,
            billions=_pairs(sizes, "--billions", "MODEL=N"),
            shares=_pairs(shares, "--share", "NODE=WEIGHT"),
            hops=hops,
            balance=balance,
            large=large,
        )
    made = _with_tokens(made, prompt, output)
    _check(made.scenario)
    with Bars() as bars:
        found = advising.advise(
            made, Target(p99, load), master, seed, lambda what, done, total: bars.progress(what, round(done), round(total))
        )
    report = advising.report(found, typed())
    if arrivals == "diurnal" and not as_json:
        out(f"Sized for the top of the day: {top.rate:,g} requests/s.\n")
    _give(report, as_json)
    if not as_json:
        out("\n".join([report.note, "", "Assumptions:", *(f"- {line}" for line in found.assumptions)]) + "\n")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--slices", type=click.IntRange(1), default=1, show_default=True, help="simulate one of so many equal slices")
@SEED
@JSON
def simulate(file: Path, slices: int, seed: int, as_json: bool) -> None:
    """Play the scenario in FILE (YAML, docs/scaling.md) through, with its numbers of replicas and its autoscalers, and show the figures."""
    _need_simpy()
    from lmgraph.cli.measuring import typed
    from lmgraph.cli.show import Bars
    from lmgraph.simulate.advice import played
    from lmgraph.simulate.run import run
    from lmgraph.simulate.scenario import slice_of

    scenario = slice_of(_read(file), slices)
    with Bars() as bars:
        figures = run(scenario, seed, samples=200, watch=lambda done, total: bars.progress("simulating", round(done), round(total)))
    _give(played(scenario, figures, file.name, typed()), as_json)


def _need_simpy() -> None:
    """Raises MissingExtra where the simulation cannot run."""
    try:
        import simpy  # noqa: F401
    except ImportError as error:
        raise MissingExtra("The simulation", "simulate") from error


def _read(file: Path) -> Scenario:
    from lmgraph.simulate import scenario

    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.", "Expected a scenario in YAML; docs/scaling.md shows one.") from error
    return scenario.loads(text, file.name)


def _check(scenario: Scenario) -> None:
    from lmgraph.simulate.scenario import check

    if problems := check(scenario):
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"This cannot be simulated:\n{listed}", "See: lmgraph kubernetes size --help")


def _with_tokens(made: Draft, prompt: float | None, output: float | None) -> Draft:
    """Other lengths of prompts and answers, where they were named."""
    scenario = made.scenario
    scenario = replace(
        scenario,
        prompt=replace(scenario.prompt, mean=prompt or scenario.prompt.mean),
        output=replace(scenario.output, mean=output or scenario.output.mean),
    )
    told = [f"{what} of {value:g} tokens on average, as asked" for what, value in (("prompts", prompt), ("answers", output)) if value]
    return replace(made, scenario=scenario, assumptions=(*told, *made.assumptions))


def _pairs(given: Sequence[str], option: str, form: str) -> dict[str, float]:
    """Numbers by name out of NAME=NUMBER."""
    found = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name or not 0 <= found[name] < 1e6:
            raise UserError(
                f"{option}: found {text!r}, expected {form} with a number from 0 on.",
                f"For example: {option} {form.split('=')[0].lower()}=3",
            )
    return found


def _give(report: object, as_json: bool) -> None:
    from lmgraph.cli.measuring import give
    from lmgraph.evaluate.report import Report

    assert isinstance(report, Report)
    give(report, None, as_json)
