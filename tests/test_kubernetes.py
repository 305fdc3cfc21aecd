"""From graph.yaml to manifests: golden files, published schemas, a policy, references between objects, kubectl, and what lmgraph takes."""

from __future__ import annotations

import functools
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from lmgraph import bundles, cli, graphfile
from lmgraph import settings as environment
from lmgraph.adapters import walk_path
from lmgraph.cli import clusters
from lmgraph.errors import SettingsError
from lmgraph.graph import Graph
from lmgraph.kubernetes import decided, gateway, plan, reading, render
from lmgraph.serve.metrics import Metrics

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "kubernetes"
HERE = "examples/kubernetes"
EXAMPLES = {  # name -> (graph, values); '': the built-in graph, the defaults
    "builtin": ("", ""),
    "mixed": ("examples/mixed.yaml", "examples/values.yaml"),
    "external": (f"{HERE}/external.yaml", f"{HERE}/external.values.yaml"),
    "vllm": (f"{HERE}/adapters.yaml", f"{HERE}/vllm.values.yaml"),
    "lorax": (f"{HERE}/adapters.yaml", f"{HERE}/lorax.values.yaml"),
    "zero": ("", f"{HERE}/zero.values.yaml"),
    "knative": ("examples/mixed.yaml", f"{HERE}/knative.values.yaml"),
    "served": ("", f"{HERE}/served.values.yaml"),
}
VERSIONS = kubernetes_validate.latest_version(), *[v for v in utils.all_versions()[-3:-1]]
Object = dict[str, Any]


def graph_of(path: str) -> Graph:
    from lmgraph.files import builtin_graph

    return graphfile.loads((ROOT / path).read_text(encoding="utf-8") if path else builtin_graph())


def made(graph: str, values: str) -> dict[str, list[Object]]:
    draft = reading.read((ROOT / values).read_text(encoding="utf-8") if values else "")
    return render.files(plan.make(graph_of(graph), draft, known(graph)))


def known(graph: str) -> decided.Known:
    return decided.Known(frozenset(bundles.builtin()), masters=clusters.masters(graph_of(graph).master.bundle, None))


@functools.cache
def text_of(name: str) -> str:
    """An example as it is printed."""
    return render.stream(made(*EXAMPLES[name]))


@functools.cache
def _objects(name: str) -> str:
    return json.dumps([found for found in yaml.safe_load_all(text_of(name)) if found])


def objects(name: str) -> list[Object]:
    """The objects of an example, read back from what is printed."""
    found: list[Object] = json.loads(_objects(name))
    return found


def pod_of(found: Object) -> Object | None:
    """The pod template of whatever runs pods, with its labels under `labels`."""
    spec = found.get("spec", {})
    if found["kind"] == "InferenceService":
        pod = dict(spec["predictor"])
        return {"labels": pod.pop("labels"), **{k: v for k, v in pod.items() if k not in ("minReplicas", "maxReplicas")}}
    if "template" not in spec:
        return None
    pod = {k: v for k, v in spec["template"]["spec"].items() if k not in ("timeoutSeconds", "containerConcurrency")}
    return {"labels": spec["template"]["metadata"]["labels"], **pod}


def pods(name: str) -> list[tuple[Object, Object]]:
    return [(found, pod) for found in objects(name) if (pod := pod_of(found))]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def one(name: str, kind: str, called: str) -> Object:
    found = [o for o in objects(name) if o["kind"] == kind and o["metadata"]["name"] == called]
    assert len(found) == 1, [(o["kind"], o["metadata"]["name"]) for o in objects(name)]
    return found[0]


def graph_in(name: str) -> Object:
    """graph.yaml as the gateways read it."""
    data: Object = yaml.safe_load(next(o for o in objects(name) if o["kind"] == "ConfigMap" and "graph.yaml" in o["data"])["data"]["graph.yaml"])
    return data


# --- what is printed ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_renders_to_its_golden_file(name: str) -> None:
    assert text_of(name) == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8"), "look at the difference, then: python tests/test_kubernetes.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_input_gives_the_same_bytes_whatever_order_values_are_written_in(name: str) -> None:
    graph, values = EXAMPLES[name]
    data = yaml.safe_load((ROOT / values).read_text()) if values else {}
    shuffled = yaml.safe_dump({key: data[key] for key in reversed(list(data))}, sort_keys=True)
    draft = reading.read(shuffled)
    again = render.files(plan.make(graph_of(graph), draft, known(graph)))
    workers = [key for key in again if key.startswith("worker-")]
    assert {key: again[key] for key in again if key not in workers} == {key: those for key, those in made(graph, values).items() if key not in workers}
    assert {key: again[key] for key in workers} == {key: those for key, those in made(graph, values).items() if key in workers}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_printed_is_read_back_as_what_was_meant(name: str) -> None:
    assert objects(name) == [found for those in made(*EXAMPLES[name]).values() for found in those]


@pytest.mark.parametrize("odd", ["yes", "y", "N", "on", "null", "~", "1e3", "0x1f", "1_000", "0o17", "1:30", "-", ".5", ".inf", "2026-01-01", "", " x", "a\nb", "a\u2028b", "#x", "x: y", "*a", "&a"])
def test_a_text_stays_a_text_whatever_yaml_might_take_it_for(odd: str) -> None:
    written = render.text([{"value": odd, odd: 1}])
    assert yaml.safe_load(written) == {"value": odd, odd: 1}
    line = written.splitlines()[0].removeprefix("value: ")
    assert "\n" in odd or line[:1] in "\"'" or not re.fullmatch(r"[-+.0-9].*|[yYnN]", line)


# --- published schemas ---


@functools.cache
def cached_schemas() -> None:
    utils.schema_contents = functools.cache(utils.schema_contents)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_object_of_kubernetes_own_is_valid_in_its_last_three_minor_releases(name: str, version: str) -> None:
    cached_schemas()
    seen = 0
    for found in objects(name):
        if not re.search(r"\.(dev|sh|io)/|coreos", found["apiVersion"]) or found["apiVersion"].startswith("networking.k8s.io"):
            kubernetes_validate.validate(found, version, strict=True)
            seen += 1
    assert seen > 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pod_is_valid_whatever_runs_it(name: str) -> None:
    cached_schemas()
    for found, pod in pods(name):
        spec = {k: v for k, v in pod.items() if k != "labels"}
        for container in spec["containers"]:
            container.setdefault("name", "server")
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": found["metadata"]["name"], "labels": pod["labels"]}, "spec": spec}
        kubernetes_validate.validate(body, VERSIONS[0], strict=True)


def schema_of(found: Object) -> Path:
    return ROOT / "tests" / "schemas" / f"{found['apiVersion'].replace('/', '-')}-{found['kind'].lower()}.json"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_custom_object_is_valid_by_what_its_project_publishes(name: str) -> None:
    for found in objects(name):
        if re.search(r"\.(dev|sh)/|coreos|gateway\.|kserve", found["apiVersion"]):
            schema = json.loads(schema_of(found).read_text(encoding="utf-8"))
            jsonschema.Draft202012Validator(schema).validate(found)


def test_every_schema_is_used_and_refuses_what_it_should() -> None:
    used = {schema_of(found) for name in EXAMPLES for found in objects(name)}
    for path in (ROOT / "tests" / "schemas").glob("*.json"):
        assert path in used, path.name
        schema = json.loads(path.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        example = next(found for name in EXAMPLES for found in objects(name) if schema_of(found) == path)
        for spoilt in ({**example, "spec": {}}, {**example, "apiVersion": "v1"}, {**example, "extra": 1}):
            assert not jsonschema.Draft202012Validator(schema).is_valid(spoilt), path.name


# --- a policy ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pod_keeps_the_policy(name: str) -> None:
    assert pods(name)
    for found, pod in pods(name):
        where = f"{found['kind']} {found['metadata']['name']}"
        assert pod["enableServiceLinks"] is False, where
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] >= 100, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert pod.get("automountServiceAccountToken", False) is False and pod["serviceAccountName"], where
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostAliases"}, where
        assert not [v for v in pod["volumes"] if v.keys() & {"hostPath", "secret"}], where
        for container in containers(pod):
            own = container["securityContext"]
            assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True, "runAsNonRoot": True}, where
            image, _, tag = container["image"].rpartition(":")
            assert image and tag and tag not in ("latest", "main", "stable"), where
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys(), where
        for container in pod["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), where
    assert one(name, "ServiceAccount", graph_name(name))["automountServiceAccountToken"] is False


def graph_name(name: str) -> str:
    return "experts" if name == "external" else "lmgraph"


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_secret_is_written_and_no_plain_variable_looks_like_one(name: str) -> None:
    assert not [o for o in objects(name) if o["kind"] == "Secret"]
    for _, pod in pods(name):
        for container in containers(pod):
            for variable in container.get("env", []):
                assert "valueFrom" in variable or not re.search(r"(?i)(key|token|password|secret)$", variable["name"]), variable
                assert not re.search(r"//[^$/@]*:[^$/@]+@", variable.get("value", "")), variable
    assert "lmg-" not in text_of(name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_names_and_labels_are_ones_that_kubernetes_takes(name: str) -> None:
    for found in objects(name):
        called = found["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", called) and len(called) <= 52, called
        for key, value in found["metadata"]["labels"].items():
            assert len(value) <= 63 and re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", value), (key, value)
    keys = [(o["kind"], o["metadata"]["name"]) for o in objects(name)]
    assert len(keys) == len(set(keys))


# --- objects that name each other ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_whatever_an_object_names_is_there_or_said_to_be_needed(name: str) -> None:
    every = objects(name)
    there = {(o["kind"], o["metadata"]["name"]) for o in every}
    claims = {"graph-files"}  # of the operator's
    for found, pod in pods(name):
        assert ("ServiceAccount", pod["serviceAccountName"]) in there
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounted = {m["name"] for container in containers(pod) for m in container["volumeMounts"]}
        own = {c["metadata"]["name"] for c in found["spec"].get("volumeClaimTemplates", [])}
        assert mounted == volumes.keys() | own
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim in claims or ("PersistentVolumeClaim", claim) in there
        if "selector" in found["spec"]:
            assert found["spec"]["selector"]["matchLabels"].items() <= pod["labels"].items()
    for found in every:
        if found["kind"] == "Service" and found["apiVersion"] == "v1":
            chosen = [pod for _, pod in pods(name) if found["spec"]["selector"].items() <= pod["labels"].items()]
            assert len(chosen) == 1, found["metadata"]["name"]
            ports = {port["name"] for container in chosen[0]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in found["spec"]["ports"]} <= ports
        if found["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = found["spec"]["scaleTargetRef"]["name"]
            assert ("Deployment", target) in there or ("InferenceService", target.removesuffix("-predictor")) in there
        if found["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            chosen = found["spec"].get("selector", found["spec"].get("podSelector"))["matchLabels"].items()
            assert [pod for _, pod in pods(name) if chosen <= pod["labels"].items()], found["metadata"]["name"]
        if found["kind"] == "ServiceMonitor":
            assert [o for o in every if o["kind"] == "Service" and found["spec"]["selector"]["matchLabels"].items() <= o["metadata"]["labels"].items()]
        if found["kind"] == "PodMonitor":
            assert [pod for _, pod in pods(name) if found["spec"]["selector"]["matchLabels"].items() <= pod["labels"].items()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_autoscaled_deployment_says_no_number_of_pods_and_every_other_one_does(name: str) -> None:
    scaled = {o["spec"]["scaleTargetRef"]["name"] for o in objects(name) if o["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")}
    for found in objects(name):
        if found["kind"] == "Deployment":
            assert ("replicas" in found["spec"]) is (found["metadata"]["name"] not in scaled), found["metadata"]["name"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_worker_is_asked_where_its_service_is_by_every_node_of_its_deployment(name: str) -> None:
    nodes = graph_in(name)["nodes"]
    namespace = graph_name(name)
    for found, pod in pods(name):
        if found["metadata"]["labels"]["app.kubernetes.io/component"] == "worker":
            called = found["metadata"]["name"]
            port = "" if found["kind"] == "Service" else f":{pod['containers'][0]['ports'][0]['containerPort']}"
            if called == "lmgraph-master":
                assert graph_in(name)["master"]["server"] == f"http://{called}.{namespace}.svc{port}"
                continue
            for node in found["metadata"]["annotations"]["lmgraph/nodes"].split(","):
                assert nodes[node]["worker"]["urls"] == [f"http://{called}.{namespace}.svc{port}/v1"]
    ours = [n for n, row in nodes.items() if any(f".{namespace}.svc" in url for url in row["worker"].get("urls", []))]
    said = [n for found, _ in pods(name) for n in found["metadata"].get("annotations", {}).get("lmgraph/nodes", "").split(",") if n]
    assert sorted(ours) == sorted(said)


# --- who may talk to whom ---


def allowed(name: str, source: tuple[Object, str], target: tuple[Object, str], port: int) -> bool:
    """What a cluster would say: (labels, namespace) -> (labels, namespace) at a port over TCP. Pods without a policy are free."""
    policies = [o["spec"] for o in objects(name) if o["kind"] == "NetworkPolicy"]

    def permits(own: tuple[Object, str], other: tuple[Object, str], way: str, peers: str) -> bool:
        mine = [p for p in policies if own[1] == graph_name(name) and p["podSelector"]["matchLabels"].items() <= own[0].items()]
        rules = [rule for p in mine for rule in p.get(way, [])]
        return not mine or any(
            any(p["port"] == port and p["protocol"] == "TCP" for p in rule["ports"]) and any(matches(peer, other) for peer in rule[peers])
            for rule in rules)

    def matches(peer: Object, other: tuple[Object, str]) -> bool:
        if "namespaceSelector" in peer:
            return bool(peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == other[1])
        return "podSelector" in peer and other[1] == graph_name(name) and peer["podSelector"]["matchLabels"].items() <= other[0].items()

    return permits(source, target, "egress", "to") and permits(target, source, "ingress", "from")


def place(name: str, called: str) -> tuple[Object, str]:
    return next(pod["labels"] for found, pod in pods(name) if found["metadata"]["name"] == called), graph_name(name)


def test_the_network_lets_pass_what_is_needed_and_nothing_else() -> None:
    gates, coder, small = (place("mixed", f"lmgraph-{called}") for called in ("gateway", "coder", "small"))
    assert allowed("mixed", gates, coder, 8080) and allowed("mixed", gates, small, 8080)
    assert not allowed("mixed", gates, coder, 22)
    assert not allowed("mixed", coder, small, 8080) and not allowed("mixed", coder, gates, 8000)
    assert allowed("mixed", ({}, "gateways"), gates, 8000) and allowed("mixed", ({}, "lmgraph"), gates, 8000)
    assert not allowed("mixed", ({}, "elsewhere"), gates, 8000) and not allowed("mixed", ({}, "gateways"), coder, 8080)
    assert allowed("mixed", ({}, "monitoring"), gates, 8000) and allowed("mixed", ({}, "monitoring"), coder, 8080)
    assert allowed("mixed", gates, ({}, "data"), 6379) and not allowed("mixed", coder, ({}, "data"), 6379)


def test_only_gateways_reach_the_trial_redis_and_it_reaches_nobody() -> None:
    gates, redis, coder = (place("zero", f"lmgraph-{called}") for called in ("gateway", "redis", "coder"))
    assert allowed("zero", gates, redis, 6379)
    assert not allowed("zero", coder, redis, 6379) and not allowed("zero", ({}, "lmgraph"), redis, 6379)
    assert not allowed("zero", redis, coder, 8080) and not allowed("zero", redis, ({}, "anywhere"), 443)


def test_servers_elsewhere_are_reached_at_their_ports_and_addresses_only() -> None:
    gates = place("external", "experts-gateway")
    assert allowed("external", ({}, "apps"), gates, 8000) and allowed("external", ({}, "ingress-nginx"), gates, 8000)
    assert not allowed("external", ({}, "experts"), gates, 8000)
    assert allowed("external", gates, ({}, "models"), 8000) and not allowed("external", gates, ({}, "models"), 80)
    rules = one("external", "NetworkPolicy", "experts-gateway")["spec"]["egress"]
    blocks = {peer["ipBlock"]["cidr"]: [p["port"] for p in rule["ports"]] for rule in rules for peer in rule["to"] if "ipBlock" in peer}
    assert blocks == {"10.20.0.7/32": [9000], "10.20.0.8/32": [9000], "203.0.113.0/24": [443]}


# --- what our own programs take ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gateways_command_line_is_one_that_lmgraph_takes(name: str) -> None:
    pod = pod_of(one(name, "Deployment", f"{graph_name(name)}-gateway"))
    assert pod
    lines = [container["args"] for container in containers(pod)]
    for _, worker in pods(name):
        lines += [c["command"][3:] for c in worker.get("initContainers", []) if c.get("command", [""])[0] == "flock"]
    for command, *arguments in lines:
        found = cli.lmgraph.get_command(click.Context(cli.lmgraph), command)
        assert found is not None
        with found.make_context(command, list(arguments), help_option_names=["-h", "--help"]) as context:
            assert context.params
    assert [line[0] for line in lines if line[0] == "serve"] == ["serve"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_environment_of_lmgraphs_own_containers_is_one_that_it_takes(name: str) -> None:
    image = "registry.example.com/lmgraph:0.1.0" if name == "mixed" else "lmgraph:0.1.0"
    seen = 0
    for _, pod in pods(name):
        for container in containers(pod):
            if container["image"] == image:
                found = {v["name"]: v.get("value") or ("2" if v["name"].endswith("THREADS") else "redis://h:6379/0") for v in container["env"]}
                assert environment.read(found).cache.is_absolute()
                seen += 1
                with pytest.raises(SettingsError, match="LMGRAPH_PORT"):  # why service links are off
                    environment.read({**found, "LMGRAPH_PORT": "tcp://10.0.0.1:80"})
    assert seen


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_graph_of_the_gateways_is_the_graph_asked_elsewhere(name: str) -> None:
    given, found = graph_of(EXAMPLES[name][0]), graphfile.of_dict(graph_in(name))
    assert (found.edges, replace(found.master, server=""), found.answer, list(found.nodes)) == (given.edges, given.master, given.answer, list(given.nodes))
    for called, node in found.nodes.items():
        before = given.nodes[called]
        assert (node.token, node.description, node.fallback, node.rewrite) == (before.token, before.description, before.fallback, before.rewrite)
        assert (node.worker.system, node.worker.max_tokens, node.worker.price) == (before.worker.system, before.worker.max_tokens, before.worker.price)
        if before.worker.kind == "embedded":
            assert node.worker.kind == "openai" and node.worker.temperature == (before.worker.temperature or 0.0)
        elif any("localhost" in url for url in before.worker.urls):  # an engine of ours answers now
            keys = ("urls", "dialect", "adapter", "adapter_source")
            assert replace(node.worker, **{key: getattr(before.worker, key) for key in keys}) == before.worker
            assert not any("localhost" in url for url in node.worker.urls)
        else:
            assert node.worker == before.worker


def test_nodes_of_one_base_share_one_deployment_and_each_has_its_adapter() -> None:
    for name, adapters in (("vllm", ["math", "law", "health", None]),
                           ("lorax", ["example-org/qwen2.5-7b-math-lora", "/files/adapters/law", "example-org/qwen2.5-7b-health-lora", None])):
        workers = [row["worker"] for row in graph_in(name)["nodes"].values()]
        assert [worker.get("adapter") for worker in workers] == adapters
        assert {worker["dialect"] for worker in workers} == {name} and {worker["model"] for worker in workers} == {"Qwen/Qwen2.5-7B-Instruct"}
        assert len({worker["urls"][0] for worker in workers}) == 1
    assert graph_in("lorax")["nodes"]["law"]["worker"]["adapter_source"] == "local"
    arguments = pod_of(one("vllm", "Deployment", "lmgraph-qwen"))["containers"][0]["args"]  # type: ignore[index]
    assert "law=/files/adapters/law" in arguments and "--enable-lora" in arguments and arguments[0] == "Qwen/Qwen2.5-7B-Instruct"


def test_a_served_master_has_the_files_that_pulling_its_bundle_makes_and_the_gateways_have_none(tmp_path: Path) -> None:
    pod = pod_of(one("served", "Deployment", "lmgraph-master"))
    (first,), (main,) = pod["initContainers"], pod["containers"]
    assert first["command"][-3:] == ["pull", "--bundle", "mmlu"] and main["image"].endswith("server-cuda-b11176")
    bundle = bundles.read("mmlu")
    walk = walk_path(bundle, Path("/models"))
    arguments = main["args"]
    assert arguments[arguments.index("--model") + 1] == str(bundles.merged_path(bundle, Path("/models")))
    assert arguments[arguments.index("--lora") + 1] == str(walk) and "--lora-init-without-apply" in arguments
    assert arguments[-2:] == ["--gpu-layers", "999"] and main["resources"]["limits"]["nvidia.com/gpu"] == "1"
    gate = pod_of(one("served", "Deployment", "lmgraph-gateway"))
    assert "initContainers" not in gate
    assert graph_in("served")["master"]["server"] == "http://lmgraph-master.lmgraph.svc:8080"
    allowed = one("served", "NetworkPolicy", "lmgraph-gateway")["spec"]["egress"]
    assert any(peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/name") == "lmgraph-master" for rule in allowed for peer in rule["to"])
    triggers = one("served", "ScaledObject", "lmgraph-master")["spec"]["triggers"]
    assert [trigger.get("name", trigger["type"]) for trigger in triggers] == ["waiting", "memory"]


def test_a_worker_at_zero_is_waited_for_and_woken_by_what_waits_at_the_gateways() -> None:
    nodes = graph_in("zero")["nodes"]
    assert {row["worker"]["start_timeout_s"] for row in nodes.values()} == {240}
    spec = one("zero", "ScaledObject", "lmgraph-coder")["spec"]
    assert spec["minReplicaCount"] == 0
    held = next(t["metadata"] for t in spec["triggers"] if t["name"] == "held")
    assert "lmgraph_node_active" in held["query"] and held["activationThreshold"] == "0"
    pattern = re.search(r'node=~"([^"]+)"', held["query"])
    assert pattern and all(re.fullmatch(pattern[1], node) for node in nodes)
    assert {row["worker"].get("timeout_s") for row in graph_in("knative")["nodes"].values()} == {420.0, None}  # Knative holds requests itself


def test_a_changed_graph_is_another_config_map_and_so_a_rolling_update() -> None:
    def of(description: str) -> tuple[str, str]:
        text = f"version: 1\nnodes: {{a: {{token: 0, description: {description}, worker: {{kind: embedded, model: smollm2-135m}}}}}}\nedges: {{start: ['*']}}"
        found = render.files(plan.make(graphfile.loads(text), reading.read(""), decided.Known(frozenset(["mmlu"]))))
        name = found["graph.yaml"][0]["metadata"]["name"]
        assert found["graph.yaml"][0]["immutable"] is True
        used = found["gateway.yaml"][0]["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
        return name, used

    one_, two = of("one"), of("two")
    assert one_[0] == one_[1] and two[0] == two[1] and one_ != two and one_ == of("one")


def queries(name: str) -> list[str]:
    """Every query of an example: triggers, alerts, panels."""
    found = []
    for o in objects(name):
        if o["kind"] == "ScaledObject":
            found += [t["metadata"]["query"] for t in o["spec"]["triggers"] if t["type"] == "prometheus"]
        elif o["kind"] == "PrometheusRule":
            found += [rule["expr"] for group in o["spec"]["groups"] for rule in group["rules"]]
        elif o["kind"] == "ConfigMap" and o["metadata"]["labels"].get("grafana_dashboard"):
            board = json.loads(next(iter(o["data"].values())))
            found += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        elif o["kind"] == "HorizontalPodAutoscaler":
            found += [m["pods"]["metric"]["name"] for m in o["spec"]["metrics"] if m["type"] == "Pods"]
    return found


@pytest.mark.parametrize("name", ["mixed", "vllm", "lorax", "zero", "knative"])
def test_every_metric_of_ours_that_is_asked_for_exists(name: str) -> None:
    counted = Metrics()
    counted.loads["law"].active = 1
    counted.requests["/v1/route", "200"] += 1
    for counter in (counted.answers, counted.tokens, counted.cache):
        counter["law", "x"] += 1
    page = counted.text().decode()
    there = set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE)) | set(re.findall(r"^(lmgraph_\w+)", page, re.MULTILINE))
    asked = {metric for query in queries(name) for metric in re.findall(r"\blmgraph_\w+", query)}
    assert {"lmgraph_active", "lmgraph_requests_total", "lmgraph_node_active"} <= asked
    assert asked <= there
    for query in queries(name):
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        for labels in re.findall(r"\{([^}]*)\}", query):
            if labels:
                assert 'namespace="lmgraph"' in labels and re.search(r'job="lmgraph-[a-z]+"', labels)


def test_every_job_that_is_asked_for_is_a_deployment_that_is_scraped_under_that_name() -> None:
    for name in ("mixed", "vllm", "lorax", "zero", "knative"):
        jobs = {job for query in queries(name) for job in re.findall(r'job="([^"]+)"', query)}
        assert jobs == {found["metadata"]["name"] for found, _ in pods(name) if found["kind"] != "StatefulSet"}
        for o in objects(name):
            if o["kind"] in ("ServiceMonitor", "PodMonitor"):
                assert o["spec"]["jobLabel"] == "app.kubernetes.io/name"


# --- the image ---


def test_the_image_runs_as_the_user_that_the_pods_say_and_bakes_where_they_look() -> None:
    from lmgraph.kubernetes.pods import USER

    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) >= 2 and not any(image.endswith(":latest") for image in stages)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == str(USER)
    assert gateway.BAKED in text and 'ENTRYPOINT ["lmgraph"]' in text
    given = re.search(r"printf '([^']+)' \"\$WEIGHTS\"", text)
    assert given
    graph = graphfile.loads(given[1].replace("%s", "mmlu").replace("\\n", "\n").replace('\\"', '"'))
    assert graph.master.bundle == "mmlu" and not [n for n in graph.nodes.values() if n.worker.kind == "embedded"]  # nothing else is fetched
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists(), path


# --- kubectl ---


GROUPS = {  # group version -> kinds with their plural names
    "v1": {"ConfigMap": "configmaps", "Service": "services", "ServiceAccount": "serviceaccounts", "PersistentVolumeClaim": "persistentvolumeclaims"},
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute": "httproutes"},
    "keda.sh/v1alpha1": {"ScaledObject": "scaledobjects"},
    "monitoring.coreos.com/v1": {"ServiceMonitor": "servicemonitors", "PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"},
    "serving.kserve.io/v1beta1": {"InferenceService": "inferenceservices"},
    "serving.knative.dev/v1": {"Service": "services"},
}


class Discovery(BaseHTTPRequestHandler):
    """What `kubectl create --dry-run=client` asks a cluster: which kinds there are. It is given nothing, and nothing is kept."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        groups = [g.split("/") for g in GROUPS if "/" in g]
        answers: Object = {
            "api": {"kind": "APIVersions", "versions": ["v1"]},
            "apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": group, "versions": [{"groupVersion": f"{group}/{version}", "version": version}],
                 "preferredVersion": {"groupVersion": f"{group}/{version}", "version": version}} for group, version in groups]},
        }
        for version, kinds in GROUPS.items():
            answers[f"apis/{version}" if "/" in version else f"api/{version}"] = {
                "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
                "resources": [{"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["create", "get"]} for kind, plural in kinds.items()]}
        body = json.dumps(answers.get(path, {})).encode()
        self.send_response(200 if path in answers else 404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def discovery(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Discovery)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


NEEDS_KUBECTL = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@NEEDS_KUBECTL
@pytest.mark.parametrize("name", EXAMPLES)
def test_kubectl_kustomize_gives_back_exactly_the_objects_of_the_folder(name: str, tmp_path: Path) -> None:
    for file, text in render.folder(made(*EXAMPLES[name])).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    run = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    built = list(yaml.safe_load_all(run.stdout))

    def key(found: Object) -> tuple[str, str, str]:
        return found["apiVersion"], found["kind"], found["metadata"]["name"]

    assert sorted(built, key=key) == sorted(objects(name), key=key)


@NEEDS_KUBECTL
@pytest.mark.parametrize("name", EXAMPLES)
def test_kubectl_would_create_every_object(name: str, discovery: str, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(text_of(name), encoding="utf-8")
    command = ["kubectl", "--server", discovery, "--cache-dir", str(tmp_path / "cache"), "create", "--dry-run=client", "--validate=false", "-f", str(path), "-o", "name"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(objects(name))


# --- no cluster, no network ---


def test_rendering_opens_no_connection(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a connection was opened")

    for call in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, call, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.main(["kubernetes", "render", "examples/mixed.yaml", "-f", "examples/values.yaml"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == text_of("mixed")


def write_golden(say: Callable[[str], None] = print) -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in EXAMPLES:
        (GOLDEN / f"{name}.yaml").write_text(text_of(name), encoding="utf-8")
        say(f"wrote {name}.yaml")


if __name__ == "__main__":
    write_golden()
