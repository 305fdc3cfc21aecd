"""What a run shows: turns that are waited for, figures of each phase, what must hold, and a table of it. It knows turns, and no hosts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from talk import KEPT, UNKEPT, Talkers, Turn

LIMIT_S = 150.0
"""for one thing to happen, on a busy machine"""
WELL = 3
"""turns in a row that go well: it has recovered"""
SLOW_S = 1.0
"""a turn is slow that takes longer than that and than twice the longest one of the quiet time"""
COLUMNS = ("turns", "errors", "unkept", "median", "longest", "first", "recovered", "back")
Concerns = Callable[[Turn], bool]


def anyone(turn: Turn) -> bool:
    """Every turn."""
    return True


class Figures:
    """Figures by phase, and `musts`: sentence -> whether it holds. `slow_s` is set when it is known what is usual."""

    def __init__(self, talkers: Talkers) -> None:
        self.talkers = talkers
        self.phases: dict[str, dict[str, Any]] = {}
        self.musts: dict[str, bool] = {}
        self.slow_s = SLOW_S

    def must(self, sentence: str, holds: bool) -> None:
        """Something that must hold."""
        self.musts[sentence] = bool(holds)

    def few(self, phase: str, turns: Sequence[Turn]) -> None:
        """A fault may cost each talker the turn that it is at, and no more."""
        self.must(f"{phase}: at most one turn of each talker fails", sum(not turn.answered for turn in turns) <= self.talkers.count)

    def none(self, phase: str, turns: Sequence[Turn]) -> None:
        """No turn may fail."""
        self.must(f"{phase}: no turn fails", all(turn.answered for turn in turns))

    def during(self, began: float, ended: float) -> list[Turn]:
        """The turns that were under way at some time between; waits until all of them are over."""

        def over(turns: Sequence[Turn]) -> bool:
            return len({turn.talker for turn in turns if turn.began > ended}) == self.talkers.count

        self.wait("the end of turns under way", over)
        return [turn for turn in self.talkers.turns if turn.ended > began and turn.began < ended]

    def wait(self, what: str, condition: Callable[[list[Turn]], bool]) -> bool:
        """Whether it came to that within LIMIT_S; where not, the last turns are shown."""
        came = self.talkers.until(condition, LIMIT_S)
        if not came:
            print(f"{what}: it did not come to that within {LIMIT_S:g} s. The last turns:", file=sys.stderr)
            for turn in self.talkers.turns[-12:]:
                print(f"  {turn}", file=sys.stderr)
        return came

    def well(self, turns: Sequence[Turn], began: float, concerns: Concerns = anyone) -> bool:
        """Whether the newest turns of those concerned, begun since, were answered, and not slowly."""
        newest = [turn for turn in turns if turn.began > began and concerns(turn)][-WELL:]
        return len(newest) == WELL and all(turn.answered and turn.took <= self.slow_s for turn in newest)

    def unkept_well(self, turns: Sequence[Turn], began: float, gateway: str) -> bool:
        """The same of a gateway without its store."""
        return self.well(turns, began, lambda turn: turn.gateway == gateway and turn.outcome == UNKEPT)

    def first(self, after: float, fits: Concerns, what: str) -> float | None:
        """Seconds until the first turn that began after that and fits has ended; None where there was none."""

        def found(turns: Sequence[Turn]) -> list[float]:
            return [turn.ended - after for turn in turns if turn.began > after and fits(turn)]

        return min(found(self.talkers.turns)) if self.wait(what, lambda turns: bool(found(turns))) else None

    def kept_by(self, after: float, gateway: str) -> float | None:
        """Seconds until a gateway has answered, and kept, a turn that began after that."""
        return self.first(after, lambda turn: turn.gateway == gateway and turn.outcome == KEPT, f"a kept answer of {gateway}")

    def note(self, phase: str, began: float, turns: Sequence[Turn], *, fault: bool = True, **more: Any) -> None:
        """Figures of a phase over some turns."""
        took = sorted(turn.took for turn in turns)
        figures: dict[str, Any] = {
            "turns": len(turns),
            "errors": dict(Counter(turn.outcome for turn in turns if not turn.answered)),
            "unkept": sum(turn.outcome == UNKEPT for turn in turns),
            "median": took[len(took) // 2] if took else None,
            "longest": took[-1] if took else None,
        }
        if fault:
            figures["first"] = min((turn.ended - began for turn in turns if turn.answered and turn.began > began), default=None)
            bad = [turn.ended - began for turn in turns if not turn.answered or turn.took > self.slow_s]
            figures["recovered"] = max(bad, default=0.0)
        figures |= {name: value for name, value in more.items() if value is not None}
        self.phases[phase] = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def table(report: dict[str, Any]) -> str:
    """A report for people."""
    rows = [("", *COLUMNS)] + [(phase, *(_cell(figures.get(column)) for column in COLUMNS)) for phase, figures in report["phases"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    whole = report["phases"]["all"]
    lines += ["", f"{whole['acknowledged']} turns acknowledged in {whole['conversations']} conversations, {whole['lost']} of them lost."]
    lines += [f"{'holds' if holds else 'FAILS'}  {sentence}" for sentence, holds in report["musts"].items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {code}" for code, count in value.items()) or "0"
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
