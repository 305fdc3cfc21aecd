"""Documents that must be true: docs/cli.md is the real --help, every room is in the architecture, versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent


def cli_page() -> str:
    """docs/cli.md as it should be."""
    from lmgraph.cli import lmgraph
    from lmgraph.settings import VARIABLES

    parts = ["# Command line\n\nWritten by `scripts/docs` from the real `--help`; a test fails when it is stale.\n"]

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        context = click.Context(command, info_name=" ".join(path), max_content_width=110, terminal_width=110,
                                help_option_names=["-h", "--help"])
        parts.append(f"## {' '.join(path)}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                walk(found, (*path, name))

    walk(lmgraph, ("lmgraph",))
    parts.append("## Environment\n\n| variable | what |\n|---|---|\n" + "\n".join(f"| `{n}` | {t} |" for n, t in VARIABLES.items()) + "\n")
    return "\n".join(parts)


def test_the_command_line_page_is_the_real_help() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_page(), "run scripts/docs"


def test_every_room_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "lmgraph"
    for path in source.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.name in text, f"docs/architecture.md does not mention {path.relative_to(source)}"


def test_the_newest_changelog_entry_is_the_version() -> None:
    from lmgraph import __version__

    found = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found and found.group(1) == __version__
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_readme_names_both_commands_on_its_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "scripts/run ask" in first and "scripts/test" in first


def test_commands_in_the_readme_exist() -> None:
    from lmgraph.cli import lmgraph

    context = click.Context(lmgraph)
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            words = line.strip().removeprefix("$ ").split()
            if words[:1] in (["lmgraph"], ["scripts/run"]) and len(words) > 1:
                command = lmgraph.get_command(context, words[1])
                assert command is not None, line
                if isinstance(command, click.Group) and len(words) > 2 and not words[2].startswith("-"):
                    assert command.get_command(context, words[2]) is not None, line


def test_no_document_or_source_names_a_path_of_a_machine_or_a_download_host() -> None:
    pattern = re.compile("|".join(("/" + "work/", "/" + "root/", "files" + ".pythonhosted", "registry" + ".npmjs", "deb" + ".debian")))
    for folder in ("src", "docs", "tests", "scripts", "benchmarks", "data"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".json", ".jsonl", ".txt", ".toml", ""):
                assert not pattern.search(path.read_text(encoding="utf-8")), path


if __name__ == "__main__":
    print(cli_page(), end="")
