"""Clients of the run: conversations through the load balancer with the official client, every turn written down with how it ended.

Each talker holds one conversation after another and sends only the new turn: what was said before must come from the store. How a turn may
end: kept, unkept (the answer says so), an error of OpenAI's form with a code, or a broken connection. Anything else is `untyped`, and a
defect. It knows the address and nothing of what happens to the hosts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import openai
from hosts import Host

PAUSE_S = 0.05
"""between two turns of a talker"""
TURNS = 8
"""turns of a conversation"""
TOKENS = 8
"""of an answer"""
KEPT, UNKEPT, BROKEN, UNTYPED = "kept", "unkept", "connection", "untyped"
GAVE_UP_S = 90.0
"""longer than any bound that is to be shown: a client that gives up hides what would have happened"""


@dataclass(frozen=True)
class Turn:
    """One turn. Times are seconds of time.monotonic; `outcome` is KEPT, UNKEPT, or why there was no answer (a code)."""

    talker: int
    conversation: str
    number: int
    model: str
    text: str
    began: float
    ended: float
    outcome: str
    streamed: bool
    answer: str = ""
    node: str = ""
    gateway: str = ""
    recalled: bool = True
    prompt_tokens: int = 0
    words: str = ""
    """of an error"""

    @property
    def answered(self) -> bool:
        """Whether there was an answer."""
        return self.outcome in (KEPT, UNKEPT)

    @property
    def took(self) -> float:
        """Seconds."""
        return self.ended - self.began

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self)


def client(address: str, key: str, timeout_s: float = GAVE_UP_S) -> openai.OpenAI:
    """The official client, which tries nothing twice."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=timeout_s)


def ask(api: openai.OpenAI, conversation: str, number: int, model: str, *, stream: bool, talker: int = -1) -> Turn:
    """One turn of a conversation, '' for one without a name."""
    text = f"Turn {number} of {conversation}."
    began = time.monotonic()
    about: dict[str, Any] = {}

    def ended(outcome: str, **more: Any) -> Turn:
        return Turn(talker, conversation, number, model, text, began, time.monotonic(), outcome, stream, **about, **more)

    try:
        raw = api.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=TOKENS,
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            extra_body={"lmgraph": {"conversation": conversation}} if conversation else None,
        )
        about = {"gateway": raw.headers.get("x-served-by", ""), "node": raw.headers.get("x-lmgraph-node", "")}
        pieces: list[Any] = list(raw.parse()) if stream else [raw.parse()]
        own: dict[str, Any] = {}
        for piece in pieces:
            own |= (piece.model_extra or {}).get("lmgraph", {})
        choices = [choice for piece in pieces for choice in piece.choices]
        answer = "".join((c.delta if stream else c.message).content or "" for c in choices)
        if not any(c.finish_reason for c in choices):
            return ended(UNTYPED, words="the answer has no end")
        usage = next((piece.usage.prompt_tokens for piece in pieces if piece.usage), 0)
        outcome = UNKEPT if own.get("kept") is False else KEPT
        return ended(outcome, answer=answer, recalled=own.get("recalled") is not False, prompt_tokens=usage)
    except openai.APIStatusError as error:
        about = {"gateway": error.response.headers.get("x-served-by", "")}
        typed = isinstance(error.code, str) and bool(error.code)
        return ended(error.code if typed else UNTYPED, words=f"{error.status_code}: {error.message}"[:300])
    except (openai.APIConnectionError, httpx.TransportError) as error:
        return ended(BROKEN, words=f"{type(error).__name__}: {error}"[:300])
    except openai.APIError as error:  # an event in the middle of a stream
        return ended(error.code if isinstance(error.code, str) and error.code else UNTYPED, words=error.message[:300])
    except Exception as error:  # noqa: BLE001 - whatever else happens to a client is what the run looks for
        return ended(UNTYPED, words=f"{type(error).__name__}: {error}"[:300])


class Talkers:
    """So many talkers on a host, until the block ends. `turns` grows as they end."""

    def __init__(self, host: Host, address: str, key: str, models: Sequence[str], count: int) -> None:
        self.turns: list[Turn] = []
        self.count = count
        self._host, self._address, self._key, self._models = host, address, key, models
        self._over = threading.Event()
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._talk, args=(i,), daemon=True) for i in range(count)]

    def __enter__(self) -> Talkers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def until(self, condition: Callable[[list[Turn]], bool], limit_s: float) -> bool:
        """Wait until what has been said so far satisfies a condition; whether it did within the limit."""
        with self._news:
            return self._news.wait_for(lambda: condition(list(self.turns)), limit_s)

    def _talk(self, talker: int) -> None:
        self._host.enter()
        conversation = -1
        with client(self._address, self._key) as api:
            number = TURNS
            while not self._over.wait(PAUSE_S):
                if number == TURNS:
                    number, conversation = 0, conversation + 1
                model = self._models[(talker + conversation) % len(self._models)]
                turn = ask(api, f"talk-{talker}-{conversation}", number, model, stream=(talker + number) % 2 == 0, talker=talker)
                number += 1
                with self._news:
                    self.turns.append(turn)
                    self._news.notify_all()


class Held:
    """A stream that has begun and is not read on. `gateway` is the one that it comes through."""

    def __init__(self, api: openai.OpenAI, model: str, max_tokens: int) -> None:
        raw = api.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": "A long answer."}],
            max_tokens=max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        self.gateway = raw.headers.get("x-served-by", "")
        self._stream = raw.parse()
        next(self._stream)

    def rest(self) -> str:
        """Read it to its end: 'stop' or 'length', or why it broke off (BROKEN, a code)."""
        try:
            finishes = [choice.finish_reason for piece in self._stream for choice in piece.choices]
            return next((reason for reason in finishes if reason), UNTYPED)
        except httpx.TransportError:
            return BROKEN
        except openai.APIError as error:
            return error.code if isinstance(error.code, str) and error.code else UNTYPED

    def close(self) -> None:
        """Leave it."""
        with suppress(httpx.TransportError):
            self._stream.close()
