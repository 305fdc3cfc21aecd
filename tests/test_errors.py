"""The exception tree: what the module docstring draws is what the module holds."""

from __future__ import annotations

import inspect
import re

import pytest

from lmgraph import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception) and c.__module__ == errors.__name__]


def drawn() -> dict[str, str]:
    """Class name -> name of the class it hangs from, read off the picture ('' for the root)."""
    above: list[tuple[int, str]] = []
    tree: dict[str, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)\s{2,}\S", line)
        if match:
            depth = len(match[1])
            above = [(d, name) for d, name in above if d < depth]
            tree[match[2]] = above[-1][1] if above else ""
            above.append((depth, match[2]))
    return tree


def test_every_exception_is_drawn_in_the_tree_and_nothing_else_is() -> None:
    assert set(drawn()) == {c.__name__ for c in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_an_exception_hangs_where_the_tree_says(cls: type[errors.LmgraphError]) -> None:
    base = cls.__bases__[0]
    assert drawn()[cls.__name__] == ("" if base is Exception else base.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_exception_has_a_code_and_a_docstring_of_its_own(cls: type[errors.LmgraphError]) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", vars(cls)["code"])
    assert vars(cls)["__doc__"].strip()


def test_no_two_exceptions_share_a_code() -> None:
    codes = [c.code for c in CLASSES]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not errors.MissingExtra], ids=lambda c: c.__name__)
def test_an_exception_shows_its_message_and_then_its_hint(cls: type[errors.LmgraphError]) -> None:
    assert str(cls("what was found")) == "what was found"
    error = cls("what was found", "what to run")
    assert (error.message, error.hint) == ("what was found", "what to run")
    assert str(error) == "what was found\nwhat to run"


def test_a_missing_extra_says_what_to_install() -> None:
    error = errors.MissingExtra("Training", "train")
    assert "Training" in error.message
    assert "pip install 'lmgraph[train]'" in error.hint


def test_a_graph_error_carries_its_problems_one_by_one() -> None:
    assert errors.GraphError("two problems", "mend", ("one", "two")).problems == ("one", "two")
    assert errors.GraphError("no list").problems == ()
