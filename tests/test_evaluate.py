"""The evaluation room against cases computed by hand, and against what must hold for any rows."""

from __future__ import annotations

import asyncio
import io
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lmgraph.errors import AssetError, DataError, SettingsError, WorkerError
from lmgraph.evaluate import report, routes
from lmgraph.evaluate.routes import Row, measure, run
from lmgraph.evaluate.statistics import BINS, wilson
from lmgraph.train.examples import Example
from lmgraph.types import Decision

NODES = ("math", "law", "physics")
PNG = b"\x89PNG\r\n\x1a\n"


def row(truth: str, chosen: str, probability: float = 0.9, *, node: str = "", second: str = "", lang: str = "en", style: str = "",
        **more: Any) -> Row:
    alternatives = ((chosen, probability), (second, 1 - probability)) if second else ((chosen, probability),)
    return Row(truth, lang, style, Decision(query="q", node=node or chosen, chosen=chosen, token=0, probability=probability,
                                            alternatives=alternatives, fallback=bool(node) and node != chosen, **more))


SIX = [
    row("math", "math", 0.95, second="law", style="exam", rewrite_tokens=9, tokenise_ms=1, prefill_ms=10, decode_ms=100),
    row("math", "math", 0.93, second="law", style="exam", rewrite_tokens=9, rewrite_note="lost the number 7", tokenise_ms=2, prefill_ms=20),
    row("math", "physics", 0.5, second="math", lang="fr", rewrite_tokens=2, rewrite_note="lost the number 1", tokenise_ms=3, prefill_ms=30),
    row("law", "law", 0.99, lang="fr", rewrite_note="not asked for", shortened=40, tokenise_ms=4, prefill_ms=40),
    row("law", "math", 0.3, second="physics", node="law", rewrite_note="fallback: the original query", tokenise_ms=5, prefill_ms=50),
    row("law", "math", 0.31, second="law", node="physics", rewrite_note="fallback: the original query", tokenise_ms=6, prefill_ms=60),
]

names = st.sampled_from(NODES)
many_rows = st.lists(st.builds(row, names, names, st.floats(0, 1), node=names, second=names, lang=st.sampled_from(["en", "fr", ""]),
                               style=st.sampled_from(["exam", ""]), rewrite_tokens=st.integers(0, 2),
                               rewrite_note=st.sampled_from(["", "lost the number 3", "empty"]), shortened=st.integers(0, 1)),
                     min_size=1, max_size=40)


@pytest.fixture(scope="module")
def six() -> dict[str, Any]:
    return measure(SIX, NODES)


def test_accuracy_fallback_and_baselines_are_what_a_hand_counts(six: dict[str, Any]) -> None:
    assert six["n"] == 6 and six["nodes"] == list(NODES)
    assert six["router"]["correct"] == 3 and six["router"]["accuracy"] == 0.5
    assert six["fallback"]["correct"] == 4 and six["fallback"]["fallbacks"] == 2
    assert six["fallback"]["share"] == pytest.approx(1 / 3)
    assert six["router"]["top2"] == pytest.approx(5 / 6)
    assert six["baselines"] == {"majority": 0.5, "majority_node": "math", "random": pytest.approx(1 / 3)}
    assert six["shortened"] == 1


def test_confusion_and_node_scores_are_what_a_hand_counts(six: dict[str, Any]) -> None:
    assert six["confusion"] == [[2, 0, 1], [2, 1, 0], [0, 0, 0]]
    assert six["per_node"]["math"] == {"n": 3, "chosen": 4, "precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7)}
    assert six["per_node"]["law"] == {"n": 3, "chosen": 1, "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": 0.5}
    assert six["per_node"]["physics"] == {"n": 0, "chosen": 1, "precision": 0.0, "recall": None, "f1": 0.0}
    assert six["router"]["macro_f1"] == pytest.approx((4 / 7 + 1 / 2) / 2), "physics is no truth and does not count"


def test_calibration_is_what_a_hand_counts(six: dict[str, Any]) -> None:
    bins = six["calibration"]["bins"]
    assert len(bins) == BINS
    assert [b["count"] for b in bins] == [0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2]
    assert bins[4]["accuracy"] == 0 and bins[4]["mean_probability"] == pytest.approx(0.305)
    assert bins[0]["accuracy"] is None and bins[0]["mean_probability"] is None
    assert six["calibration"]["ece"] == pytest.approx((2 * 0.305 + 0.5 + (1 - 0.93) + 2 * (1 - 0.97)) / 6)
    assert six["calibration"]["mean_probability"] == pytest.approx((0.95 + 0.93 + 0.5 + 0.99 + 0.3 + 0.31) / 6)


def test_a_probability_on_an_edge_belongs_to_the_bin_below() -> None:
    counts = [b["count"] for b in measure([row("math", "math", p) for p in (0.0, 0.2, 1.0)], NODES)["calibration"]["bins"]]
    assert counts[0] == 1 and counts[2] == 1 and counts[-1] == 1


def test_rewrites_and_their_notes_are_counted(six: dict[str, Any]) -> None:
    assert six["rewrites"] == {"attempted": 3, "passed": 1, "passed_share": pytest.approx(1 / 3),
                               "notes": {"fallback: the original": 2, "lost the number": 2, "not asked for": 1}}
    assert measure([row("math", "math")], NODES)["rewrites"]["passed_share"] is None


def test_latency_is_median_p95_and_mean_of_each_part(six: dict[str, Any]) -> None:
    assert six["latency_ms"]["tokenise"] == {"median": 3.5, "p95": 5.75, "mean": 3.5}
    assert six["latency_ms"]["decision"] == {"median": 38.5, "p95": 63.25, "mean": 38.5}
    assert six["latency_ms"]["decode"] == {"median": 0, "p95": 75, "mean": pytest.approx(100 / 6)}


def test_languages_and_styles_have_their_own_accuracy(six: dict[str, Any]) -> None:
    assert {name: (g["n"], g["correct"]) for name, g in six["by_lang"].items()} == {"en": (4, 2), "fr": (2, 1)}
    assert {name: (g["n"], g["correct"]) for name, g in six["by_style"].items()} == {"(none)": (4, 1), "exam": (2, 2)}
    assert six["by_lang"]["fr"]["interval"] == list(wilson(1, 2))


def test_wilson_gives_the_known_interval() -> None:
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=5e-5) and wilson(0, 10)[0] == 0
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=5e-5) and wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_more_hits_than_tries(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(k, n)


@given(st.integers(0, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_its_share_and_mirrors(kn: tuple[int, int]) -> None:
    k, n = kn
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    assert not n or low <= k / n <= high
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(many_rows)
def test_every_share_is_a_share_and_every_count_adds_up(rows: list[Row]) -> None:
    found = measure(rows, NODES)
    n = found["n"]
    assert [sum(line) for line in found["confusion"]] == [sum(r.truth == name for r in rows) for name in NODES]
    assert [sum(column) for column in zip(*found["confusion"], strict=True)] == [found["per_node"][name]["chosen"] for name in NODES]
    assert sum(found["confusion"][i][i] for i in range(len(NODES))) == found["router"]["correct"]
    groups = [found["router"], found["fallback"], *found["by_lang"].values(), *found["by_style"].values()]
    assert all(0 <= g["interval"][0] <= g["accuracy"] <= g["interval"][1] <= 1 for g in groups)
    assert sum(g["n"] for g in found["by_lang"].values()) == sum(g["n"] for g in found["by_style"].values()) == n
    assert sum(b["count"] for b in found["calibration"]["bins"]) == n and 0 <= found["calibration"]["ece"] <= 1
    assert found["router"]["accuracy"] <= found["router"]["top2"] <= 1
    assert 0 <= found["router"]["macro_f1"] <= 1
    assert found["rewrites"]["passed"] <= found["rewrites"]["attempted"] <= n
    assert math.isclose(found["baselines"]["majority"], max(sum(line) for line in found["confusion"]) / n)
    json.dumps(found, allow_nan=False)


@settings(max_examples=15, deadline=None)
@given(many_rows, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing_and_a_seed_repeats_itself(rows: list[Row], random: Any) -> None:
    other = list(rows)
    random.shuffle(other)
    one, two = measure(rows, NODES, seed=3), measure(other, NODES, seed=3)
    assert one["confusion"] == two["confusion"] and one["router"] == two["router"] and one["by_style"] == two["by_style"]
    assert one["calibration"]["ece"] == pytest.approx(two["calibration"]["ece"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), min_size=1, max_size=8))
def test_perfectly_calibrated_rows_have_no_calibration_error(groups: list[tuple[int, int]]) -> None:
    rows = [row("math", "math" if i < k else "law", float(Fraction(k, m))) for k, m in groups for i in range(m)]
    found = measure(rows, NODES)
    assert found["calibration"]["ece"] == pytest.approx(0, abs=1e-12)
    assert found["calibration"]["mean_probability"] == pytest.approx(found["router"]["accuracy"])


def test_a_sure_and_always_wrong_master_has_the_greatest_calibration_error() -> None:
    found = measure([row("law", "math", 1.0)] * 5, NODES)
    assert found["calibration"]["ece"] == 1 and found["router"]["accuracy"] == 0 and found["router"]["macro_f1"] == 0


def test_the_bootstrap_interval_of_a_perfect_master_is_a_point() -> None:
    found = measure([row(name, name) for name in NODES] * 4, NODES)
    assert found["router"]["macro_f1"] == 1 and found["router"]["macro_f1_interval"] == [1, 1]


def test_the_bootstrap_interval_is_about_as_wide_as_it_should_be() -> None:
    rows = [row(name, name if i % 5 else "law" if name == "math" else "math") for name in ("math", "law") for i in range(200)]
    found = measure(rows, NODES)
    low, high = found["router"]["macro_f1_interval"]
    assert found["router"]["macro_f1"] == pytest.approx(0.8) and low < 0.8 < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 400), rel=0.15), "two even nodes: macro-F1 moves like accuracy"


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        measure([], NODES)


def test_truths_that_are_no_node_are_all_named() -> None:
    with pytest.raises(DataError) as caught:
        measure([row("alchemy", "math"), row("zen", "law"), row("math", "math")], NODES)
    assert "'alchemy', 'zen'" in caught.value.message and "math, law, physics" in caught.value.hint


def test_choices_that_are_no_node_are_named() -> None:
    with pytest.raises(DataError, match="The master chose 'alchemy'"):
        measure([row("math", "alchemy")], NODES)


@pytest.mark.parametrize("nodes", [(), ("math", "law", "math")])
def test_missing_or_double_nodes_are_refused(nodes: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"no nodes|twice: math"):
        measure([row("math", "math")], nodes)


@pytest.mark.parametrize("probability", [math.nan, 1.5, -0.2])
def test_a_probability_that_is_none_is_refused(probability: float) -> None:
    with pytest.raises(DataError, match="expected 0 to 1"):
        measure([row("math", "math", probability)], NODES)


def decided(query: str) -> Decision:
    return Decision(query=query, node="math", chosen="math", token=0, probability=1.0)


def examples(count: int) -> list[Example]:
    return [Example(str(i), NODES[i % 3], lang="fr", style="exam") for i in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.permutations(range(n))))
def test_rows_keep_the_order_of_the_examples_whoever_finishes_first(order: list[int]) -> None:
    async def main() -> list[Row]:
        gates = [asyncio.Event() for _ in order]
        started = 0
        finished: list[int] = []

        async def decide(query: str) -> Decision:
            nonlocal started
            started += 1
            if started == len(order):
                gates[order[0]].set()
            await gates[int(query)].wait()
            finished.append(int(query))
            if len(finished) < len(order):
                gates[order[len(finished)]].set()
            return decided(query)

        rows = await run(decide, examples(len(order)), concurrency=len(order))
        assert finished == list(order)
        return rows

    rows = asyncio.run(main())
    assert [r.decision.query for r in rows] == [str(i) for i in range(len(order))]
    assert [(r.truth, r.lang, r.style) for r in rows] == [(e.node, e.lang, e.style) for e in examples(len(order))]


@pytest.mark.parametrize(("count", "concurrency"), [(9, 1), (9, 4), (3, 8), (0, 2)])
def test_no_more_than_the_allowed_number_run_at_once_and_progress_counts_up(count: int, concurrency: int) -> None:
    running = most = 0
    seen: list[tuple[int, int]] = []

    async def decide(query: str) -> Decision:
        nonlocal running, most
        running += 1
        most = max(most, running)
        turn = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(turn.set_result, None)
        await turn
        running -= 1
        return decided(query)

    rows = asyncio.run(run(decide, examples(count), concurrency=concurrency, progress=lambda done, total: seen.append((done, total))))
    assert len(rows) == count and most == min(count, concurrency)
    assert seen == [(i, count) for i in range(1, count + 1)]


def test_one_failure_cancels_the_rest_and_comes_out_as_it_is() -> None:
    failure = WorkerError("the master is gone")
    started: list[str] = []
    cancelled: list[str] = []

    async def decide(query: str) -> Decision:
        started.append(query)
        if query == "2":
            raise failure
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(query)
            raise
        return decided(query)

    async def main() -> None:
        with pytest.raises(WorkerError) as caught:
            await run(decide, examples(20), concurrency=3)
        assert caught.value is failure
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing runs on"

    asyncio.run(main())
    assert started == ["0", "1", "2"] and sorted(cancelled) == ["0", "1"]


def test_a_cancellation_from_outside_leaves_nothing_running() -> None:
    async def main() -> None:
        begun, cancelled = asyncio.Event(), 0

        async def decide(query: str) -> Decision:
            nonlocal cancelled
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled += 1
            return decided(query)

        task = asyncio.create_task(run(decide, examples(5), concurrency=2))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled >= 1 and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_concurrency_below_one_is_refused() -> None:
    async def decide(query: str) -> Decision:
        return decided(query)

    with pytest.raises(SettingsError, match="at least 1"):
        asyncio.run(run(decide, examples(1), concurrency=0))


def shown(metrics: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(report.table(routes.report(metrics, "T", "c")))
    return out.getvalue()


def test_the_table_shows_summary_nodes_and_worst_confusions(six: dict[str, Any]) -> None:
    text = shown(six)
    assert all(word in text for word in ("router accuracy", "50.0 %", "18.8 to 81.2 %", "physics", " - ", "Worst confusions", "66.7 %"))


def test_the_worst_confusions_are_the_most_frequent_mistakes(six: dict[str, Any]) -> None:
    assert routes.confusions(six) == [("law", "math", 2), ("math", "physics", 1)]
    assert routes.confusions(six, 1) == [("law", "math", 2)]


def test_a_perfect_master_and_names_that_look_like_markup_can_be_shown() -> None:
    metrics = measure([row("[red]", "[red]", lang="a|b")], ("[red]",))
    assert "[red]" in shown(metrics) and "none" in shown(metrics)
    assert "a\\|b" in report.markdown(routes.report(metrics, "T", "c"))


def test_every_markdown_table_is_rectangular(six: dict[str, Any]) -> None:
    blocks = [b.splitlines() for b in report.markdown(routes.report(six, "Two\nlines", "lmgraph eval \\\n  --file x")).split("\n\n")]
    tables = [b for b in blocks if b[0].startswith("|")]
    assert len(tables) == 7 and all(len({line.count("|") for line in t}) == 1 for t in tables)
    assert ["# Two lines"] in blocks and ["    lmgraph eval \\", "      --file x"] in blocks


def test_write_leaves_whole_files_and_nothing_else(six: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "report"
    paths = report.write(routes.report(six, "Routes — 路由 $x$", "lmgraph eval"), folder)
    assert [p.name for p in paths] == ["report.json", "report.md", "confusion.svg", "confusion.png", "calibration.svg", "calibration.png"]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert json.loads(paths[0].read_text(encoding="utf-8")) == {"title": "Routes — 路由 $x$", "command": "lmgraph eval", "metrics": six}
    assert "](confusion.svg)" in paths[1].read_text(encoding="utf-8")
    assert all(p.read_bytes().startswith(PNG if p.suffix == ".png" else b"<?xml") for p in paths[2:])


def test_a_place_that_is_taken_is_an_error_of_ours(six: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="cannot be made"):
        report.write(routes.report(six, "T", "c"), tmp_path / "file")
    (tmp_path / "folder" / "report.json").mkdir(parents=True)
    with pytest.raises(AssetError, match="cannot be written"):
        report.write(routes.report(six, "T", "c"), tmp_path / "folder")


def test_without_matplotlib_pictures_are_left_out_and_the_report_says_how_to_get_them(six: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(six))
    (tmp_path / "confusion.png").write_bytes(b"of an earlier report")
    program = ("import sys; sys.modules['matplotlib'] = None\n"
               "import json, pathlib\nfrom lmgraph.evaluate import report, routes\nfolder = pathlib.Path(sys.argv[1])\n"
               "print([p.name for p in report.write(routes.report(json.loads((folder / 'metrics.json').read_text()), 'T', 'c'), folder)])")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['report.json', 'report.md']"
    assert "pip install 'lmgraph[eval]'" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.png"))
