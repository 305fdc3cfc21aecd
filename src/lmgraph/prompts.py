"""The one rendering of a query, and of the trace of a walk, for the master; training and serving both use it, byte for byte.

A prompt is a list of segments: template text, where special tokens mean what they say, and user text, where they never do.
The head is the same for every query (llama.cpp keeps its state cached), the tail is short: it is paid for with every decision.
A walk goes on where the decision before it ended: what the master wrote (functional token, request, end token) stays as it is, then
comes a digest of the answer, where there is one, and the tail again. So each hop costs what is new, not what came before.
This room knows no token ids and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_LIMIT = 40
"""tokens of a step's answer that the master sees when it chooses what comes next"""
ANSWER_CHARACTERS = 2_000
"""of a step's answer that are looked at for them"""


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt. `special`: the tokenizer may read special tokens in it (never true for user text)."""

    text: str
    special: bool


@dataclass(frozen=True)
class Template:
    """How a master sees a query: head + query + tail. The master's first token comes right after the tail.

    After a finished step: answer + digest of what the worker said + tail; then comes the next functional token, or the end token.
    """

    head: str
    tail: str
    answer: str = "\nAnswer: "


TEMPLATES = {
    "lmgraph": Template(
        head="<|im_start|>",
        tail="\nField:",
    ),
    # Octopus v4 (NexaAI/Octopus-v4 model card): one string, no newlines between the turns.
    "octopus-v4": Template(
        head="<|system|>You are a router. Below is the query from the users, please call the correct function and "
        "generate the parameters to call the function.<|end|><|user|>",
        tail="<|end|><|assistant|>",
    ),
}


def render(query: str, dialect: str = "lmgraph") -> tuple[Segment, Segment, Segment]:
    """Segments (head, query, tail) of the master's prompt for one query. Raises KeyError for an unknown dialect."""
    template = TEMPLATES[dialect]
    return Segment(template.head, True), Segment(query, False), Segment(template.tail, True)


def passed(answer: str, dialect: str = "lmgraph") -> tuple[Segment, ...]:
    """Segments after the decision of a finished step: its answer (left out where there is none yet, as in a plan), then the tail."""
    template = TEMPLATES[dialect]
    told = (Segment(template.answer, True), Segment(answer[:ANSWER_CHARACTERS], False)) if answer else ()
    return (*told, Segment(template.tail, True))


def shorten(ids: list[int], limit: int) -> tuple[list[int], int]:
    """At most `limit` ids: the head (two thirds) and the tail (one third) of a long query, and how many were left out.

    A question often sits at the end of a long text, its setting at the beginning; both count for routing.
    """
    if len(ids) <= limit:
        return ids, 0
    head = limit * 2 // 3
    tail = limit - head
    return ids[:head] + ids[len(ids) - tail :], len(ids) - limit
