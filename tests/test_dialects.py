"""How servers with adapters are spoken to: what their listings mean, what requests look like, whatever the names are. Pure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmgraph.graph import DIALECTS
from lmgraph.workers import dialects
from lmgraph.workers.dialects import Stock, Wanted

PARTS = st.text(st.characters(exclude_characters="/\\", exclude_categories=("Cs",)), min_size=1, max_size=8).filter(lambda part: not part.endswith(".gguf"))
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "id", "model_id", "path", "model_path", "aliases", "parent", "x"]), inner, max_size=4),
                      max_leaves=12)
OPTIONS = st.dictionaries(st.sampled_from(["top_p", "stop", "seed", "max_tokens", "model", "lora", "adapter_id", "adapter_source", "max_completion_tokens"]),
                          st.integers() | st.text(max_size=5))


def llama(*paths: str) -> Stock:
    return Stock(("base",), paths, tuple(range(7, 7 + len(paths))))


@given(st.lists(PATHS, unique=True, max_size=5), st.data())
def test_one_adapter_of_llama_cpp_is_on_and_every_other_is_off(paths: list[str], data: st.DataObject) -> None:
    has = llama(*paths)
    adapter = data.draw(st.sampled_from(["", *paths]))
    body = dialects.shape(Wanted("llamacpp", "base", adapter), has, {"messages": []})
    assert body["lora"] == [{"id": number, "scale": 1.0 if path == adapter else 0.0} for path, number in zip(paths, has.numbers)]


@given(PATHS, PATHS, st.booleans(), st.booleans())
def test_a_file_goes_by_every_end_of_its_path(folder: str, name: str, gguf: bool, windows: bool) -> None:
    path = f"/{folder}/{name}{'.gguf' * gguf}"
    has = llama(f"/{folder}/{name}x.gguf", path.replace("/", "\\") if windows else path)
    for wanted in (name, f"{name}.gguf", f"{folder}/{name}", path):
        assert dialects.lacks(Wanted("llamacpp", "base", wanted), has) == []
        assert [row["scale"] for row in dialects.shape(Wanted("llamacpp", "base", wanted), has, {})["lora"]] == [0.0, 1.0]


@pytest.mark.parametrize("wanted", ["la", "w", "b/law.bin", "c/law", "/law", "law.gguf.gguf", "LAW"])
def test_a_file_goes_by_no_part_of_its_name(wanted: str) -> None:
    found = dialects.lacks(Wanted("llamacpp", "base", wanted), llama("/a/b/law.gguf", "/a/b/math.gguf"))
    assert found == ([] if wanted == "/law" else [f"has no adapter {wanted!r}; it has '/a/b/law.gguf', '/a/b/math.gguf'"])


def test_a_name_that_two_files_have_is_refused_until_it_is_longer() -> None:
    has = llama("/a/law.gguf", "/b/law.gguf")
    assert dialects.lacks(Wanted("llamacpp", "base", "law"), has) == ["has several adapters that 'law' may mean: '/a/law.gguf', '/b/law.gguf'"]
    assert dialects.lacks(Wanted("llamacpp", "base", "b/law"), has) == []


@given(st.sampled_from(DIALECTS), OPTIONS, st.text(min_size=1, max_size=5))
def test_no_option_of_a_client_chooses_the_weights(dialect: str, options: dict[str, Any], adapter: str) -> None:
    has = Stock(("base",), (adapter,), (0,))
    for asked in ({}, options):
        body = dialects.shape(Wanted(dialect, "base", adapter), has, {"messages": [], **asked})
        chosen = {name: body[name] for name in dialects.RESERVED if name in body}
        assert chosen == {"model": "base" if dialect == "llamacpp" else adapter, **({"lora": [{"id": 0, "scale": 1.0}]} if dialect == "llamacpp" else {})}
        others = {name: value for name, value in asked.items() if name not in dialects.RESERVED}
        if dialect != "lorax":
            assert {name: body[name] for name in others} == others
        json.dumps(body)


@pytest.mark.parametrize("dialect, adapter, model", [
    ("vllm", "law", "law"), ("vllm", "", "base"), ("lorax", "org/law", "org/law"), ("lorax", "", ""), ("llamacpp", "law", "base"), ("llamacpp", "", "base")])
def test_the_model_of_a_request(dialect: str, adapter: str, model: str) -> None:
    assert dialects.shape(Wanted(dialect, "base", adapter), llama("law"), {})["model"] == model


def test_lorax_is_asked_in_the_words_that_it_knows() -> None:
    wanted = Wanted("lorax", "base", "/data/law", source="local")
    body = dialects.shape(wanted, Stock(("base",), None), {"messages": [], "stop": "###", "max_completion_tokens": 5, "adapter_source": "hub"})
    assert body == {"model": "/data/law", "messages": [], "stop": ["###"], "max_tokens": 5, "adapter_source": "local"}
    assert dialects.shape(wanted, Stock(("base",), None), {"stop": ["a", "b"], "max_tokens": 3}).items() >= {"stop": ["a", "b"], "max_tokens": 3}.items()


@pytest.mark.parametrize("dialect, finish, words", [("lorax", "content_filter", "stop"), ("lorax", "length", "length"), ("vllm", "content_filter", "content_filter")])
def test_why_an_answer_ended_is_said_in_openais_words(dialect: str, finish: str, words: str) -> None:
    assert dialects.ended(dialect, finish) == words


CARDS = [{"id": "qwen", "root": "/models/qwen", "parent": None}, {"id": "law", "root": "/adapters/law", "parent": "qwen"}, {"id": "bio", "parent": "qwen"}]


def test_what_the_listings_mean() -> None:
    assert dialects.stock("vllm", [{"object": "list", "data": CARDS}]) == Stock(("qwen",), ("law", "bio"))
    assert dialects.stock("lorax", [{"model_id": "org/base", "version": "0.1"}]) == Stock(("org/base",), None)
    listed = [{"model_path": "/m/toy.gguf", "model_alias": "toy"}, {"data": [{"id": "toy", "aliases": ["toy", "other"]}]},
              [{"id": 0, "path": "a.gguf", "scale": 1.0}, {"id": 1, "path": "b.gguf", "scale": 0.0}]]
    assert dialects.stock("llamacpp", listed) == Stock(("/m/toy.gguf", "toy", "other"), ("a.gguf", "b.gguf"), (0, 1))
    older = [{"model_path": "/m/toy.gguf"}, {"data": [{"id": "/m/toy.gguf"}]}, []]
    assert dialects.stock("llamacpp", older) == Stock(("/m/toy.gguf",), (), ())


@given(st.sampled_from(DIALECTS), st.lists(VALUES, min_size=3, max_size=3))
def test_a_listing_of_anything_is_read_or_refused_in_words(dialect: str, answers: list[Any]) -> None:
    try:
        found = dialects.stock(dialect, answers[: len(dialects.LISTINGS[dialect])])
    except ValueError as error:
        assert str(error).startswith("expected ")
    else:
        assert all(isinstance(name, str) for name in (*found.bases, *(found.adapters or ())))
        assert dialect != "llamacpp" or len(found.numbers) == len(found.adapters or ())


def test_everything_that_is_missing_is_said_with_what_is_there() -> None:
    has = dialects.stock("vllm", [{"data": CARDS}])
    assert dialects.lacks(Wanted("vllm", "llama", "chem"), has) == ["serves 'qwen', and not the base 'llama'", "has no adapter 'chem'; it has 'law', 'bio'"]
    assert dialects.lacks(Wanted("vllm", "qwen", "law"), has) == dialects.lacks(Wanted("vllm", "qwen"), has) == []
    assert dialects.lacks(Wanted("vllm", "qwen", "qwen"), has) == ["has no adapter 'qwen'; it has 'law', 'bio'"]
    assert dialects.lacks(Wanted("vllm", "models/qwen"), has), "only llama.cpp's and LoRAX's names are files"
    assert dialects.lacks(Wanted("lorax", "org/base"), Stock(("/data/org/base",), None)) == []
    many = Stock(("base",), tuple(f"a{i}" for i in range(25)))
    assert dialects.lacks(Wanted("vllm", "base", "x"), many)[0].endswith("'a19' and 5 more")
    assert dialects.lacks(Wanted("lorax", "base", "anything"), Stock(("base",), None)) == []
    assert dialects.lacks(Wanted("lorax", "other", "anything"), Stock(("base",), None)) == ["serves 'base', and not the base 'other'"]


@pytest.mark.parametrize("wanted, loads", [
    (Wanted("vllm", "qwen", "chem", "/adapters/chem"), True), (Wanted("vllm", "qwen", "law", "/adapters/law"), False),
    (Wanted("vllm", "qwen", "chem"), False), (Wanted("vllm", "llama", "chem", "/adapters/chem"), False)])
def test_only_an_adapter_that_is_missing_is_loaded_and_only_onto_its_base(wanted: Wanted, loads: bool) -> None:
    assert dialects.loads(wanted, dialects.stock("vllm", [{"data": CARDS}])) is loads


NEW = Wanted("vllm", "qwen", "chem", "/adapters/chem")


@pytest.mark.parametrize("status, said, words", [
    (200, "Success: LoRA adapter 'chem' added successfully.", ""),
    (400, {"message": "The lora adapter 'chem' has already been loaded."}, ""),
    (404, '{"detail":"Not Found"}', "does not load adapters while it runs ('chem' is wanted from /adapters/chem): start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
    (404, {"message": "No adapter found for /adapters/chem"}, "did not load the adapter 'chem' from /adapters/chem: it answered 404: No adapter found for /adapters/chem"),
    (400, {"message": "rank 64 is greater than max_lora_rank 16"}, "did not load the adapter 'chem' from /adapters/chem: it answered 400: rank 64 is greater than max_lora_rank 16"),
    (500, "Internal Server Error", "did not load the adapter 'chem' from /adapters/chem: it answered 500: Internal Server Error")])
def test_what_a_vllm_says_to_loading(status: int, said: Any, words: str) -> None:
    assert dialects.loaded(NEW, status, said) == words
    assert dialects.load(NEW) == {"lora_name": "chem", "lora_path": "/adapters/chem"}
