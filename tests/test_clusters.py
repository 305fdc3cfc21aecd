"""Values, names and the command that renders: what is refused and in which words, what a folder looks like, and what real servers say."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import xllamacpp
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmgraph import cli, graphfile
from lmgraph.assets import CATALOGUE
from lmgraph.cli import clusters
from lmgraph.errors import DataError, UserError
from lmgraph.kubernetes import decided, memory, names, plan, reading, render, serving
from lmgraph.kubernetes.engines import ENGINES, LLAMACPP
from lmgraph.kubernetes.values import Values, Worker

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
KNOWN = decided.Known(frozenset({"mmlu"}))
HUB = "{kind: openai, model: org/base, urls: ['http://localhost:8000/v1']}"


def graph(extra: str = "", **workers: str) -> str:
    """graph.yaml of these nodes: name -> worker."""
    nodes = "".join(f"  {name}: {{token: {i}, description: d, worker: {worker}}}\n" for i, (name, worker) in enumerate(workers.items()))
    return f"version: 1\n{extra}nodes:\n{nodes}edges: {{start: ['*']}}\n"


def made(text: str, values: str = "", known: decided.Known = KNOWN) -> decided.Plan:
    return plan.make(graphfile.loads(text), reading.read(values), known)


def problems(text: str, values: str = "", known: decided.Known = KNOWN) -> list[str]:
    """What is wrong, without the dashes in front."""
    with pytest.raises(DataError) as caught:
        made(text, values, known)
    first, *rest = caught.value.message.splitlines()
    assert first == f"Nothing was rendered: {len(rest)} problem{'s' if len(rest) != 1 else ''}:" and "lmgraph kubernetes values" in caught.value.hint
    return [line.removeprefix("  - ") for line in rest]


def said(text: str, values: str = "", known: decided.Known = KNOWN) -> str:
    """The one thing that is wrong."""
    found = problems(text, values, known)
    assert len(found) == 1, found
    return found[0]


SMALL = graph(a="{kind: embedded, model: smollm2-135m}")


# --- names ---


@given(st.text(max_size=200), st.integers(8, 63))
@SLOW
def test_any_text_becomes_a_dns_label_and_a_label_stays_as_it_is(text: str, most: int) -> None:
    made_ = names.label(text, most)
    assert names.is_label(made_, most) and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", made_) and len(made_) <= most
    assert names.label(made_, most) == made_ and names.label(text, most) == made_


@given(st.lists(st.text(alphabet="ab-_. ", max_size=6), max_size=8))
@SLOW
def test_collisions_are_exactly_the_texts_that_share_a_label(texts: list[str]) -> None:
    found = names.collisions(texts)
    assert all(len(those) > 1 and {names.label(text) for text in those} == {label} for label, those in found)
    together = {text for _, those in found for text in those}
    alone = [names.label(text) for text in dict.fromkeys(texts) if text not in together]
    assert len(alone) == len(set(alone)) and not set(alone) & {label for label, _ in found}


def test_long_texts_that_differ_only_at_their_end_become_different_labels() -> None:
    one, two = names.label("a" * 60 + "x"), names.label("a" * 60 + "y")
    assert one != two and len(one) == len(two) == names.PART


@pytest.mark.parametrize(("quantity", "size"), [("512", 512), ("1k", 1000), ("3Mi", 3 * 2**20), ("1.5Gi", 1.5 * 2**30), ("2T", 2e12)])
def test_quantities_of_memory_are_read_as_kubernetes_does(quantity: str, size: float) -> None:
    assert memory.size(quantity) == size


# --- values ---


def test_the_printed_values_are_the_defaults_and_leave_none_out() -> None:
    text = clusters.defaults()
    draft = reading.read(text)
    assert draft.values == Values() == reading.read("").values and not draft.reader.problems
    data = yaml.safe_load(text)

    def same(kind: Any, row: dict[str, Any]) -> None:
        assert list(row) == [field.name for field in dataclasses.fields(kind)]
        for name, value in row.items():
            if dataclasses.is_dataclass(getattr(kind, name)):
                same(getattr(kind, name), value)

    same(Values(), data)


def test_the_worker_in_the_comments_of_the_values_is_a_worker_with_all_its_fields_at_their_defaults() -> None:
    comments = re.search(r"workers: \{\}\n#.*\n((#.*\n)+)", clusters.defaults())
    assert comments
    text = "workers:\n" + "".join(f"{line[2:]}\n" for line in comments[1].splitlines())
    draft = reading.read(text)
    assert not draft.reader.problems
    (worker,) = draft.values.workers.values()
    assert list(yaml.safe_load(text)["workers"]["chat"]) == [field.name for field in dataclasses.fields(Worker)]
    usual = dataclasses.replace(worker, engine="", base="", nodes=(), adapters={})
    assert usual == Worker()


def test_every_engine_and_its_image_is_in_the_printed_values() -> None:
    for name, engine in ENGINES.items():
        assert f"{name}: {engine.image}" in clusters.defaults()


JUNK = st.recursive(st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.text(max_size=5) | st.floats(allow_nan=False),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
KEYS = st.sampled_from([field.name for field in dataclasses.fields(Values)])


@given(st.dictionaries(KEYS, JUNK, max_size=4))
@SLOW
def test_values_of_any_shape_are_read_or_refused_in_words(data: dict[str, Any]) -> None:
    draft = reading.read(json.dumps(data))
    assert all("values.yaml line 1: " in problem for problem in draft.reader.problems)
    if not draft.reader.problems:
        assert isinstance(draft.values, Values)


@pytest.mark.parametrize(("values", "words"), [
    ("nmae: x", "line 1: nmae: unknown key; valid: name, namespace"),
    ("name: Big_Name", "'Big_Name' is no DNS label of at most 20"),
    ("name: a-name-of-more-than-twenty-letters", "no DNS label of at most 20"),
    ("namespace: -x", "no DNS label of at most 63"),
    ("serving: serverless", "found 'serverless'; valid: deployment, kserve, knative"),
    ("images: {gateway: lmgraph}", "images.gateway: found 'lmgraph', expected an image with a pinned tag"),
    ("images: {redis: 'redis:latest'}", "pinned tag (not latest)"),
    ("gateway: {replicas: {min: 0, max: 2}}", "gateway.replicas.min: found 0, expected 1 to"),
    ("gateway: {replicas: {min: 5, max: 2}}", "found 2, expected at least 5 (min is 5)"),
    ("gateway: {resources: {limits: {memory: lots}}}", "found 'lots', expected a quantity"),
    ("gateway: {env: {OPENAI_API_KEY: sk-1}}", "looks like a secret, which is never written"),
    ("gateway: {env: {PIP_INDEX_URL: 'https://me:pw@host/simple'}}", "a URL with a password in it"),
    ("gateway: {env: {'a b': x}}", "no name of an environment variable"),
    ("gateway: {env: {DEBUG: true}}", "expected text; put it in quotes"),
    ("gateway: {tolerations: [x]}", "expected a list of mappings"),
    ("gateway: {weights: stolen}", "valid: fetch, baked"),
    ("redis: {kind: url, url: 'redis://:pw@h:6379/0'}", "without a password"),
    ("redis: {kind: url}", "expected redis://HOST:PORT/0"),
    ("redis: {kind: secret, secret: {secret: '', key: ''}}", "needs the name of a Secret and a key"),
    ("secrets: {LAW_KEY: {secret: s}}", "secrets.LAW_KEY: needs the name of a Secret and a key"),
    ("scaling: {kind: keda}\nmonitoring: {kind: operator}", "expected the URL at which KEDA reaches Prometheus"),
    ("scaling: {kind: keda, prometheus: 'http://p'}", "nothing tells Prometheus of us"),
    ("scaling: {cpu: 0, memory: 0}", "scales by cpu or memory, and both are 0"),
    ("expose: {kind: ingress, host: h, controller: c}", "expose.tls_secret: kind ingress needs it"),
    ("expose: {kind: route, host: h, controller: c}", "needs the name of its Gateway"),
    ("expose: {kind: route, host: h, controller: c, gateway: {name: g}, paths: [v1]}", "found 'v1', expected a path"),
    ("network: {fetch: [everywhere]}", "expected an address block"),
    ("monitoring: {kind: operator, key: {secret: ''}}", "monitoring.key: needs the name of a Secret"),
    ("workers: {w: {engine: tgi, base: b}}", "workers.w.engine: found 'tgi'; valid: llamacpp, vllm, lorax, external"),
    ("[]", "found a list, expected a mapping"),
])
def test_a_value_that_cannot_be_used_is_named_with_its_line(values: str, words: str) -> None:
    draft = reading.read(values)
    assert any(words in problem and problem.startswith("values.yaml line ") for problem in draft.reader.problems), draft.reader.problems
    with pytest.raises(DataError, match="Nothing was rendered"):
        made(SMALL, values)


def test_what_is_no_yaml_is_refused_with_its_line_and_the_command_that_shows_the_form() -> None:
    with pytest.raises(DataError, match=r"values\.yaml cannot be read as YAML: line 2") as caught:
        reading.read("name: x\n  y: z")
    assert "lmgraph kubernetes values" in caught.value.hint


# --- graph and values together ---


def test_all_problems_are_said_at_once() -> None:
    text = graph(a=HUB, b="{kind: openai, model: m, urls: [https://h/v1], key_env: B_KEY}", c="{kind: embedded, model: c.gguf}",
                 d="{kind: openai, model: n, urls: [https://h/v1]}")
    values = "name: X\nworkers:\n  Big: {engine: llamacpp, base: smollm2-135m, gpus: 1}\n  odd: {engine: nothing, base: n}\nscaling: {kind: keda}"
    found = "\n".join(problems(text, values))
    for words in ("name: 'X' is no DNS label", "workers.Big: 'Big' is no DNS label", "gpus: found 1, and llamacpp", "found 'nothing'; valid", "KEDA reaches",
                  "nothing tells Prometheus", "no node names the model 'smollm2-135m'", "node 'a' is asked at http://localhost", "B_KEY has no Secret", "c.gguf"):
        assert words in found, words


def test_a_gpu_on_the_cpu_engine_and_none_on_a_gpu_engine_are_refused() -> None:
    assert "llamacpp is a server on CPU here" in said(SMALL, "workers: {w: {engine: llamacpp, base: smollm2-135m, gpus: 2}}")
    assert "vllm needs at least one" in said(graph(a=HUB), "workers: {w: {engine: vllm, base: org/base, gpus: 0}}")


@pytest.mark.parametrize("adapter", ["{path: org/law, base: other/base}", "./law"])
def test_an_adapter_of_another_base_is_refused_whether_values_say_so_or_its_own_file(adapter: str) -> None:
    known = decided.Known(KNOWN.bundles, {"./law": "other/base"})
    words = said(graph(law=HUB), f"workers: {{w: {{engine: vllm, base: org/base, adapters: {{law: {adapter}}}}}}}\nfiles: {{claim: c}}", known)
    assert "is an adapter on other/base, and the base here is org/base" in words and "workers.w.adapters.law" in words


def test_two_models_that_become_one_name_are_refused_with_their_nodes() -> None:
    text = graph(a="{kind: embedded, model: my_model.gguf}", b="{kind: embedded, model: my-model.gguf}")
    words = said(text, "files: {claim: c}")
    assert "would all be called 'my-model-gguf': ./my_model.gguf (nodes a), ./my-model.gguf (nodes b)" in words


def test_nodes_that_name_one_file_in_two_ways_share_it() -> None:
    text = graph(a="{kind: embedded, model: models/m.gguf}", b="{kind: embedded, model: ./models/../models/m.gguf}")
    (worker,) = made(text, "files: {claim: c}").workers
    assert worker.nodes == ("a", "b") and worker.place == "/files/models/m.gguf" and worker.files


def test_a_model_whose_name_is_taken_is_refused() -> None:
    text = graph(a="{kind: embedded, model: smollm2-135m}", b="{kind: embedded, model: qwen2.5-coder-1.5b}")
    assert "would be called 'smollm2-135m', which is taken" in said(text, "workers: {smollm2-135m: {engine: llamacpp, base: qwen2.5-coder-1.5b}}")
    assert "is a name of our own" in said(SMALL, "workers: {redis: {engine: llamacpp, base: smollm2-135m}}")


@pytest.mark.parametrize(("workers", "words"), [
    ("w: {engine: vllm, base: org/base, nodes: [nobody]}", "'nobody' is no node; valid: a, b, c"),
    ("w: {engine: vllm, base: org/base, nodes: [c]}", "node 'c' is scripted, which no server answers for"),
    ("w: {engine: external, nodes: [b]}", "node 'b' is embedded, which no server answers for"),
    ("w: {engine: vllm, base: org/base}, v: {engine: lorax, base: org/base}", "node 'a' is in workers.w already"),
    ("w: {engine: vllm, base: org/unknown}", "no node names the model 'org/unknown'; list its nodes, or take one of: org/base, smollm2-135m"),
    ("w: {engine: vllm, base: smollm2-135m, nodes: [a]}", "vllm takes a hub id or a ./folder"),
    ("w: {engine: llamacpp, base: org/base}", "expected a GGUF file or one of: smollm2-135m"),
    ("w: {engine: llamacpp, base: smollm2-135m, adapters: {b: org/x}}", "expected ./file.gguf beside the graph"),
    ("w: {engine: vllm, base: org/base, replicas: {min: 0, max: 1}}", "with hpa nothing wakes it"),
    ("w: {engine: vllm, base: org/base, cache: {access: ReadWriteOnce}}", "is for one node, and there may be 4 pods"),
    ("w: {engine: vllm, base: org/base, cache: {access: ReadWriteMany, claim: c}}", "leave one of them out"),
    ("w: {engine: vllm, base: org/base, adapters: {a: {base: x}}}", "needs its path"),
])
def test_workers_that_do_not_fit_the_graph_are_refused(workers: str, words: str) -> None:
    text = graph(a=HUB.replace("localhost", "elsewhere.example"), b="{kind: embedded, model: smollm2-135m}", c="{kind: scripted, answers: {'*': x}}")
    assert any(words in problem for problem in problems(text, f"workers: {{{workers}}}")), problems(text, f"workers: {{{workers}}}")


@pytest.mark.parametrize(("worker", "words"), [
    ("{kind: openai, model: m, urls: ['http://127.0.0.1:1/v1']}", "is the gateway's own pod"),
    ("{kind: openai, model: m, urls: ['http://me:pw@h/v1']}", "has a password in its URL"),
    ("{kind: openai, model: m, urls: ['http://h:port/v1']}", "is no URL"),
    ("{kind: openai, model: m, urls: [https://h/v1], key_env: MY_KEY}", "MY_KEY has no Secret; name it: MY_KEY: {secret: NAME, key: KEY}"),
    ("{kind: embedded, model: /home/me/m.gguf}", "/home/me/m.gguf, which does not lie in the graph's folder"),
    ("{kind: embedded, model: ../m.gguf}", "does not lie in the graph's folder"),
    ("{kind: embedded, model: m.gguf}", "no container sees what lies beside the graph: m.gguf"),
    ("{kind: embedded, model: gemma-3-270m}", "comes under the Gemma Terms of Use"),
])
def test_what_runs_on_a_laptop_only_is_refused_with_what_to_do(worker: str, words: str) -> None:
    values = "files: {claim: c}" if words.startswith(("/", "does")) else ""
    assert any(words in problem for problem in problems(graph(a=worker), values)), problems(graph(a=worker), values)


def test_quantities_that_are_not_said_stay_as_they_are() -> None:
    found = reading.read("gateway: {resources: {limits: {memory: 4Gi}}}").values.gateway.resources
    assert found.limits == {"cpu": "2", "memory": "4Gi"} and found.requests == Values().gateway.resources.requests
    (server,) = render.files(made(SMALL, "workers: {w: {engine: llamacpp, base: smollm2-135m, resources: {limits: {cpu: 8}}}}"))["worker-w.yaml"][0]["spec"]["template"]["spec"]["containers"]
    assert server["resources"] == {"requests": dict(LLAMACPP.requests), "limits": {**LLAMACPP.limits, "cpu": "8"}}


def test_the_features_that_knative_must_have_are_those_that_the_pods_use() -> None:
    values = "serving: knative\nworkers: {w: {engine: llamacpp, base: smollm2-135m, CACHE node_selector: {a: b}}}"
    (plain,), (kept,) = (made(SMALL, values.replace("CACHE", cache)).workers for cache in ("", "cache: {access: ReadWriteMany},"))
    usual = ["fieldref", "init-containers", "nodeselector", "securitycontext"]
    assert serving.features(Values(), plain) == [f"kubernetes.podspec-{feature}" for feature in usual]
    assert serving.features(Values(), kept) == sorted(f"kubernetes.podspec-{feature}" for feature in [*usual, "persistent-volume-claim", "persistent-volume-write"])
    assert serving.features(Values(), made(SMALL).workers[0]) == []


def test_a_licence_is_accepted_by_the_operator_and_passed_on() -> None:
    values = "workers: {g: {engine: llamacpp, base: gemma-3-270m, accept_licence: true}}"
    found = render.files(made(graph(a="{kind: embedded, model: gemma-3-270m}"), values))
    (pull,) = found["worker-g.yaml"][0]["spec"]["template"]["spec"]["initContainers"]
    assert pull["command"][-3:] == ["pull", "gemma-3-270m", "--accept-licence"]


def test_a_master_and_adapters_beside_the_graph_are_read_from_the_claim() -> None:
    text = graph("master: {bundle: bundles/mine}\n", a="{kind: embedded, model: smollm2-135m}").replace("description: d,", "description: d, adapter: runs/a.gguf,")
    found = made(text, "files: {claim: c, path: /data}")
    data = yaml.safe_load(found.graph)
    assert data["master"]["bundle"] == "/data/bundles/mine" and data["nodes"]["a"]["adapter"] == "/data/runs/a.gguf" and found.files
    assert "bundles/mine, runs/a.gguf" in said(text)


def test_a_master_that_is_a_file_needs_no_fetching() -> None:
    assert not made(graph("master: {bundle: m.gguf}\n", a="{kind: embedded, model: smollm2-135m}"), "files: {claim: c}").fetches
    assert made(SMALL).fetches and not made(SMALL, "gateway: {weights: baked}").fetches


def test_a_masters_server_is_reached_with_its_key_and_needs_no_weights_at_the_gateways() -> None:
    text = graph("master: {bundle: mmlu, server: 'http://10.1.2.3:8080', key_env: MASTER_KEY}\n", a="{kind: embedded, model: smollm2-135m}")
    secrets = "secrets: {MASTER_KEY: {secret: s, key: k}}"
    found = made(text, secrets)
    assert not found.fetches and found.outside == (("10.1.2.3", 8080),) and found.keys["MASTER_KEY"].secret == "s"
    assert "MASTER_KEY has no Secret" in said(text)
    assert "the master is asked at http://localhost:1, which in a cluster is the gateway's own pod" in said(text.replace("10.1.2.3:8080", "localhost:1"), secrets)
    assert "the graph has a server for its master already" in said(text, f"master: {{served: true}}\n{secrets}")


def test_a_served_master_brings_the_adapters_of_nodes_and_a_bundle_beside_the_graph() -> None:
    text = graph("master: {bundle: bundles/mine}\n", a="{kind: embedded, model: smollm2-135m}").replace("description: d,", "description: d, adapter: runs/a.gguf,")
    known = decided.Known(KNOWN.bundles, masters={"bundles/mine": ("mine-1.gguf", "mine-walk.gguf")})
    found = made(text, "files: {claim: c, path: /data}\nmaster: {served: true}", known)
    served = found.workers[-1]
    assert served.place == "/models/masters/mine-1.gguf" and served.pull == ("--bundle", "/data/bundles/mine") and served.files
    assert [adapter.place for adapter in served.adapters] == ["/models/masters/mine-walk.gguf", "/data/runs/a.gguf"]
    (pull,) = render.files(found)["worker-master.yaml"][0]["spec"]["template"]["spec"]["initContainers"]
    assert {"name": "files", "mountPath": "/data", "readOnly": True} in pull["volumeMounts"]


def test_a_served_master_on_gpus_needs_a_build_for_them() -> None:
    assert "master.gpus needs a build of llama.cpp for GPUs" in said(SMALL, "master: {served: true, gpus: 1}")


def test_a_graph_that_no_config_map_holds_is_refused() -> None:
    text = graph(a=f"{{kind: embedded, model: smollm2-135m, system: {'x' * 1_000_001}}}")
    assert "a ConfigMap holds at most 1,000,000" in said(text)


def test_adapters_of_llamacpp_are_started_with_and_named_by_their_place() -> None:
    values = "workers: {w: {engine: llamacpp, base: ./m.gguf, adapters: {a: ./loras/a.gguf}}}\nfiles: {claim: c}"
    found = made(graph(a="{kind: embedded, model: m.gguf}", b="{kind: embedded, model: m.gguf, temperature: 0.7}"), values)
    data = yaml.safe_load(found.graph)["nodes"]
    assert data["a"]["worker"]["adapter"] == "/files/loras/a.gguf" and "adapter" not in data["b"]["worker"]
    assert data["a"]["worker"]["dialect"] == data["b"]["worker"]["dialect"] == "llamacpp"
    assert (data["a"]["worker"]["temperature"], data["b"]["worker"]["temperature"]) == (0.0, 0.7)
    (server,) = render.files(found)["worker-w.yaml"][0]["spec"]["template"]["spec"]["containers"]
    assert server["args"][server["args"].index("--lora") + 1] == "/files/loras/a.gguf" and "--lora-init-without-apply" in server["args"]


def test_an_embedded_model_needs_no_word_in_the_values_and_is_fetched_once_for_all_its_nodes() -> None:
    found = made(graph(a="{kind: embedded, model: smollm2-135m}", b="{kind: embedded, model: smollm2-135m}"))
    (worker,) = found.workers
    assert (worker.engine, worker.nodes, worker.pull) == (LLAMACPP, ("a", "b"), ("smollm2-135m",))
    assert worker.place.endswith(CATALOGUE["smollm2-135m"].file)


NAMES = st.lists(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda n: n not in ("start", "end")), min_size=1, max_size=6, unique=True)
WORKERS = st.sampled_from(["{kind: embedded, model: smollm2-135m}", "{kind: embedded, model: qwen2.5-coder-1.5b, system: s}",
                           "{kind: openai, model: m, urls: [https://api.example.com/v1], timeout_s: 9}", "{kind: scripted, answers: {'*': x}}"])


@given(st.data())
@SLOW
def test_any_graph_of_workers_that_need_nothing_is_rendered_and_reads_as_the_same_graph(data: st.DataObject) -> None:
    nodes = {name: data.draw(WORKERS) for name in data.draw(NAMES)}
    text = graph(**nodes)
    found = made(text)
    before, after = graphfile.loads(text), graphfile.loads(found.graph)
    assert (list(after.nodes), after.edges, after.master) == (list(before.nodes), before.edges, before.master)
    owned = [node for worker in found.workers for node in worker.nodes]
    assert sorted(owned) == sorted(name for name, node in before.nodes.items() if node.worker.kind == "embedded")
    assert all(after.nodes[name].worker == before.nodes[name].worker for name in before.nodes if name not in owned)
    assert len({worker.name for worker in found.workers}) == len(found.workers) == len({before.nodes[name].worker.model for name in owned})


# --- the command ---


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["kubernetes", *arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.yaml").write_text(SMALL)
    return tmp_path


def test_a_folder_is_made_with_a_kustomization_that_names_every_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("render", "--out", "out") == 0
    kustomization = yaml.safe_load((here / "out" / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == sorted(p.name for p in (here / "out").iterdir() if p.name != "kustomization.yaml")
    output = capsys.readouterr()
    assert output.out == "" and "kubectl apply -k out" in output.err and "lmgraph-redis (password)" in output.err
    assert sorted(p.name for p in here.iterdir()) == ["graph.yaml", "out"]


def test_a_folder_is_rendered_again_whole_and_old_files_go(here: Path) -> None:
    assert run("render", "--out", "out") == 0
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}
    (here / "v.yaml").write_text("workers: {other: {engine: llamacpp, base: smollm2-135m}}")
    assert run("render", "-f", "v.yaml", "--out", "out") == 0
    found = {p.name for p in (here / "out").iterdir()}
    assert "worker-other.yaml" in found and "worker-smollm2-135m.yaml" not in found
    assert run("render", "--out", "out") == 0
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before


def test_a_folder_with_files_of_somebody_else_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    (here / "out" / "patch.yaml").write_text("mine: true\n")
    assert run("render", "--out", "out") == 2
    assert "out holds what was not rendered: patch.yaml" in capsys.readouterr().err
    assert [p.name for p in (here / "out").iterdir()] == ["patch.yaml"]


def test_nothing_is_printed_and_nothing_written_when_anything_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "v.yaml").write_text("name: No_Label\nnamespace: Neither")
    for arguments in (["-f", "v.yaml"], ["-f", "v.yaml", "--out", "out"], ["-f", "absent.yaml"], ["--out", "out", "--json"]):
        assert run("render", *arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("Error: ") and "Traceback" not in output.err
    assert not (here / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error_and_the_old_one_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters.write(here / "out", {"a.yaml": "# M\n1"}, "# M")
    (here / "file").write_text("x")
    with pytest.raises(Exception, match="cannot be written"):
        clusters.write(here / "file" / "out", {"a.yaml": "# M\n1"}, "# M")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    real, calls = clusters.os.replace, []

    def second(source: Any, target: Any) -> None:
        calls.append(target)
        real(source, target) if len(calls) != 2 else stop()

    monkeypatch.setattr(clusters.os, "replace", second)
    with pytest.raises(KeyboardInterrupt):
        clusters.write(here / "out", {"b.yaml": "# M\n2"}, "# M")
    assert sorted(p.name for p in here.iterdir()) == ["file", "graph.yaml", "out"] and (here / "out" / "a.yaml").read_text() == "# M\n1"


def test_json_is_one_list_of_the_same_objects(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("render", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert run("render") == 0
    assert (listed["kind"], listed["items"]) == ("List", list(yaml.safe_load_all(capsys.readouterr().out)))


def test_the_defaults_are_printed_and_can_be_given_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("values") == 0
    text = capsys.readouterr().out
    (here / "v.yaml").write_text(text)
    assert run("render", "-f", "v.yaml") == 0
    given_back = capsys.readouterr().out
    assert run("render") == 0
    assert capsys.readouterr().out == given_back


def test_an_adapter_that_lies_beside_the_graph_says_its_base_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "graph.yaml").write_text(graph(law=HUB))
    (here / "law").mkdir()
    (here / "v.yaml").write_text("workers: {w: {engine: vllm, base: org/base, adapters: {law: ./law}}}\nfiles: {claim: c}")
    config = here / "law" / "adapter_config.json"
    for content, words in (('{"base_model_name_or_path": "other/base"}', "is an adapter on other/base"), ("{", "says no base_model_name_or_path")):
        config.write_text(content)
        assert run("render", "-f", "v.yaml") == 2
        assert words in capsys.readouterr().err
    config.write_text('{"base_model_name_or_path": "org/base"}')
    assert run("render", "-f", "v.yaml") == 0


def test_a_wrong_graph_is_a_graph_error_with_all_its_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "graph.yaml").write_text("version: 1\nnodes: {a: {token: x}}\nedges: {}\n")
    assert run("render") == 2
    assert "line 2: nodes.a.token" in capsys.readouterr().err


def test_writing_refuses_before_it_touches_anything(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "odd").mkdir()
    with pytest.raises(UserError, match="odd"):
        clusters.write(here / "out", {"a.yaml": "# M\n"}, "# M")


# --- what is said about llama.cpp is true of the real one ---


def test_a_real_llama_server_has_the_probes_and_gauges_that_are_rendered_and_drains_by_them(toy_base: Path) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = str(toy_base)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup, params.fit_params = 512, 1, -1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    try:
        address = server.listening_address
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            page = client.get("/metrics").text
            assert all(re.search(rf"^{gauge} 0", page, re.MULTILINE) for gauge in (LLAMACPP.waiting, LLAMACPP.running)), page

            def busy() -> bool:
                line = LLAMACPP.drain.replace("http://127.0.0.1:8080", address)
                assert line != LLAMACPP.drain
                return subprocess.run(["sh", "-c", line], capture_output=True, check=False, timeout=60).returncode == 0

            assert not busy()
            done = threading.Event()

            def ask() -> None:
                body = {"messages": [{"role": "user", "content": "count"}], "max_tokens": 100, "ignore_eos": True}
                while not done.is_set():
                    httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300, trust_env=False)

            asking = threading.Thread(target=ask)
            asking.start()
            try:
                wait_for(busy)
            finally:
                done.set()
                asking.join()
            wait_for(lambda: not busy())
    finally:
        del server


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
    raise AssertionError("it never came")
