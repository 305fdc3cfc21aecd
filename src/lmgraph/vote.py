"""Votes: what can be compared of an answer, how much a voter's word weighs, which answer wins. Pure; it knows text and numbers.

It knows no worker, no graph and no runtime: answers recorded in a file are tallied as answers that have just been given. Reading
(`key`) says nothing rather than guess: a letter or a number read out of prose would make two unlike answers look the same.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

UNKNOWN_OPTIONS = 4
"""answers that a question has where nobody knows how many"""
LEAST = 0.01
"""lightest vote: nobody votes against his own answer"""
CERTAIN = 1e-6
"""nearest that a competence comes to 0 and to 1, where a vote would weigh without limit"""
SHORT_WORDS, SHORT_CHARACTERS = 6, 40
"""longest answer that is compared as a whole"""

READ = 20_000
"""characters at the end of an answer in which statements are looked for"""

OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.)])(?=\s|$)", re.MULTILINE)
NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})(?:\.\d{1,30})?(?:/\d{1,30})?"
_WHOLE = (
    r"(?!\w|[.,:/]\d|[\^√π²³]|\s*[+*×·=^]\s*[\w\\(]|\s*[-–/]\s*\d|\\(?:sqrt|pi|d?frac|times|cdot)|,\s*\d|\s*x\s*\d"
    r"|,?\s*(?:and|or)\s+[-$€]?\d|\s*(?:hundred|thousand|million|billion|trillion)\b)"
)
"""behind a number: it does not go on as a longer number, a date, a range, a list or a term"""
_ONE = (
    r"(?!\w|\.\w|['’]\w"
    r"|\W{0,4}(?:(?:and|or)\W{1,3}|[,&/+]\W{0,3})[A-Z](?:\s*(?:[^\w\s]|$)|\s+(?:and|or|both|are)\b))"
)
"""behind a letter: it is no word, no abbreviation and not the first of several letters"""
_ENDED = r"(?=\s*(?:$|[.,;:!)\]}*_\"'”`$\\—–(-])|\s+(?:because|since|as|due|is)\b)"
"""behind a bare letter: the sentence is over, or says why; "A dog" and "I think" go on"""
_SAID = (
    r"(?i:\b(?:answer(?:\s+(?:to|for)\s[^.:\n]{1,60}?)?|choice|option|(?:correct|right|best|final)\s+letter)[*_\"']{0,3}"
    r"(?:\s*[:=]|\s+(?:is|would\s+be|must\s+be|should\s+be)\b)[\s:*_\"'$(\\\[{]{0,9}?"
    r"(?:(?:therefore|thus|clearly|probably|most\s+likely|(?:the\s+)?(?:option|choice|letter))\s+)?)"
)
"""what makes a statement of the letter or number that follows"""
_MARKS = r"[*_\"'“`$\\(\[{]{0,9}"
LETTER = re.compile(
    rf"\\boxed\{{\s*(?:\\text\w*\{{)?\s*\(?(?P<boxed>[A-Za-z])\)?\.?\s*\}}"
    rf"|{_SAID}{_MARKS}\((?P<round>[A-Za-z])\){_ONE}"
    rf"|{_SAID}{_MARKS}(?P<said>[A-Z]){_ONE}{_ENDED}"
    rf"|(?<![\w.'’])\(?(?P<named>[A-Z])\)?[*_]{{0,3}}\s+is\s+the\s+(?:correct|right|best)\s+(?:answer|choice|option)\b",
    re.MULTILINE,
)
OPENING = re.compile(rf"{_MARKS}\((?P<round>[A-Za-z])\){_ONE}|[*_\"'“`]{{0,3}}(?P<bare>[A-Z]){_ONE}{_ENDED}", re.MULTILINE)
CHOSEN = re.compile(r"\)|[.*_\"'”`\]]*(?:\n|$)")
"""behind an opening letter where no options are listed: "E. coli", "J. K. Rowling", "A: ..." and "I, too" open like a choice"""
LIST = re.compile(r"\W*\(a\).*\(b\)", re.IGNORECASE | re.DOTALL)
ALONE = re.compile(r"[*_\"'“`(\[]{0,3}([A-Z])[.)\]*_\"'”`]{0,5}")
FIGURE = re.compile(
    rf"\\boxed\{{\s*\\?\$?(?P<boxed>{NUMBER}){_WHOLE}"
    rf"|####\s*\\?\$?(?P<marked>{NUMBER}){_WHOLE}"
    rf"|{_SAID}[*_\"'`$\\([{{€£≈~]{{0,9}}(?P<said>{NUMBER}){_WHOLE}"
)
RESULT = re.compile(rf"=\s*[*_`$\\€£]{{0,5}}({NUMBER}){_WHOLE}(?:[^\w\n]+\w+){{0,3}}[^\w\n]*$")
SIGNS = re.compile(r"(?<![\w)])[-−](?=\w)|(?<=\s)[-−*](?=\s)|(?<=\w)\*(?=\w)|(?<=\d)[-−.,:](?=\d)|[/#%&]")
"""marks that make a short answer another one: minus, times, a decimal point"""
PLAIN = re.compile(rf"[*_`$\\(€£\s]{{0,9}}({NUMBER})[*_`$\\)€£%.\s]{{0,9}}")


@dataclass(frozen=True)
class Verdict:
    """How a vote ended."""

    key: str | None
    """what was agreed on; None: no answer could be compared"""
    winner: str
    """the voter whose answer is taken"""
    share: float
    """weight of those who agree with it among all, 0 to 1; 0 when no answer could be compared"""
    votes: tuple[tuple[str, str | None, float], ...]
    """(voter, key, weight) of every vote, as they were given"""


def option_count(text: str) -> int:
    """How many options a multiple-choice question lists: lines that begin with A. or A) or (A), then B, C, ...; 0 when it lists none.

    Where there are several lists (examples before the question), the last one counts.
    """
    found, run = 0, 0
    for match in OPTION.finditer(text):
        place = ord(match.group(1) or match.group(2)) - ord("A")
        if place == 0 or place == run:
            run = place + 1
        if run > 1:
            found = run
    return found


def key(text: str, options: int = 0) -> str | None:
    """What can be compared of an answer, None for free text: two answers with one key say the same.

    In this order: the chosen letter ("C"; only one of the first `options` where they are counted), the final number in its plainest
    form ("1,234.50" is "1234.5"), and a text of at most 6 words and 40 characters, folded. Of several statements ("the answer is ...")
    the last one counts.
    """
    text = unicodedata.normalize("NFC", text).strip()
    return _letter(text, options) or _number(text) or _short(text)


def _letter(text: str, options: int) -> str | None:
    def valid(letter: str) -> bool:
        return not options or ord(letter.upper()) - ord("A") < options

    stated = [letter for match in LETTER.finditer(text[-READ:]) for letter in match.groups() if letter and valid(letter)]
    if stated:
        return stated[-1].upper()
    opened = _opening(text, options)
    if opened and valid(opened):
        return opened
    last = ALONE.fullmatch(text.rpartition("\n")[2].strip())
    return last[1] if last and valid(last[1]) else None


def _opening(text: str, options: int) -> str:
    """The letter that an answer begins with, '' where it is no choice."""
    first = OPENING.match(text)
    if first is None or option_count(text):  # it only lists the options again
        return ""
    chosen = options or (first["round"] and not LIST.match(text)) or CHOSEN.match(text, first.end())
    return (first["round"] or first["bare"]).upper() if chosen else ""


def _number(text: str) -> str | None:
    stated = [number for match in FIGURE.finditer(text[-READ:]) for number in match.groups() if number]
    if stated:
        return _canonical(stated[-1])
    found = RESULT.search(text[text.rfind("\n", -READ) + 1 :][-READ:]) or PLAIN.fullmatch(text)
    return _canonical(found[1]) if found else None


def _canonical(number: str) -> str:
    """The plainest form: no separators, no needless zeros; a fraction as a decimal where that ends."""
    above, _, below = number.replace(",", "").replace("−", "-").partition("/")
    if below and not int(below):
        return number
    value = Fraction(above) / int(below or 1)
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return f"{decimal.normalize():f}" if Fraction(decimal) == value else str(value)


def _short(text: str) -> str | None:
    if len(text) > SHORT_CHARACTERS or len(text.split()) > SHORT_WORDS:
        return None
    folded = unicodedata.normalize("NFKC", text).casefold()
    signs = {match.start() for match in SIGNS.finditer(folded)}

    def shown(place: int, mark: str) -> str:
        kind = unicodedata.category(mark)[0]
        if place in signs or (kind == "S" and mark not in "`$"):
            return f" {mark} "
        return mark if mark.isalnum() or kind == "M" else " "

    plain = " ".join("".join(shown(place, mark) for place, mark in enumerate(folded)).split())
    return plain if any(map(str.isalnum, plain)) else None


def weight(competence: float, options: int = 0) -> float:
    """How much a vote counts: log-odds of one that is right with probability `competence`, errors falling evenly on the other options.

    log(c (K - 1) / (1 - c)), K = `options`, 4 where unknown (0). For two options it is the optimal weight of Nitzan and Paroush (1982).
    Never below 0.01.
    """
    others = max(options or UNKNOWN_OPTIONS, 2) - 1
    c = min(max(competence, CERTAIN), 1 - CERTAIN)
    return max(math.log(c * others / (1 - c)), LEAST)


def tally(votes: Sequence[tuple[str, str | None, float]]) -> Verdict:
    """Who wins among (voter, key, weight): the key with the greatest weight of all who gave it, by its heaviest voter.

    A tie goes to the key with the heaviest single vote, then to the earlier voter. Without any key the heaviest vote wins. Raises
    ValueError without votes.
    """
    if not votes:
        raise ValueError("a vote without votes")
    groups: dict[str, list[float]] = {}
    for _, found, heavy in votes:
        if found is not None:
            groups.setdefault(found, []).append(heavy)
    # rounded: 0.1 + 0.2 and 0.3 are a tie; `max` takes the first of equals, and keys and voters stand as they came
    agreed = max(groups, key=lambda found: (round(math.fsum(groups[found]), 9), max(groups[found]))) if groups else None
    able = [vote for vote in votes if agreed is None or vote[1] == agreed]
    winner = max(able, key=lambda vote: vote[2])[0]
    share = math.fsum(groups[agreed]) / math.fsum(vote[2] for vote in votes) if agreed is not None else 0.0
    return Verdict(agreed, winner, share, tuple(votes))
