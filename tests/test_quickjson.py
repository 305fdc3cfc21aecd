"""JSON of the hot paths says what the standard library says, also where orjson refuses."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmgraph import quickjson

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4), max_leaves=20)


@given(VALUES)
@example("half \ud83e of a pair")
@example({"\udd86": [2**70, -(2**70)]})
@example("zero \0, line\n, \u2028")
def test_what_is_written_is_what_the_standard_library_reads(value: object) -> None:
    assert json.loads(quickjson.dumpb(value)) == json.loads(quickjson.dumps(value)) == value
    assert "\n" not in quickjson.dumps(value)


@pytest.mark.parametrize(("text", "value"), [
    (b'{"a": [1, 2.5, "\xc3\xa9"]}', {"a": [1, 2.5, "é"]}), (b"[NaN, Infinity, -Infinity]", [None, None, None]), (b'"\\ud83e!"', "?!"), (b'"\\ud83e\\udd86"', "🦆"),
])
def test_what_servers_send_is_read(text: bytes, value: object) -> None:
    assert quickjson.loads(text) == value


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'"\xc3"', b"[" * 200_000, b"x"])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        quickjson.loads(text)
