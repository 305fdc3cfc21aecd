"""Names as Kubernetes takes them: DNS labels, and which of several names become the same one. Pure.

A label has small letters, digits and "-", begins with a letter and ends with a letter or digit, 63 characters at most (RFC 1035, which
Services hold to). Ours are shorter: KEDA, KServe and ReplicaSets put words of their own around them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

MOST = 20
"""characters of the name that begins all others"""
PART = 30
"""characters of what comes behind it: together with "-" at most 51, so that "keda-hpa-" before it still fits into a label"""
LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


def is_label(text: str, most: int = 63) -> bool:
    """Whether a text is a DNS label of at most `most` characters."""
    return len(text) <= most and LABEL.fullmatch(text) is not None


def label(text: str, most: int = PART) -> str:
    """Any text as a DNS label: what is no small letter or digit becomes "-"; what is too long is cut and ends in digits of its sha256."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not plain or not plain[0].isalpha():
        plain = f"m-{plain}".rstrip("-")
    if len(plain) <= most:
        return plain
    return f"{plain[: most - 7].rstrip('-')}-{digest(text, 6)}"


def digest(text: str, size: int = 10) -> str:
    """The first hexadecimal digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:size]


def collisions(texts: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(label, the texts that become it) wherever several do, in the order of the texts."""
    found: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        found.setdefault(label(text), []).append(text)
    return [(name, those) for name, those in found.items() if len(those) > 1]
