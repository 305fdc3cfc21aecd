"""How things look in a terminal: progress bars, a decision, a graph. Everything that is not an answer goes to stderr."""

from __future__ import annotations

import sys
import textwrap
import time
from html import escape
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from rich.tree import Tree

from lmgraph.graph import END, START, WALKS, AnswerSpec, Graph
from lmgraph.types import Decision, Step, Vote, Walk
from lmgraph.types import Progress as Moment

REQUEST = 160
"""characters of a hop's request that are shown: one that holds earlier answers is long"""
console = Console(stderr=True, highlight=False)


class Bars:
    """A watcher that draws one bar a task on stderr; silent where stderr is no terminal, but for `say`."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`; bytes when the task fetches something. `note` is how it goes (a score so far)."""
        if self._progress is None:
            amount = DownloadColumn() if task.startswith("fetching") else MofNCompleteColumn()
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                amount,
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )  # else results on their way to a file would land on the terminal
            self._progress.start()
        if task not in self._tasks:
            if not console.is_terminal:
                console.print(f"{task} ...")
            self._tasks[task] = self._progress.add_task(task, total=total, note=note)
        self._progress.update(self._tasks[task], completed=done, total=total, note=note)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(task))
            if not self._tasks:
                self.stop()

    def say(self, text: str) -> None:
        """A line on stderr."""
        console.print(text, style="dim", markup=False)

    def stop(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()


def decision_lines(decision: Decision, token: str) -> Text:
    """Two or three lines: token, node, probability, runner-up, time; the rewritten query; why not, where not."""
    out = Text()
    out.append(f"{token} ", style="magenta")
    out.append(decision.chosen, style="bold green")
    out.append(f"  {decision.probability:.0%}", style="bold")
    if len(decision.alternatives) > 1:
        name, probability = decision.alternatives[1]
        out.append(f"  then {name} {probability:.0%}", style="dim")
    out.append(f"  {decision.tokenise_ms + decision.prefill_ms:.0f} ms", style="dim")
    if decision.fallback:
        out.append(f"\n  below the threshold: {decision.node} answers", style="yellow")
    if decision.shortened:
        out.append(
            f"\n  the master read head and tail of a long query ({decision.shortened} tokens left out); the worker gets it whole",
            style="yellow",
        )
    out.append("\n  ")
    out.append(decision.rewritten if len(decision.rewritten) < 600 else decision.rewritten[:600] + " ...", style="cyan")
    if decision.rewrite_note:
        out.append(f"\n  original query kept: {decision.rewrite_note}", style="dim")
    return out


def vote_lines(vote: Vote) -> Text:
    """A line for each voter: node, what could be compared of its answer, weight; the winner's share of all; who judged."""
    out = Text()
    for node, key, weight in vote.votes:
        won = node == vote.winner and not vote.judge
        out.append(f"{node}", style="bold green" if won else "green")
        out.append(f"  {'free text' if key is None else key}", style="cyan")
        out.append(f"  weight {weight:.2f}", style="dim")
        if won:
            out.append(f"  won with {vote.share:.0%}" if vote.share else "  taken: the most competent", style="bold")
        out.append("\n")
    if vote.judge:
        out.append(f"{vote.judge} made one answer out of these\n", style="dim")
    out.rstrip()
    return out


class Steps:
    """A walk as it goes: a tree with a line for each hop, alive on a terminal; elsewhere a line when a hop begins and one when it ends."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[str, str, float, Step | None]] = {}
        self._live: Live | None = None
        self._over = False

    def __call__(self, event: Moment) -> None:
        """Take note of what the walk is at."""
        if event.kind == "plan":
            self._rows = {i: (hop.node, hop.request, 0.0, None) for i, hop in enumerate(event.hops)}
        elif event.kind == "began":
            self._rows[event.hop] = (event.node, event.request, time.monotonic(), None)
        else:
            node, request, began, _ = self._rows[event.hop]
            self._rows[event.hop] = (event.step.node if event.step else node, request, began, event.step)
        if not console.is_terminal:
            if event.kind != "plan":
                console.print(self._line(event.hop), soft_wrap=True)
        elif self._live is None and not self._over:
            self._live = Live(get_renderable=self.tree, console=console, refresh_per_second=8, redirect_stdout=False)
            self._live.start()

    def stop(self) -> None:
        """Leave the tree as it is: what follows is the answer, and no tree is drawn behind it."""
        self._over = True
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tree(self) -> Tree:
        """All hops so far."""
        root = Tree(Text("start", style="bold"), guide_style="dim")
        for number in self._rows:
            root.add(self._line(number))
        return root

    def _line(self, number: int) -> Text:
        node, request, began, step = self._rows[number]
        out = Text(f"{number + 1} ", style="magenta", no_wrap=True, overflow="ellipsis")
        failed = step is not None and step.error
        out.append(node, style="bold red" if failed else "bold green" if step else "bold")
        state = f"{step.ms / 1000:.1f} s" if step else f"{time.monotonic() - began:.1f} s ..." if began else "waits"
        out.append(f"  {state}", style="bold" if step else "yellow")
        out.append(f"  {textwrap.shorten(request, REQUEST, placeholder=' ...')}", style="cyan")
        if step and step.error:
            out.append(f"  {step.error}", style="yellow")
        return out


def walk_line(walk: Walk) -> str:
    """Why a walk ended, '' where it ended because the master chose the end."""
    reasons = {
        "hops": "the limit of hops is reached (answer: hops)",
        "seconds": "its time is over (answer: seconds): the best answer so far",
        "tokens": "the limit of tokens is reached (answer: tokens): the best answer so far",
        "cost": "the limit of cost is reached (answer: cost): the best answer so far",
        "master": "the master failed on the way: the best answer so far",
        "loop": "the master chose the same step again: the best answer so far",
    }
    return reasons.get(walk.stopped, "")


def graph_tree(given: Graph) -> Tree:
    """The graph as a tree from start, two levels deep, with token and worker of each node."""
    root = Tree(
        Text(
            f"start (master: {given.master.bundle}, threshold {given.master.threshold:g}, fallback {given.master.fallback or '-'})"
            f"{_answering(given.answer)}",
            style="bold",
        )
    )
    for name in given.neighbours(START):
        node = given.nodes[name]
        line = Text()
        line.append(f"<fn_{node.token}> ", style="magenta")
        line.append(name, style="bold green")
        worker = node.worker
        model = f"{worker.model} + {worker.adapter}" if worker.adapter else worker.model
        line.append(f"  {worker.kind} {model}{' ' + ', '.join(worker.urls) if worker.urls else ''}", style="cyan")
        line.append(f"  {node.description}", style="dim")
        if node.answer:
            line.append(_answering(node.answer) or "  one answers", style="yellow")
        branch = root.add(line)
        following = given.neighbours(name)
        if following:
            named = [END] * (END in following) if _open(given, name) else following
            branch.add(Text("then: " + ", ".join(["any other"] * _open(given, name) + [*named]), style="dim"))
    return root


def _open(given: Graph, name: str) -> bool:
    """Whether every other node may follow this one."""
    return len(given.nodes) > 1 and {*given.nodes} - {name} <= {*given.neighbours(name)}


def _answering(spec: AnswerSpec) -> str:
    """How queries are answered, where not by one worker."""
    if spec.mode in WALKS:
        return f"  {spec.mode}: at most {spec.hops} hops"
    if spec.mode != "vote":
        return ""
    who = ", ".join(f"{name} {competence:.2f}" for name, competence in spec.voters.items())
    return f"  vote of {spec.workers}{f' among {who}' if who else ''}{f', judge {spec.judge}' if spec.judge else ''}"


def graph_svg(given: Graph) -> str:
    """A picture of the graph as SVG text: start on the left, nodes in a column, edges between nodes as arcs on the right."""
    names = list(given.nodes)
    row, left, top = 34, 190, 40
    height = top * 2 + row * max(1, len(names))
    middle = height / 2
    where = {name: top + row * i + row / 2 for i, name in enumerate(names)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="980" height="{height:.0f}" viewBox="0 0 980 {height:.0f}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#778"/></marker></defs>',
    ]
    for name in given.neighbours(START):
        if name != END:
            parts.append(
                f'<path d="M110 {middle:.0f} C150 {middle:.0f} 150 {where[name]:.0f} {left - 4} {where[name]:.0f}" '
                'fill="none" stroke="#99a" marker-end="url(#a)"/>'
            )
    for name in names:
        if _open(given, name):
            parts.append(f'<text x="530" y="{where[name] + 5:.0f}" fill="#b58" font-size="11">&#8644; any other</text>')
        for other in () if _open(given, name) else given.neighbours(name):
            if other != END:
                bend = 560 + min(300, abs(where[name] - where[other]) / 2 + 40)
                parts.append(
                    f'<path d="M520 {where[name]:.0f} C{bend:.0f} {where[name]:.0f} {bend:.0f} {where[other]:.0f} 524 {where[other]:.0f}" '
                    'fill="none" stroke="#b58" stroke-opacity="0.6" marker-end="url(#a)"/>'
                )
    parts.append(
        f'<rect x="20" y="{middle - 22:.0f}" width="90" height="44" rx="8" fill="#245"/>'
        f'<text x="65" y="{middle + 5:.0f}" fill="#fff" text-anchor="middle">master</text>'
    )
    for name, node in given.nodes.items():
        y = where[name]
        ends = "" if END not in given.neighbours(name) and given.neighbours(name) else " &#9632;"
        parts.append(
            f'<rect x="{left}" y="{y - 14:.0f}" width="330" height="28" rx="6" fill="#eef3f8" stroke="#567"/>'
            f'<text x="{left + 10}" y="{y + 5:.0f}" fill="#a26">&lt;fn_{node.token}&gt;</text>'
            f'<text x="{left + 72}" y="{y + 5:.0f}" fill="#123" font-weight="bold">{escape(name)}{ends}</text>'
            f'<text x="{left + 320}" y="{y + 5:.0f}" fill="#678" text-anchor="end" font-size="11">'
            f"{escape((node.worker.model or node.worker.kind)[:24])}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def out(text: str) -> None:
    """Text of an answer on stdout, at once, whatever stdout can spell."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
