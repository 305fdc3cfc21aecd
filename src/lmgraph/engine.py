"""llama.cpp, here or on a server: load a GGUF, turn text into ids, choose one id among allowed ids, stream text, give hidden states.

The one home of xllamacpp. It knows ids and text, not nodes, prompts or decisions. Its threads are bridged to asyncio here and
nowhere else. User text becomes ids with the parsing of special tokens switched off: a prompt is always sent as ids.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmgraph.errors import EngineError, MissingExtra
from lmgraph.loopback import Elsewhere, Loopback

BIAS = 500.0
"""added to the logits of allowed ids; larger than any difference between logits, small enough for float32"""


@dataclass(frozen=True)
class Choice:
    """Probabilities (softmax over the allowed ids at the given temperature), best first, and what it cost."""

    probabilities: tuple[tuple[int, float], ...]
    prefill_ms: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Piece:
    """Some text of a stream; `ids` only where they were asked for; `finish` ('stop', 'length') on the last piece."""

    text: str = ""
    ids: tuple[int, ...] = ()
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine:
    """One loaded GGUF with `slots` sequences that are decoded together (continuous batching)."""

    def __init__(
        self, server: Any, api: Loopback, path: Path, slots: int, context: int, adapters: Mapping[Path, int], shared: bool = False
    ) -> None:
        self._server = server
        self._adapters = adapters
        """file -> its number at the server"""
        self._api = api
        self._pool = ThreadPoolExecutor(max_workers=slots + 2, thread_name_prefix="lmgraph-engine")
        self._slots: asyncio.Queue[int | None] = asyncio.Queue()
        for slot in range(slots):
            self._slots.put_nowait(None if shared else slot)  # of a server that others ask too: it takes the slot with the longest prefix
        self.path = path
        self.slots = slots
        self.context = context
        """tokens that one sequence may have, prompt and answer together"""
        self.served = path.name
        """name of the file that is loaded"""

    @classmethod
    async def open(
        cls, path: Path, *, context: int = 2048, slots: int = 1, threads: int = 1, states: bool = False, adapters: Sequence[Path] = ()
    ) -> Engine:
        """Load a model. `states=True` makes an engine for `state` only; `adapters` are LoRAs that a session may put on (GGUF).

        Raises EngineError when llama.cpp refuses a file.
        """
        try:
            import xllamacpp
        except ImportError as error:
            raise MissingExtra("Running a model in this process", "local") from error
        if not path.is_file():
            raise EngineError(f"{path} does not exist.", "Fetch the weights: lmgraph pull")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise EngineError(f"{path} is not a GGUF file.", "Expected weights in llama.cpp's GGUF format.")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context * slots
        params.n_parallel = slots
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        params.warmup = False
        params.fit_params = False
        params.cache_ram_mib = 0  # llama.cpp would keep the state of every past prompt, gigabytes of it
        key = secrets.token_hex(16)
        params.api_keys = [key]
        params.lora_adapters = [_adapter(file) for file in adapters]
        if states:
            params.embedding = True
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
            params.embd_normalize = -1
            params.n_ubatch = params.n_batch = context
        try:
            server = await asyncio.to_thread(_start, params, states)
        except Exception as error:
            worn = f" with {', '.join(file.name for file in adapters)}" if adapters else ""
            raise EngineError(
                f"llama.cpp cannot load {path.name}{worn}: {error}", "Is every file whole? Check the weights: lmgraph pull --verify"
            ) from error
        numbered = {file: number for number, file in enumerate(adapters)}
        return cls(server, Loopback(server.listening_address, key), path, slots, context, numbered)

    @classmethod
    async def connect(cls, url: str, key: str, path: Path, adapters: Sequence[Path] = ()) -> Engine:
        """The same of a llama.cpp server elsewhere, with as many sequences and as much context as it has.

        `path` names what it should have; `adapters` are found at it by their file names. Raises EngineError when it does not answer, or
        lacks one.
        """
        server = Elsewhere(url, key)
        try:
            about, listed = await asyncio.to_thread(server.look)
            there = {Path(row["path"]).name: int(row["id"]) for row in listed}
            if missing := [file.name for file in adapters if file.name not in there]:
                raise EngineError(
                    f"The server at {server.api.address} lacks the adapter{'s' * (len(missing) > 1)} {', '.join(missing)}; it has: "
                    f"{', '.join(there) or 'none'}.",
                    "Start llama-server with --lora FILE,FILE and --lora-init-without-apply.",
                )
        except BaseException:
            server.api.close()
            raise
        wanted = {file.name: file for file in adapters}
        numbered = {wanted.get(name, Path(name)): number for name, number in there.items()}  # all: the others are taken off
        context = int(about["default_generation_settings"]["n_ctx"])
        engine = cls(server, server.api, path, max(1, int(about["total_slots"])), context, numbered, shared=True)
        engine.served = Path(str(about.get("model_path", ""))).name
        return engine

    async def close(self) -> None:
        """Unload the model."""
        self._api.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(_drop, server)

    async def tokenise(self, text: str, special: bool = False, begin: bool = False) -> list[int]:
        """Ids of a text. With special=False a special token's spelling is plain text.

        `begin`: a text that stands for itself, with no chat template around it: what this model puts first (BOS) comes first.
        """
        if not text:
            return []
        answer = await self._run(self._api.post, "/tokenize", {"content": text, "add_special": begin, "parse_special": special})
        return [int(i) for i in answer["tokens"]]

    async def detokenise(self, ids: Sequence[int]) -> str:
        """Text of ids (control tokens print nothing)."""
        return str((await self._run(self._api.post, "/detokenize", {"tokens": list(ids)}))["content"]) if ids else ""

    async def render(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation (role, content) in the model's own chat template, ready for the assistant's turn.

        Contents are put in as ids after templating: nothing in them can act as a special token.
        """
        marks = [f"@{secrets.token_hex(12)}@" for _ in messages]
        body = {"messages": [{"role": role, "content": mark} for (role, _), mark in zip(messages, marks, strict=True)]}
        text = str((await self._run(self._api.post, "/apply-template", body))["prompt"])
        ids: list[int] = []
        for (_, content), mark in zip(messages, marks, strict=True):
            if text.count(mark) != 1:
                raise EngineError(
                    f"The chat template of {self.path.name} does not take a conversation of this form "
                    f"({', '.join(role for role, _ in messages)})."
                )
            before, text = text.split(mark)
            ids += await self.tokenise(before, True) + await self.tokenise(content)
        return ids + await self.tokenise(text, True)

    async def session(self) -> Session:
        """Wait for a free sequence and hold it: what one session sends shares its cached prefix. Use `async with`."""
        return Session(self, await self._slots.get())

    def _worn(self, adapter: Path | None) -> dict[str, Any]:
        """The part of a request that says which adapter is put on: none of them, or one alone."""
        if not self._adapters:
            return {}
        return {"lora": [{"id": number, "scale": float(file == adapter)} for file, number in self._adapters.items()]}

    async def state(self, ids: Sequence[int]) -> list[float]:
        """The final hidden state (D floats, after the last norm) at the last id. Only for engines opened with states=True."""
        answer = await self._run(self._server.handle_embeddings, {"input": list(ids), "embd_normalize": -1})
        _raise_error(answer, self.path)
        return [float(x) for x in answer["data"][0]["embedding"]]

    async def _run(self, call: Any, *args: Any) -> Any:
        if self._server is None:
            raise EngineError(f"{self.path.name} is unloaded.")
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)


class Session:
    """One sequence of an engine, held by one caller. `adapter`: which one of the engine's is on; with another one nothing is cached."""

    def __init__(self, engine: Engine, slot: int | None) -> None:
        self._engine = engine
        self._slot = slot
        self.adapter: Path | None = None

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._engine._slots.put_nowait(self._slot)

    async def choose(self, ids: Sequence[int], allowed: Sequence[int], temperature: float = 1.0, top: int = 20) -> Choice:
        """One forward pass over `ids`; the softmax over `allowed` for the next id (never sampled: take the first)."""
        engine = self._engine
        body = {
            "prompt": list(ids),
            "n_predict": 1,
            "samplers": ["temperature"],
            "temperature": temperature,
            "seed": 1,
            "logit_bias": [[i, BIAS] for i in allowed],
            "n_probs": min(top, len(allowed)),
            "post_sampling_probs": True,
            "cache_prompt": True,
            **({} if self._slot is None else {"id_slot": self._slot}),
            **engine._worn(self.adapter),
        }
        began = time.perf_counter()
        answer = await engine._run(engine._server.handle_completions, body)
        took = (time.perf_counter() - began) * 1000
        _raise_error(answer, engine.path)
        try:
            rows = answer["choices"][0]["logprobs"]["content"][0]["top_probs"]
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"llama.cpp gave no probabilities for {engine.path.name}: {str(answer)[:200]}") from error
        legal = set(allowed)
        found = tuple((int(r["id"]), float(r["prob"])) for r in rows if int(r["id"]) in legal)
        timings = answer.get("timings", {})
        return Choice(found, took, int(timings.get("prompt_n", 0)), int(timings.get("cache_n", 0)))

    async def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        want_ids: bool = False,
        forbidden: Sequence[int] = (),
        grammar: str = "",
    ) -> AsyncGenerator[Piece, None]:
        """Stream an answer to `ids`, greedy at temperature 0. Leaving the stream stops the engine.

        `grammar`: the answer is a text of this grammar (llama.cpp's GBNF), or the beginning of one where it is cut off at `max_tokens`.
        """
        engine = self._engine
        body: dict[str, Any] = {
            "prompt": list(ids),
            "n_predict": max_tokens,
            "temperature": temperature,
            "stream": True,
            "cache_prompt": True,
            **({} if self._slot is None else {"id_slot": self._slot}),
            **engine._worn(self.adapter),
        }
        if want_ids:
            body["n_probs"] = 1
        if forbidden:
            body["logit_bias"] = [[i, False] for i in forbidden]
        if grammar:
            body["grammar"] = grammar
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        left = threading.Event()

        def take(chunk: Any) -> bool:
            if not left.is_set():
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(queue.put_nowait, chunk)
            return left.is_set()

        def work() -> None:
            try:
                result = engine._server.handle_completions(body, take)
                end: Any = result if isinstance(result, dict) and "error" in result else None
            except Exception as error:  # noqa: BLE001 - handed over to the reader
                end = EngineError(f"llama.cpp failed on {engine.path.name}: {error}")
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, end)

        future = loop.run_in_executor(engine._pool, work)
        try:
            while (chunk := await queue.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                _raise_error(chunk, engine.path)
                yield _piece(chunk)
        finally:
            left.set()
            await asyncio.shield(future)


def _piece(chunk: dict[str, Any]) -> Piece:
    choice = chunk["choices"][0] if chunk.get("choices") else {}
    logprobs = choice.get("logprobs") or {}
    usage = chunk.get("usage") or {}
    return Piece(
        choice.get("text") or "",
        tuple(int(c["id"]) for c in logprobs.get("content") or ()),
        choice.get("finish_reason") or "",
        int(usage.get("prompt_tokens", 0)),
        int(usage.get("completion_tokens", 0)),
    )


def too_long(tokens: int, path: Path, room: int) -> EngineError:
    """The error of a text that has no room in a loaded model."""
    return EngineError(
        f"The text has {tokens} tokens; {path.name} is loaded with room for {room}, its answer included.",
        "Shorten the text, or give this node a model with a longer context.",
        too_long=True,
    )


def _raise_error(answer: Any, path: Path) -> None:
    if isinstance(answer, dict) and "error" in answer:
        error = answer["error"]
        if isinstance(error, dict) and error.get("type") == "exceed_context_size_error":
            raise too_long(error.get("n_prompt_tokens", 0), path, error.get("n_ctx", 0))
        message = error.get("message", error) if isinstance(error, dict) else error
        raise EngineError(f"llama.cpp refused a request to {path.name}: {message}")


def _start(params: Any, states: bool) -> Any:
    """A running server: one that has answered. Destroying one whose loop has not begun hangs for ever, holding the GIL."""
    import xllamacpp

    server = xllamacpp.Server(params)
    if states:
        server.handle_embeddings({"input": [0]})
    else:
        server.handle_completions({"prompt": [0], "n_predict": 1, "cache_prompt": False})
    return server


def _adapter(path: Path) -> Any:
    import xllamacpp

    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = str(path), 0.0
    return info


def _drop(server: Any) -> None:
    del server
