"""What an evaluation found, for people: sections for the terminal and Markdown, JSON, and pictures as SVG and PNG.

It knows the form of a report and how it is written. It measures nothing and knows no evaluation: each makes its own `Report`.
Without matplotlib (extra `eval`) pictures are left out, and the Markdown says how to get them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lmgraph.assets import atomic
from lmgraph.errors import AssetError, MissingExtra

Cells = Sequence[str]


@dataclass(frozen=True)
class Section:
    """A table with a heading. The first column is text, the others numbers but for those named in `text`."""

    title: str
    head: Cells
    rows: Sequence[Cells]
    text: frozenset[str] = frozenset({"detail"})
    brief: bool = True
    """also shown in the terminal, not only in the Markdown"""


@dataclass(frozen=True)
class Picture:
    """A picture: file name without its ending, caption, and what draws it (a matplotlib figure; called only where it can be)."""

    name: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Report:
    """Everything that is shown and written: `metrics` is plain data, `command` what makes it again."""

    title: str
    command: str
    metrics: Mapping[str, Any]
    sections: Sequence[Section]
    pictures: Sequence[Picture] = ()
    note: str = ""


def drawable() -> bool:
    """Whether pictures can be drawn here (matplotlib is installed)."""
    return importlib.util.find_spec("matplotlib") is not None


def table(report: Report) -> RenderableType:
    """The brief sections, for a rich console."""
    return Group(*(_rich(section) for section in report.sections if section.brief))


def markdown(report: Report) -> str:
    """Title, command, all sections, the pictures (as `write` leaves them beside it) or how to get them, the note."""
    parts = [f"# {' '.join(report.title.split())}", "Made by:", "\n".join(f"    {line}" for line in report.command.splitlines())]
    for section in report.sections:
        rule = ["---"] + ["---" if name in section.text else "---:" for name in section.head[1:]]
        parts += [f"## {section.title}", "\n".join(_line(cells) for cells in (section.head, rule, *section.rows))]
    if report.pictures:
        parts.append("## Pictures")
        if drawable():
            parts += [f"![{picture.caption}]({picture.name}.svg)" for picture in report.pictures]
        else:
            parts.append(f"Not drawn: matplotlib is not installed. {MissingExtra('Drawing', 'eval').hint}")
    return "\n\n".join([*parts, report.note] if report.note else parts) + "\n"


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.json and report.md, and each picture as .svg and .png where matplotlib is installed; returns the paths.

    Each file takes its place only when whole. Without matplotlib, pictures of an earlier report in the folder are removed: they
    would show other numbers. Raises AssetError when the folder or a file cannot be written.
    """
    data = {"title": report.title, "command": report.command, "metrics": report.metrics}
    texts = {
        folder / "report.json": json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        folder / "report.md": markdown(report),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"{folder} cannot be made: {error.strerror or error}.", "Name another folder for the report.") from error
    drawn: list[Path] = []
    for picture in report.pictures:  # before the text that shows them
        figure = picture.draw() if drawable() else None
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            path = folder / f"{picture.name}.{kind}"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic(path) as part:
                figure.savefig(part, format=kind, dpi=120, metadata=metadata)
            drawn.append(path)
    for path, text in texts.items():
        with atomic(path) as part:
            part.write_text(text, encoding="utf-8")
    return [*texts, *drawn]


def percent(share: float | None) -> str:
    """A share as per cent with one decimal, '-' for None."""
    return "-" if share is None else f"{share * 100:.1f} %"


def interval(bounds: Sequence[float]) -> str:
    """A pair of shares as per cent."""
    return f"{bounds[0] * 100:.1f} to {bounds[1] * 100:.1f} %"


def _line(cells: Cells) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _rich(section: Section) -> Table:
    out = Table(title=section.title, title_justify="left", title_style="bold")
    for number, name in enumerate(section.head):
        out.add_column(name, justify="left" if number == 0 or name in section.text else "right", overflow="fold")
    for cells in section.rows:
        out.add_row(*(Text(cell) for cell in cells))  # Text: a name in square brackets is no markup
    return out
