"""Plans: steps with needs, the waves in which they run, earlier answers put into later requests. Pure; it knows text and numbers.

A request names what it needs in its own text: `{0}` stands where the answer of the first step goes (Octo-planner's steps joined by a split
token, with the needs written down). It knows no master, no worker and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmgraph.rewrite import PLACE


@dataclass(frozen=True)
class Request:
    """One step of a plan: which node, what is asked of it, and which earlier steps (0-based) it needs the answers of."""

    node: str
    text: str
    needs: tuple[int, ...] = ()


def needs(text: str) -> tuple[int, ...]:
    """Which answers a request names, each once, in the order of the steps."""
    return tuple(sorted({int(number) for number in PLACE.findall(text)}))


def problems(steps: Sequence[Request]) -> list[str]:
    """What is wrong with the needs of a plan: steps that need themselves, a later one or none that there is."""
    found = []
    for number, step in enumerate(steps):
        for need in step.needs:
            if need >= len(steps):
                found.append(f"step {number} ({step.node}) needs step {need}; the plan has {len(steps)}")
            elif need >= number:
                found.append(f"step {number} ({step.node}) needs step {need}, which comes {'with' if need == number else 'after'} it")
    return found


def waves(steps: Sequence[Request]) -> list[list[int]]:
    """Steps that can run together: each wave needs only what waves before it gave. Raises ValueError for a plan with `problems`."""
    if wrong := problems(steps):
        raise ValueError("; ".join(wrong))
    depth: list[int] = []
    for step in steps:
        depth.append(1 + max((depth[need] for need in step.needs), default=-1))
    return [[i for i, at in enumerate(depth) if at == level] for level in range(max(depth, default=-1) + 1)]


def fill(text: str, answers: Mapping[int, str], limit: int) -> str:
    """The request with earlier answers in it, `limit` characters of them in all: what was cut off is said.

    What looks like a place of another answer is text and stays as it is.
    """
    share = limit // max(1, sum(int(number) in answers for number in PLACE.findall(text)))
    return PLACE.sub(lambda match: cut(answers[int(match[1])], share) if int(match[1]) in answers else match[0], text)


def cut(text: str, limit: int) -> str:
    """At most about `limit` characters, the beginning and the end of a longer text, with a marker that says how much is left out."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]} [... {len(text) - limit:,} characters left out ...] {text[len(text) - tail :]}"
