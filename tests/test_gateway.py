"""What the gateway remembers and whom it lets in: real processes on loopback, the official client, keys made by the command."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import say, serving, toy_graph
from lmgraph.errors import RequestError
from lmgraph.serve import guard
from lmgraph.store import open_store
from lmgraph.store.base import ApiKey


def make_key(store: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "lmgraph", "keys", "create", *arguments, "--store", store, "--json"]
    made: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    return made


def bearer(key: dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {key['secret']}"}


class House:
    """A gateway with a store and keys."""

    def __init__(self, address: str, folder: Path, store: str, keys: dict[str, dict[str, Any]]) -> None:
        self.address, self.folder, self.store, self.keys = address, folder, store, keys
        self.http = httpx.Client(base_url=address, timeout=60)
        self.admin = httpx.Client(base_url=address, timeout=60, headers=bearer(keys["boss"]))

    def chat(self, text: str | list[Any], headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        messages = say(text) if isinstance(text, str) else text
        return self.http.post("/v1/chat/completions", json={"model": "lmgraph/math", "messages": messages} | fields, headers=headers)


@pytest.fixture(scope="module")
def house(toy_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    os.environ["LMGRAPH_THREADS"] = "2"
    folder = tmp_path_factory.mktemp("house")
    store = f"sqlite:///{folder}/store.db"
    keys = {"boss": make_key(store, "boss", "--admin"), "few": make_key(store, "few", "--rate", "12"), "guest": make_key(store, "guest")}
    with serving(toy_graph(toy_master, extra="# a comment\n"), folder, store=store) as address:
        made = House(address, folder, store, keys)
        yield made
        made.http.close()
        made.admin.close()


# ---------------------------------------------------------------- conversations


def test_a_conversation_goes_on_with_only_the_new_turn(house: House) -> None:
    first = house.chat("one", lmgraph={"conversation": "talk-1"})
    assert first.headers["x-lmgraph-conversation"] == "talk-1"
    house.chat("two", lmgraph={"conversation": "talk-1"})
    told = house.http.get("/v1/history/talk-1").json()
    assert [(t["request"]["messages"][-1]["content"], t["answer"]) for t in told["data"]] == [("one", "answer to one"), ("two", "answer to two")]
    third = house.chat("three", lmgraph={"conversation": "talk-1", "trace": True}, model="lmgraph")
    decision = third.json()["lmgraph"]["trace"]["decision"]
    assert decision["rewritten"] == decision["query"] == "three" and "earlier turns" in decision["rewrite_note"]


def test_a_conversation_that_is_sent_whole_is_known_again(house: House) -> None:
    messages = say("how it began")
    for text in ("and then", "and then"):
        answer = house.chat(messages).json()["choices"][0]["message"]
        messages = [*messages, {"role": "assistant", "content": answer["content"]}, *say(text)]
    mine = [c for c in house.http.get("/v1/history").json()["data"] if c["title"] == "how it began"]
    assert [c["turns"] for c in mine] == [2]


def test_a_node_keeps_its_conversation_unless_another_is_clearly_better(toy_master: Path, tmp_path: Path) -> None:
    graph = toy_graph(toy_master)
    for margin, stays in (("1", True), ("0", False)):
        with serving(graph.replace("master: {", f"master: {{margin: {margin}, "), tmp_path) as address, httpx.Client(base_url=address) as http:
            body = {"model": "lmgraph/law", "messages": say("court court"), "lmgraph": {"conversation": "c"}}
            assert http.post("/v1/chat/completions", json=body).headers["x-lmgraph-node"] == "law"
            body = {"model": "lmgraph", "messages": say("doctor fever bone doctor fever"), "lmgraph": {"conversation": "c", "trace": True}}
            answer = http.post("/v1/chat/completions", json=body)
            decision = answer.json()["lmgraph"]["trace"]["decision"]
            best = max(decision["alternatives"], key=lambda a: a["probability"])["node"]
            assert answer.headers["x-lmgraph-node"] == ("law" if stays else best) and decision["stayed"] == (stays and best != "law")


def test_an_open_tool_call_stays_with_its_node(house: House) -> None:
    first = house.chat("call", model="lmgraph/health", lmgraph={"conversation": "tools"})
    call = {"role": "assistant", "content": first.json()["choices"][0]["message"]["content"],
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    messages = [*say("call"), call, {"role": "tool", "tool_call_id": "1", "content": "sum sum sum"}]
    assert house.chat(messages, model="lmgraph", lmgraph={"conversation": "tools"}).headers["x-lmgraph-node"] == "health"


def test_history_can_be_paged_read_by_node_and_forgotten(house: House) -> None:
    for i in range(3):
        house.chat(f"page {i}", lmgraph={"conversation": f"page-{i}"}, model="lmgraph/law")
    listed = house.http.get("/v1/history", params={"limit": 2}).json()["data"]
    assert [c["id"] for c in listed] == ["page-2", "page-1"]
    older = house.http.get("/v1/history", params={"limit": 1, "before": listed[-1]["updated"]}).json()["data"]
    assert [c["id"] for c in older] == ["page-0"]
    recent = house.http.get("/v1/history", params={"node": "law", "limit": 2}).json()["data"]
    assert [t["answer"] for t in recent] == ["answer to page 2", "answer to page 1"]
    assert house.http.delete("/v1/history/page-1").json() == {"id": "page-1", "deleted": True}
    for method in ("GET", "DELETE"):
        gone = house.http.request(method, "/v1/history/page-1")
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"
    for params in ({"limit": "0"}, {"limit": "x"}, {"before": "yesterday"}):
        assert house.http.get("/v1/history", params=params).status_code == 400


def test_no_store_leaves_no_trace(house: House) -> None:
    answer = house.chat("a secret", {"cache-control": "no-store"}, temperature=0, lmgraph={"conversation": "secret"})
    assert answer.status_code == 200 and "x-lmgraph-cache" not in answer.headers
    assert house.http.get("/v1/history/secret").status_code == 404
    assert house.chat("a secret", temperature=0).headers["x-lmgraph-cache"] == "miss"


@pytest.mark.parametrize("name", ["a/b", "x" * 129, "a b", "ü", "\n"])
def test_a_conversation_has_a_plain_name(house: House, name: str) -> None:
    answer = house.chat("x", lmgraph={"conversation": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lmgraph.conversation"


# ---------------------------------------------------------------- cache


def test_the_same_question_at_temperature_0_is_answered_from_the_cache(house: House) -> None:
    one, two = house.chat("cached?", temperature=0), house.chat("cached?", temperature=0)
    assert (one.headers["x-lmgraph-cache"], two.headers["x-lmgraph-cache"]) == ("miss", "hit")
    assert two.json()["choices"] == one.json()["choices"] and two.json()["usage"] == one.json()["usage"] and two.headers["x-lmgraph-node"] == "math"
    with openai.OpenAI(base_url=f"{house.address}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="lmgraph/math", messages=say("cached?"), temperature=0, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "answer to cached?"
    assert "x-lmgraph-cache" not in house.chat("cached?").headers, "only where the answer cannot differ"
    for other in ({"max_tokens": 1}, {"model": "lmgraph/law"}, {"user": "somebody"}, {"lmgraph": {"conversation": "new-one"}, "model": "lmgraph/health"}):
        assert house.chat("cached?", temperature=0, **other).headers["x-lmgraph-cache"] == "miss", other
    assert house.chat("cached?", bearer(house.keys["guest"]), temperature=0).headers["x-lmgraph-cache"] == "miss", "another owner"
    assert house.http.delete("/v1/cache").status_code == 401
    assert house.admin.delete("/v1/cache").json()["purged"] >= 1
    assert house.chat("cached?", temperature=0).headers["x-lmgraph-cache"] == "miss"


def test_equal_questions_in_the_air_are_answered_once(house: House) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: house.chat("all at once", temperature=0), range(16)))
    assert {a.json()["choices"][0]["message"]["content"] for a in answers} == {"answer to all at once"}
    assert sorted(a.headers["x-lmgraph-cache"] for a in answers) == ["hit"] * 15 + ["miss"]


def test_another_model_does_not_give_the_answers_of_this_one(toy_master: Path, toy_base: Path, tmp_path: Path) -> None:
    store, body = f"sqlite:///{tmp_path}/store.db", {"model": "lmgraph/math", "messages": say("x"), "temperature": 0}
    found = []
    for model in (toy_base, toy_base, toy_master):  # another model behind the same name of a node
        graph = toy_graph(toy_master, f"{{kind: embedded, model: {model}, max_tokens: 2}}")
        with serving(graph, tmp_path, store=store) as address:
            found.append(httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).headers["x-lmgraph-cache"])
    assert found == ["miss", "hit", "miss"]


# ---------------------------------------------------------------- keys


def test_who_shows_no_key_or_a_wrong_one_is_not_let_in(toy_master: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/keys.db"
    guest, other = make_key(store, "guest"), make_key(store, "other")
    with serving(toy_graph(toy_master), tmp_path, "--require-keys", store=store) as address, httpx.Client(base_url=address) as http:
        for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Bearer lmg-nonsense"}, {"authorization": "Basic lmg-x"}):
            for path in ("/v1/models", "/v1/history", "/v1/graph", "/metrics", "/nothing"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        with openai.OpenAI(base_url=f"{address}/v1", api_key=guest["secret"], max_retries=0) as client:
            client.chat.completions.create(model="lmgraph/math", messages=say("mine"), extra_body={"lmgraph": {"conversation": "same"}})
        with openai.OpenAI(base_url=f"{address}/v1", api_key=other["secret"], max_retries=0) as client:
            client.chat.completions.create(model="lmgraph/math", messages=say("theirs"), extra_body={"lmgraph": {"conversation": "same"}})
        assert [c["id"] for c in http.get("/v1/history", headers=bearer(guest)).json()["data"]] == ["same"]
        assert [t["answer"] for t in http.get("/v1/history/same", headers=bearer(guest)).json()["data"]] == ["answer to mine"]
        theirs = f"/v1/history/{other['id']}/same"
        assert http.get(theirs, headers=bearer(guest)).status_code == http.delete(theirs, headers=bearer(guest)).status_code == 404
        assert http.get("/v1/history", params={"node": "math"}, headers=bearer(guest)).status_code == 403
        subprocess.run([sys.executable, "-m", "lmgraph", "keys", "revoke", guest["id"], "--store", store], check=True, timeout=120)
        while http.get("/v1/models", headers=bearer(guest)).status_code == 200:  # it is remembered for five seconds
            pass
        assert http.get("/v1/models", headers=bearer(other)).status_code == 200
    assert guest["secret"].encode() not in (tmp_path / "keys.db").read_bytes(), "only digests are kept"


def test_a_rate_is_a_429_that_says_when(house: House) -> None:
    few = bearer(house.keys["few"])  # 12 a minute: 2 at once
    answers = [house.chat("x", few) for _ in range(4)]
    assert [a.status_code for a in answers][:2] == [200, 200]
    refused = next(a for a in answers if a.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 5 and refused.json()["error"]["code"] == "rate_limit"


def test_a_long_answer_holds_its_place_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HOLD_S", 0.1)
    key, _ = ApiKey.make("ann", concurrent=1)

    async def work() -> None:
        store = open_store("sqlite://")
        one, other = guard.Guard(store, required=True, local=False), guard.Guard(store, required=True, local=False)
        async with one.place(key):
            until, tries = time.monotonic() + 0.5, 0
            while time.monotonic() < until:  # far longer than a place is held at once
                with pytest.raises(RequestError, match="at the same time"):
                    async with other.place(key):
                        pass
                tries += 1
                await asyncio.sleep(0.005)
            assert tries > 10
        async with other.place(key):
            pass
        await store.close()

    asyncio.run(work())


def test_pages_of_other_sites_and_names_that_point_here_are_refused(house: House) -> None:
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}, {"origin": "null"}):
        answer = house.chat("x", headers)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"
    assert house.chat("x", {"origin": house.address}).status_code == 200
    port = house.address.rsplit(":", 1)[1]
    assert house.chat("x", {"host": f"localhost:{port}"}).status_code == house.chat("x", {"host": f"[::1]:{port}"}).status_code == 200


def test_keys_are_listed_without_what_would_let_anybody_in(house: House) -> None:
    command = [sys.executable, "-m", "lmgraph", "keys", "list", "--store", house.store]
    shown = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=120).stdout
    assert [k["name"] for k in json.loads(shown)] == ["boss", "few", "guest"] and [k["admin"] for k in json.loads(shown)] == [True, False, False]
    assert "digest" not in shown and "secret" not in shown
    assert "boss" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    wrong = subprocess.run([*command[:-3], "revoke", "nobody", "--store", house.store], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "keys list" in wrong.stderr


# ---------------------------------------------------------------- the graph


def test_the_graph_is_edited_whole_or_in_part_and_the_file_keeps_its_comments(house: House) -> None:
    seen = house.http.get("/v1/graph")
    version, graph = seen.json()["version"], seen.json()["graph"]
    assert seen.headers["etag"] == f'"{version}"' and seen.json()["editable"] is False and list(graph["nodes"]) == ["math", "law", "health"]
    node = {"token": 3, "description": "new", "worker": {"kind": "scripted", "answers": {"*": "fresh"}}}
    made = house.admin.patch("/v1/graph", json={"nodes": {"law": None}, "edges": {"math": ["health", "end"]}}, headers={"if-match": f'"{version}"'})
    assert made.status_code == 200 and list(made.json()["graph"]["nodes"]) == ["math", "health"] and made.json()["version"] != version
    text = (house.folder / "graph.yaml").read_text()
    assert "# a comment" in text and "law" not in text
    assert house.chat("x", model="lmgraph/law").status_code == 404
    late = house.admin.patch("/v1/graph", json={"edges": {"math": None}}, headers={"if-match": f'"{version}"'})
    assert late.status_code == 412 and late.json()["error"]["code"] == "version_conflict"
    stranger = house.admin.patch("/v1/graph", json={"nodes": {"new": node}})
    assert stranger.status_code == 409 and stranger.json()["error"]["code"] == "vocabulary_mismatch" and "train heads" in stranger.json()["error"]["message"]
    bare = house.admin.patch("/v1/graph", json={"nodes": {"math": {"adapter": "none.gguf"}}})
    assert bare.status_code == 409 and bare.json()["error"]["code"] == "adapter_error" and house.http.get("/readyz").status_code == 200
    assert house.admin.post("/v1/graph/undo").json()["version"] == version
    assert house.chat("x", model="lmgraph/law").status_code == 200
    graph["nodes"]["math"]["worker"]["answers"] = {"*": "other words"}
    assert house.admin.put("/v1/graph", json={"graph": graph}).status_code == 200
    assert house.chat("x").json()["choices"][0]["message"]["content"] == "other words"
    house.admin.post("/v1/graph/undo")
    assert house.admin.post("/v1/graph/undo").status_code == 409 and house.http.get("/v1/graph").json()["version"] == version


@pytest.mark.parametrize(("patch", "problem"), [
    ({"nodes": {"law": {"token": "x"}}}, "found text"), ({"nodes": 3}, "expected a mapping"), ({"edges": {"math": ["nobody"]}}, "'nobody' is no node"),
    ({"nodes": {"a b": {"token": 1}}}, "a node's name"), ({"version": 2}, "version"), ({"nodes": {"law": {"token": 0}}}, "share functional token"),
    ({"nodes": None}, ""), ({"nodes": []}, ""), ({"edges": {"start": None}}, "no edge leaves start"),
])
def test_a_wrong_edit_names_every_problem_and_changes_nothing(house: House, patch: dict[str, Any], problem: str) -> None:
    before, text = house.http.get("/v1/graph").json()["version"], (house.folder / "graph.yaml").read_text()
    answer = house.admin.patch("/v1/graph", json=patch)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "invalid_graph" and problem in error["message"]
    assert house.http.get("/v1/graph").json()["version"] == before and (house.folder / "graph.yaml").read_text() == text


def test_only_administrators_edit(house: House) -> None:
    assert house.http.patch("/v1/graph", json={}).status_code == 401
    assert house.http.patch("/v1/graph", json={}, headers=bearer(house.keys["guest"])).status_code == 403
    assert house.admin.get("/v1/graph").json()["editable"] is True


def test_a_graph_that_is_replaced_again_and_again_drops_no_answer(house: House) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(house.chat, f"question {i}", model="lmgraph/health") for i in range(200)]
        for i in range(50):
            answers = {"*": "answer to {}"} if i % 2 else {"*": "answer to {}", "never": "x"}
            assert house.admin.patch("/v1/graph", json={"nodes": {"health": {"worker": {"answers": answers}}}}).status_code == 200
        found = [future.result() for future in asked]
    assert [a.json()["choices"][0]["message"]["content"] for a in found] == [f"answer to question {i}" for i in range(200)]
    live = house.http.get("/v1/live").json()["nodes"]["health"]
    assert live["active"] == 0 and live["answers"] >= 200
