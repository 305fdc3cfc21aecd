"""The page in a real browser, against a real gateway: what a person does, by mouse and by keyboard, on a desk and on a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import sync_playwright

from conftest import WORDS, serving, toy_queries
from lmgraph.serve import page as files
from test_hops import Upstream

BROWSER = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE_MS = 120_000
"""a browser on a busy machine; every wait ends as soon as its condition holds"""
STORE = "sqlite:///page.db"
WORKER = "{kind: scripted, answers: {'*': \"answer to {}\\n\\n```\\n<img src=x onerror=alert(1)>\\n```\\n\\n<b>end</b>\", broken: '! the court is closed'}, retries: 0}"


@pytest.fixture(scope="module")
def gateway(toy_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of a gateway whose graph has two of the master's three nodes, and an admin's key."""
    folder = tmp_path_factory.mktemp("page")
    nodes = "\n".join(f"  {name}: {{token: {i}, description: about {name}, worker: {WORKER}}}" for i, name in enumerate(WORDS) if name != "health")
    graph = f"version: 1\nmaster: {{bundle: {toy_master}}}\nnodes:\n{nodes}\nedges: {{start: ['*'], math: [law, end]}}\n"
    made = subprocess.run([sys.executable, "-m", "lmgraph", "keys", "create", "tester", "--admin", "--json", "--store", STORE],
                          cwd=folder, capture_output=True, text=True, check=True)
    with serving(graph, folder, store=STORE) as address:
        yield address, json.loads(made.stdout)["secret"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert BROWSER, "chromium is missing, and these tests need a real browser: apt-get install chromium"
    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


class Visit:
    """One tab. `wrong` gathers what must not happen: errors of the console, of scripts and of the CSP, requests that leave the origin."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address, self.wrong, self.refused = address, [], []
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.add_init_script("addEventListener('securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective))")
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("request", lambda request: request.url.startswith(address) or self.wrong.append(f"request: {request.url}"))
        self.load()

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            (self.refused if message.text.startswith("Failed to load resource") else self.wrong).append(message.text)

    def load(self) -> None:
        self.page.goto(self.address)
        self.page.wait_for_selector("body[data-ready]")

    def ask(self, question: str, state: str = "done") -> Any:
        """Ask, wait until the answer is in that state, and give the turn."""
        turns = self.page.locator(".turn").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        turn = self.page.locator(".turn").nth(turns)
        turn.and_(self.page.locator(f"[data-state={state}]")).wait_for()
        return turn

    def use_key(self, key: str) -> None:
        self.page.click("#open-key")
        self.page.fill("#key-field", key)
        self.page.press("#key-field", "Enter")
        self.page.wait_for_selector("#key", state="hidden")

    def nodes(self) -> list[str]:
        return [chip.get_attribute("data-node") for chip in self.page.locator("#nodes button").all()]


@pytest.fixture
def visit(browser: Any, gateway: tuple[str, str]) -> Iterator[Visit]:
    with httpx.Client(base_url=gateway[0], headers={"authorization": f"Bearer {gateway[1]}"}) as http:
        graph = http.get("/v1/graph").json()["graph"]
        made = Visit(browser, gateway[0], viewport={"width": 1280, "height": 800})
        yield made
        made.context.close()
        assert http.put("/v1/graph", json={"graph": graph}).status_code == 200  # as it was, whatever the test did
    assert not made.wrong


QUERY, NODE = next((q, n) for q, n in toy_queries(4) if n == "law")


# ---------------------------------------------------------------- files


def test_files_have_types_tags_and_a_strict_policy() -> None:
    for path in ("/", "/web/app.js", "/web/style.css", "/web/cytoscape.esm.min.mjs", "/web/cytoscape.LICENSE.txt"):
        found = files.find(path)
        assert found and found.body and dict(found.headers)[b"etag"] == found.etag
        policy = dict(found.headers)[b"content-security-policy"].decode()
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert files.find("/web/app.js").kind.startswith(b"text/javascript")  # type: ignore[union-attr]
    for path in ("/web/", "/web/../page.py", "/web/index.html", "/web/nothing.js", "/page.py", ""):
        assert files.find(path) is None


def test_no_file_of_ours_has_inline_script_inline_style_or_reads_html() -> None:
    own = {path: f.body.decode() for path, f in files.FILES.items() if "cytoscape" not in path}
    for path, text in own.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser", " style=\"", "onclick=\""):
            assert word not in text, f"{path} has {word}"
        assert path.endswith(".svg") or ("http:" not in text and "https:" not in text), f"{path} names another server"


def test_the_gateway_serves_the_page_and_knows_what_a_browser_has(gateway: tuple[str, str]) -> None:
    with httpx.Client(base_url=gateway[0]) as http:
        first = http.get("/")
        assert first.status_code == 200 and first.headers["content-type"].startswith("text/html") and "frame-ancestors 'none'" in first.headers["content-security-policy"]
        assert http.get("/web/app.js", headers={"if-none-match": files.find("/web/app.js").etag.decode()}).status_code == 304  # type: ignore[union-attr]
        assert http.get("/web/nothing.js").status_code == 404


# ---------------------------------------------------------------- asking


def test_a_question_lights_its_node_up_and_shows_the_decision_the_walk_and_the_answer(visit: Visit) -> None:
    page = visit.page
    assert visit.nodes() == ["math", "law"]
    turn = visit.ask(QUERY)
    lit = page.locator("#nodes [data-lit]")
    assert lit.count() == 1 and lit.get_attribute("data-node") == NODE == turn.get_attribute("data-node")
    assert page.inner_text("#status").startswith(f"{NODE}, token 1, ") and "%" in page.inner_text("#status")
    assert turn.locator(".bars li[data-chosen=true]").get_attribute("data-node") == NODE
    assert "<fn_1>" in turn.locator(".bars").inner_text() and turn.locator(".bars li").count() == 2
    assert turn.locator(".walk li").count() == 2 and turn.locator(f".walk [data-step={NODE}]").count() == 1
    rewriting = turn.locator(".rewriting")
    assert rewriting.locator("ins, del").count() or QUERY in turn.locator(".answer").inner_text(), "passed on as it was asked"
    assert turn.locator(".answer").inner_text().startswith("answer to ") and "token" in turn.locator(".route").inner_text()


def test_an_answer_is_text_whatever_it_says(visit: Visit) -> None:
    turn = visit.ask(QUERY)
    assert "<img src=x onerror=alert(1)>" in turn.locator(".answer pre").inner_text() and "<b>end</b>" in turn.locator(".answer").inner_text()
    assert turn.locator("img, b, script").count() == 0


def test_the_rewritten_query_stands_beside_the_original_with_what_changed_marked(visit: Visit) -> None:
    decision = {"node": "math", "chosen": "math", "token": 0, "probability": 0.9, "alternatives": [{"node": "math", "probability": 0.9}], "query": "tell me 2+2 now",
                "rewritten": "Compute 2+2 now", "ms": {}, "tokens": {}}
    chunks: list[dict[str, Any]] = [{"choices": [], "lmgraph": {"decision": decision}}, {"model": "lmgraph/math", "choices": [{"delta": {"content": "4"}}]}]
    body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    turn = visit.ask("tell me 2+2 now")
    assert turn.locator(".before").inner_text() == "tell me 2+2 now" and turn.locator(".after").inner_text() == "Compute 2+2 now"
    assert turn.locator("ins").all_inner_texts() == ["Compute"] and "".join(turn.locator("del").all_inner_texts()).split() == ["tell", "me"]


def test_errors_are_sentences_and_the_page_goes_on(visit: Visit) -> None:
    page = visit.page
    page.select_option("#pin", "law")
    turn = visit.ask("broken", "failed")
    assert "the court is closed" in turn.locator(".problem").inner_text()
    visit.context.set_offline(True)
    assert "cannot be reached" in visit.ask("hello", "failed").locator(".problem").inner_text()
    page.wait_for_selector("#notice:not([hidden]) >> text=cannot be reached")
    visit.context.set_offline(False)
    page.wait_for_selector("#notice", state="hidden")
    assert visit.ask("hello").get_attribute("data-node") == "law"


def test_an_answer_in_the_making_can_be_stopped(visit: Visit) -> None:
    asked: list[Any] = []
    visit.page.route("**/v1/chat/completions", lambda route: asked.append(route))  # never answered
    visit.page.fill("#question", "wait")
    visit.page.press("#question", "Enter")
    visit.page.click("#stop")
    visit.page.wait_for_selector(".turn[data-state=stopped]")
    assert asked and visit.page.is_visible("#send") and not visit.page.is_visible("#stop")


def test_a_node_shows_what_it_is_and_can_be_pinned(visit: Visit) -> None:
    page = visit.page
    visit.ask(QUERY)
    page.click("#nodes [data-node=law]")
    page.wait_for_selector(f"#node .last >> text={QUERY}")
    card = page.inner_text("#node")
    assert "about law" in card and "<fn_1>" in card and "scripted" in card
    page.click("#node-pin")
    assert page.get_attribute("#node-pin", "aria-pressed") == "true" and page.input_value("#pin") == "law"
    turn = visit.ask("integral integral matrix")
    assert turn.get_attribute("data-node") == "law" and turn.locator(".bars li").count() == 0
    page.click("#node-pin")
    page.click("#new-chat")  # or the conversation would stay with its node
    assert visit.ask("integral integral matrix").get_attribute("data-node") == "math"


def test_conversations_are_kept_opened_and_deleted(visit: Visit) -> None:
    page = visit.page
    title = f"{QUERY} kept"
    visit.ask(title)
    visit.load()
    assert page.locator(".turn").count() == 1, "the conversation outlives a reload"
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0
    page.click("#open-chats")
    row = page.locator("#chats-list li", has_text=title)
    row.locator(".plain").click()
    page.wait_for_selector(f".turn >> text={title}")
    assert page.locator(".turn .answer").inner_text().startswith("answer to")
    page.click("#open-chats")
    row.get_by_role("button", name="Delete").click()
    row.get_by_role("button", name="Keep it").click()
    row.get_by_role("button", name="Delete").click()
    row.get_by_role("button", name="Delete it").click()
    row.wait_for(state="detached")
    page.wait_for_selector(".turn", state="detached")


# ---------------------------------------------------------------- walks

WALKS = {"answer": {"mode": "walk"}, "edges": {"start": ["law"], "law": ["math"], "math": None}}
"""from law to math, where it ends, whatever the master thinks"""
LINES = "document.getElementById('drawing')._cyreg.cy.edges('%s').map((edge) => edge.id()).sort()"


@pytest.fixture
def patch(gateway: tuple[str, str]) -> Any:
    def patched(**parts: Any) -> None:
        answer = httpx.patch(f"{gateway[0]}/v1/graph", json=parts, headers={"authorization": f"Bearer {gateway[1]}"})
        assert answer.status_code == 200, answer.text

    return patched


def test_a_walk_shows_its_steps_as_they_come_and_who_works(visit: Visit, patch: Any) -> None:
    page = visit.page
    with Upstream("forty nine").running() as math, math.being("hold"):
        url = math.worker.partition("['")[2].partition("']")[0]
        patch(nodes={"math": {"worker": {"kind": "openai", "urls": [url], "model": "m", "answers": None}}, "law": {"rewrite": "never"}}, **WALKS)
        visit.load()
        page.fill("#question", "how many, squared")
        page.press("#question", "Enter")
        page.wait_for_selector(".walk [data-hop='1'].working >> text=math is working")
        first = page.locator(".walk [data-hop='0']")
        assert first.get_attribute("data-step") == "law" and "answered in" in first.inner_text() and page.locator(".answer").inner_text() == ""
        first.locator("summary").click()
        assert "how many, squared" in first.locator(".part").inner_text() and "answer to how many, squared" in first.locator(".part").inner_text()
        lit = page.locator("#nodes [data-lit]")
        assert lit.count() == 1 and lit.get_attribute("data-node") == "math" and page.inner_text("#status") == "math at work, step 2."
        assert page.evaluate(LINES % ".lit") == ["law math next", "start law first"] and page.evaluate(LINES % ".flowing") == ["law math next"]
        math.free.set()
        turn = page.locator(".turn[data-state=done]")
        turn.wait_for()
    assert turn.locator(".answer").inner_text() == "forty nine" and turn.get_attribute("data-node") == "math"
    steps = turn.locator(".walk li[data-step]")
    assert [row.get_attribute("data-step") for row in steps.all()][:3] == ["master", "law", "math"] and turn.locator(".working").count() == 0
    assert f"{steps.count() - 1} steps" in turn.locator(".route").inner_text()
    assert page.inner_text("#status") == f"{steps.count() - 1} steps; math answered." and lit.get_attribute("data-node") == "math"
    visit.load()
    assert page.locator(".turn .walk li").count() == steps.count() > 2 and page.evaluate(LINES % ".lit")[0] == "law math next", "kept, too"


def test_a_step_that_fails_and_one_that_was_not_finished_are_told(visit: Visit) -> None:
    def progress(kind: str, hop: int, **more: Any) -> dict[str, Any]:
        return {"choices": [], "lmgraph": {"progress": {"kind": kind, "hop": hop, "node": ("law", "math", "law")[hop], "request": "x"} | more}}

    decision = {"node": "law", "chosen": "law", "token": 1, "probability": 0.9, "alternatives": [], "query": "x", "rewritten": "x", "ms": {}, "tokens": {}}
    chunks = [{"choices": [], "lmgraph": {"decision": decision}}, {"choices": [], "lmgraph": {"progress": {"kind": "plan", "hops": [{"node": node} for node in ("law", "math", "law")]}}},
              progress("began", 0), progress("began", 1), progress("ended", 0, ms=1500, error="<b>closed</b>", answer="")]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + 'data: {"error": {"message": "math is down"}}\n\n'
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    turn = visit.ask("a plan", "failed")
    rows = [row.inner_text().partition("\n")[0] for row in turn.locator(".walk [data-hop]").all()]
    assert rows == ["law failed after 1.5 s: <b>closed</b>", "math was not finished", "law is planned"]
    assert "math is down" in turn.locator(".problem").inner_text()


@pytest.mark.parametrize(("stopped", "words"), [("end", ""), ("tokens", "limit of tokens reached"), ("loop", "went round")])
def test_it_is_said_why_a_walk_ended_before_its_end(visit: Visit, stopped: str, words: str) -> None:
    trace = {"decision": None, "steps": [{"node": "law", "request": "x", "answer": "y", "hop": 0, "ms": 2, "error": "", "usage": {}}],
             "walk": {"mode": "walk", "stopped": stopped, "hops": [{"node": "law"}]}}
    chunks = [{"model": "lmgraph/law", "choices": [{"delta": {"content": "y"}}]}, {"choices": [], "lmgraph": {"trace": trace}}]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    route = visit.ask("a walk").locator(".route span").all_inner_texts()
    assert "1 step" in route and route[route.index("1 step") + 1:] == ([words] if words else [])


def test_where_every_node_leads_to_every_other_only_what_a_walk_takes_is_drawn(visit: Visit, patch: Any) -> None:
    page = visit.page
    assert page.evaluate(LINES % ".next") == ["math end next", "math law next"]
    patch(nodes={"law": {"rewrite": "never"}}, answer={"mode": "walk", "hops": 2}, edges={"start": ["law"], "law": ["*"], "math": ["*", "end"]})
    visit.load()
    assert page.evaluate(LINES % ".next") == []
    visit.ask("how many, squared")
    assert page.evaluate(LINES % ".next") == ["law math next"]
    page.click("#new-chat")
    assert page.evaluate(LINES % ".next") == []


# ---------------------------------------------------------------- changing the graph


def test_changing_the_graph_needs_a_key_names_problems_and_can_be_undone(visit: Visit, gateway: tuple[str, str]) -> None:
    page = visit.page
    page.click("#open-editor")
    page.select_option("#edit-node", "")
    page.fill("#edit-name", "health")
    page.fill("#edit-node-token", "2")
    page.select_option("#edit-worker-kind", "scripted")
    page.fill("#edit-worker-answers", '{"*": "the doctor on {}"}')
    page.fill("#edit-node-description", "about health")
    page.click("#editor-apply")
    page.wait_for_selector("#editor-problem >> text=button Key")
    page.keyboard.press("Escape")
    visit.use_key(gateway[1])
    page.click("#open-editor")
    page.click("label[for=mode-json]")
    page.fill("#edit-json", '{"nodes": {"health": {"token": 2, "worker": {"kind": "openai"}}}}')
    page.click("#editor-apply")
    page.wait_for_selector("#editor-problem li")
    assert "urls" in page.inner_text("#editor-problem")
    page.fill("#edit-json", "{")
    page.click("#editor-apply")
    page.wait_for_selector("#editor-problem >> text=not JSON")
    page.fill("#edit-json", '{"nodes": {"health": {"token": 2, "description": "about health", "worker": {"kind": "scripted", "answers": {"*": "the doctor on {}"}}}}}')
    page.click("#editor-apply")
    page.wait_for_selector("#editor-done >> text=Saved")
    visit.load()
    assert visit.nodes() == ["math", "law", "health"]
    routed = httpx.post(f"{gateway[0]}/v1/route", json={"queries": [q for q, n in toy_queries(8) if n == "health"]}).json()["data"]
    assert visit.ask(next(d["query"] for d in routed if d["node"] == "health")).get_attribute("data-node") == "health"
    page.click("#open-editor")
    page.click("#editor-undo")
    page.wait_for_selector("#editor-done >> text=Saved")
    assert visit.nodes() == ["math", "law"]


def test_a_form_sends_only_what_was_changed_and_a_newer_version_is_told(visit: Visit, gateway: tuple[str, str]) -> None:
    page, (address, key) = visit.page, gateway
    visit.use_key(key)
    page.click("#nodes [data-node=math]")
    page.click("#node >> text=Edit")
    page.fill("#edit-node-description", "about numbers")
    page.route("**/v1/live", lambda route: route.abort())  # or the page would notice by itself
    changed = httpx.patch(f"{address}/v1/graph", json={"nodes": {"math": {"rewrite": "never"}}}, headers={"authorization": f"Bearer {key}"})
    assert changed.status_code == 200
    page.click("#editor-apply")
    page.wait_for_selector("#editor-problem >> text=is loaded now")
    page.click("#editor-apply")
    page.wait_for_selector("#editor-done >> text=Saved")
    node = httpx.get(f"{address}/v1/graph").json()["graph"]["nodes"]["math"]
    assert node["description"] == "about numbers" and node["rewrite"] == "never"


def test_edges_and_nodes_can_be_removed_by_form(visit: Visit, gateway: tuple[str, str]) -> None:
    page, (address, key) = visit.page, gateway
    visit.use_key(key)
    page.click("#open-editor")
    page.click("label[for=mode-edges]")
    page.select_option("#edit-from", "math")
    page.uncheck("input[value=law]")
    page.click("#editor-apply")
    page.wait_for_selector("#editor-done >> text=Saved")
    assert httpx.get(f"{address}/v1/graph").json()["graph"]["edges"]["math"] == ["end"]
    page.click("label[for=mode-node]")
    page.select_option("#edit-node", "law")
    page.click("#editor-remove")
    page.click("#editor-sure")
    page.wait_for_selector("#editor-done >> text=Saved")
    assert visit.nodes() == ["math"]
    page.click("#editor-undo")
    page.wait_for_selector("#editor-done >> text=Saved")
    assert visit.nodes() == ["math", "law"]


# ---------------------------------------------------------------- by keyboard, on a phone


def test_everything_is_reached_by_keyboard_alone(visit: Visit) -> None:
    page = visit.page

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.dataset.node || document.activeElement.className")

    page.focus(".skip")
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(focused())
    wanted = ["new-chat", "open-chats", "open-editor", "open-key", "fit", "math", "log", "question", "pin"]
    assert order == wanted
    page.keyboard.press("Shift+Tab")
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn[data-state=done]")
    page.focus("#nodes [tabindex='0']")
    page.keyboard.press("ArrowRight")
    assert focused() == "law"
    page.keyboard.press("Enter")
    page.wait_for_selector("#node:not([hidden])")
    assert page.inner_text("#node-name") == "law" and focused() == "node"
    page.keyboard.press("Escape")
    assert page.is_hidden("#node") and focused() == "law"
    page.focus("#open-chats")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chats[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#chats", state="hidden")
    assert focused() == "open-chats"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, gateway: tuple[str, str], scheme: str) -> None:
    visit = Visit(browser, gateway[0], viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme, reduced_motion="reduce")
    page = visit.page
    visit.ask(f"{QUERY} {'x' * 200}")
    page.tap("#nodes [data-node=law]")
    page.wait_for_selector("#node:not([hidden])")
    for opener in ("", "#open-chats", "#open-editor", "#open-key"):
        if opener:
            page.tap(opener)
        widest = page.evaluate("Math.max(document.documentElement.scrollWidth, ...[...document.querySelectorAll('dialog[open]')].map(d => d.scrollWidth))")
        assert widest <= 360, opener
        if opener:
            page.keyboard.press("Escape")
    visit.context.close()
    assert not visit.wrong
