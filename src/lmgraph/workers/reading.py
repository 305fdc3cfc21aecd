"""How one answer of an OpenAI-compatible server is read as its bytes come: bytes in, pieces out. Pure; the hot path of openai.py.

It knows server-sent events (WHATWG HTML section 9.2), chat completion chunks and completions that are not streamed. It knows no
connection. What is not an answer is refused as a WorkerError that names the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lmgraph import quickjson
from lmgraph.errors import WorkerError
from lmgraph.types import Delta

LINE_LIMIT, BODY_LIMIT = 1 << 20, 16 << 20
"""bytes of one line (and of one event), bytes of an answer that is not streamed; a server that sends more is refused"""
CONTENT = b'"content":"'
TOO_LONG = re.compile(r"context.(?:length|size|window)|inputs. (?:must have less than|tokens \+ .max_new_tokens)", re.IGNORECASE)
"""in the error of a server whose model has no room for a request (OpenAI, vLLM, llama.cpp; LoRAX and TGI)"""
STATUSES = {"validation": 422, "template_error": 422, "tool_error": 422, "overloaded": 429, "generation": 424, "incomplete_generation": 500}
"""error_type -> the HTTP status that it stands for: LoRAX and TGI have begun a stream when they find out what is wrong with a request"""
PLAIN_CHOICE, PLAIN_DELTA = frozenset({"index", "delta", "finish_reason"}), frozenset({"role", "content"})


class Refusal(WorkerError):
    """The server answered with an error; `status` is the HTTP status, or the code of an error in a stream; 0: it gave none."""

    status = 0


class Reading:
    """One answer: `feed` it bytes until it is `over`, or `end` it where the body ends; `last` is its last piece. Raises WorkerError.

    Pieces come as early as they can: an event does not wait for the blank line behind it. Texts that came together are one piece.
    """

    def __init__(self, url: str) -> None:
        self.over = False
        """nothing more is to come"""
        self._url = url
        self._whole: bool | None = None
        """not a stream but one JSON object; None: not known yet"""
        self._rest = bytearray()
        self._data: list[bytes] = []
        """data lines of an event that has more than one"""
        self._size = 0
        self._failing = False
        """the event is called `error`"""
        self._finish = ""
        self._usage: dict[str, int] = {}
        self._ends: tuple[bytes, bytes] | None = None
        """what stood before and behind the text of the last chunk that was nothing but text"""
        self._others: dict[int, bool] = {}
        """choices after the first one -> finished"""

    def feed(self, chunk: bytes) -> Iterator[Delta]:
        """The pieces that these bytes complete."""
        if self._whole is None:
            chunk = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
            if not chunk:
                return
            self._whole = chunk[:1] == b"{"
        if self._whole or b"\n" not in chunk:
            self._rest += chunk
            if len(self._rest) > (BODY_LIMIT if self._whole else LINE_LIMIT):
                raise WorkerError(f"{self._url} sent {'too long an answer' if self._whole else 'an endless line'}.")
            return
        if self._rest:
            chunk = bytes(self._rest) + chunk
        texts: list[str] = []
        at, ends = 0, None
        try:
            while not self.over:
                if ends is not self._ends:  # a pattern that has not been tried on these bytes
                    ends = self._ends
                    if ends is not None and not self._data and not self._failing:
                        text, at = self._many(chunk, at, *ends)
                        texts.append(text)
                end = chunk.find(b"\n", at)
                if end < 0:
                    break
                delta, at = self._take(chunk[at:end]), end + 1
                if delta is None:
                    continue
                if not delta.choices:
                    texts.append(delta.text)
                    continue
                if text := "".join(texts):
                    yield Delta(text)
                texts.clear()
                yield delta
        except WorkerError:
            if text := "".join(texts):
                yield Delta(text)
            raise
        self._rest = bytearray(chunk[at:])
        if text := "".join(texts):
            yield Delta(text)

    def end(self) -> Iterator[Delta]:
        """The pieces that the end of the body completes."""
        self.over = True
        rest = bytes(self._rest)
        if self._whole:
            self._data = [rest]
        for delta in (None if self._whole else self._take(rest), self._flush()):
            if delta is not None:
                yield delta

    def last(self) -> Delta:
        """The last piece: finish and usage. Raises WorkerError when the answer was not finished."""
        if not self._finish or not all(self._others.values()):
            raise WorkerError(f"{self._url} ended its stream before the answer was finished.")
        return Delta(done=True, finish=self._finish, usage=self._usage)

    def _take(self, line: bytes) -> Delta | None:
        if line[:5] == b"data:":
            data = line[5:].strip()
            if data == b"[DONE]":
                self.over = True
                return self._flush()
            if not self._data:
                if not data:
                    return None
                text = self._same(data)
                if text is not None:
                    return Delta(text)
                try:
                    event = quickjson.loads(data)
                except ValueError:
                    pass  # garbage, or the first line of several: the blank line will show
                else:
                    delta = self._fold(event)
                    self._ends = _ends(data, delta)
                    return delta
            self._data.append(data)
            self._size += len(data) + 1
            if self._size > LINE_LIMIT:
                raise WorkerError(f"{self._url} sent an endless event.")
            return None
        line = line.strip()
        if not line:
            delta = self._flush()
            self._failing = False
            return delta
        if line[:1] == b":":
            return None
        name, _, value = line.partition(b":")
        if name == b"event":
            self._failing = value.strip() == b"error"
        elif not name.isalpha():
            raise WorkerError(f"{self._url} sent something that is not an event: {line[:100].decode(errors='replace')!r}")
        return None

    def _many(self, chunk: bytes, at: int, before: bytes, behind: bytes) -> tuple[str, int]:
        """The texts of all events from `at` on, where they differ from the last one in nothing but their text, and where they end."""
        first, last = b"data: " + before, behind + b"\n\n"
        start = at + chunk.startswith(b"\n", at)  # the end of the event before
        end = chunk.rfind(last, start)
        if end < 0 or not chunk.startswith(first, start):
            return "", at
        whole = chunk[start + len(first) : end].replace(last + first, b"")
        if b'"' in whole or b"\\" in whole or b"\n" in whole:
            return "", at
        try:
            return whole.decode(), end + len(last)
        except UnicodeDecodeError:
            return "", at

    def _same(self, data: bytes) -> str | None:
        """The text of a chunk that differs from the one before in nothing but its text, without parsing it; None for any other."""
        if self._ends is None or self._failing:
            return None
        before, behind = self._ends
        if not (data.startswith(before) and data.endswith(behind) and len(data) > len(before) + len(behind)):
            return None
        text = data[len(before) : -len(behind)]
        if b'"' in text or b"\\" in text:
            return None
        try:
            return text.decode()
        except UnicodeDecodeError:
            return None

    def _flush(self) -> Delta | None:
        """The event of the data lines so far."""
        if not self._data:
            return None
        data = b"\n".join(self._data)
        self._data, self._size = [], 0
        try:
            event = quickjson.loads(data)
        except ValueError as error:
            text = data[:300].decode(errors="replace")
            if self._failing:
                raise refusal(f"{self._url} answered with an error: ", text) from None
            raise WorkerError(f"{self._url} sent something that is not JSON: {text[:100]!r}") from error
        return self._fold(_chunk(event) if self._whole else event)

    def _fold(self, event: Any) -> Delta | None:
        """The piece of one chunk, None when it has none (a role, usage, a finish); an odd shape is passed over."""
        if not isinstance(event, dict):
            return None
        error = event.get("error")
        if error or self._failing:
            raise refusal(f"{self._url} answered with an error: ", error or event, STATUSES.get(str(event.get("error_type")), 0))
        usage = event.get("usage")
        if usage and isinstance(usage, dict):
            self._usage.update((name, value) for name, value in usage.items() if isinstance(value, int))
        choices = event.get("choices")
        if not isinstance(choices, list):
            return None
        choices = [choice for choice in choices if isinstance(choice, dict)]
        text, more = "", len(choices) > 1
        for choice in choices:
            delta, index, reason = choice.get("delta"), choice.get("index"), choice.get("finish_reason")
            content = delta.get("content") if isinstance(delta, dict) else None
            if index and isinstance(index, int):
                more = True
                self._others[index] = bool(reason) or self._others.get(index, False)
            else:
                self._finish = str(reason or self._finish)
                if content and isinstance(content, str):
                    text += content
            more = more or _more(choice, PLAIN_CHOICE) or (isinstance(delta, dict) and _more(delta, PLAIN_DELTA))
            more = more or (isinstance(content, list) and bool(content))
        return Delta(text, choices=tuple(choices) if more else ()) if text or more else None


def detail(body: bytes) -> Any:
    """What the body of an error says: its `error`, itself where it has a `message` (vLLM up to 0.9), else its first 2,000 bytes as text."""
    try:
        found = quickjson.loads(body)
    except ValueError:
        found = None
    if isinstance(found, dict) and ("error" in found or "message" in found):
        return found.get("error", found)
    return body[:2000].decode(errors="replace")


def refusal(opening: str, error: Any, status: int = 0) -> Refusal:
    """What a server's `error` (an object, or anything) says, behind `opening`; without a status its own code is taken."""
    detail = error if isinstance(error, dict) else {}
    words = str(detail.get("message", error))
    code = detail.get("code")
    found = Refusal(opening + words[:300], too_long=bool(TOO_LONG.search(f"{code} {detail.get('type')} {words[:2000]}")))
    found.status = status or (code if isinstance(code, int) and 400 <= code < 600 else 0)
    return found


def _more(found: Mapping[str, Any], plain: frozenset[str]) -> bool:
    """Whether anything besides `plain` is said (null, [] and 0 say nothing)."""
    return not found.keys() <= plain and any(found[name] for name in found.keys() - plain)


def _ends(data: bytes, delta: Delta | None) -> tuple[bytes, bytes] | None:
    """What stands before and behind the text of a chunk, where that is all it holds and can be told apart."""
    if delta is None or delta.choices or data.count(CONTENT) != 1:
        return None
    start = data.index(CONTENT) + len(CONTENT)
    end = data.find(b'"', start)
    return (data[:start], data[end:]) if data[start:end] == delta.text.encode() else None


def _chunk(completion: Any) -> Any:
    """A completion that was not streamed, in the shape of a chunk. It is whole, so what does not say how it finished has stopped."""
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list):
        return completion
    chunks = []
    for choice in choices:
        if isinstance(choice, dict):
            message = choice.get("message")
            delta = dict(message) if isinstance(message, dict) else {}
            if isinstance(calls := delta.get("tool_calls"), list):  # in a chunk each call has its number
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, dict)]
            rest = {name: value for name, value in choice.items() if name != "message"}
            chunks.append({**rest, "delta": delta, "finish_reason": choice.get("finish_reason") or "stop"})
    return {**completion, "choices": chunks}
