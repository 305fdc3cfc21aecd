"""JSON as the hot paths write and read it: orjson, and the standard library for what orjson refuses.

It knows that servers send what is no JSON (NaN, halves of surrogate pairs) and that what we write may hold the latter. What users
send is not read here: orjson rounds numbers of more than 64 bits.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=lambda name: None).decode


def dumpb(value: Any) -> bytes:
    """One line of JSON in UTF-8. Raises TypeError, ValueError as `json.dumps`."""
    try:
        return orjson.dumps(value)
    except (TypeError, ValueError):  # half of a surrogate pair, a number of more than 64 bits, a key that is no text
        return _encode(value).encode()


def dumps(value: Any) -> str:
    """One line of JSON."""
    return dumpb(value).decode()


def loads(data: bytes) -> Any:
    """A JSON value; NaN and the like are None, halves of surrogate pairs become '?'. Raises ValueError."""
    try:
        return orjson.loads(data)
    except ValueError:
        pass
    try:
        value = _decode(data.decode())
        if b"\\ud" in data or b"\\uD" in data:
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value
