"""A plan -> files of objects, in a fixed order, one concern a file, and their YAML. The same graph and values give the same bytes. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from lmgraph.kubernetes import dashboard, gateway, memory, monitoring, scaling, serving, traffic
from lmgraph.kubernetes.decided import Plan
from lmgraph.kubernetes.pods import Object

MARK = "# Written by lmgraph kubernetes render; changes are lost when it is rendered again."
KUSTOMIZATION = "kustomization.yaml"
ODD = re.compile(r"[-+.0-9].*|[yYnN~]|.*[\r\x85\u2028\u2029].*", re.DOTALL)
"""texts that YAML of another version might read as numbers or truths, or whose line ends it might not keep: they are put in quotes"""


def files(plan: Plan) -> dict[str, list[Object]]:
    """File name -> its objects. Files without objects are left out."""
    values = plan.values
    watched = values.monitoring.kind != "none"
    found = {
        "graph.yaml": [gateway.config(plan)],
        "account.yaml": [gateway.account(values)],
        "gateway.yaml": gateway.objects(plan),
        "gateway-scaling.yaml": scaling.of_gateway(plan),
        "exposure.yaml": traffic.exposure(values),
        "network.yaml": traffic.policies(plan),
        "redis.yaml": memory.objects(values),
    }
    for worker in plan.workers:
        found[f"worker-{worker.key}.yaml"] = serving.objects(values, worker)
        found[f"worker-{worker.key}-scaling.yaml"] = scaling.of_worker(values, worker)
    if watched:
        found |= {
            "monitors.yaml": monitoring.monitors(plan),
            "alerts.yaml": monitoring.alerts(plan),
            "dashboard.yaml": dashboard.objects(plan),
        }
    return {name: those for name, those in found.items() if those}


def folder(made: Mapping[str, Sequence[Object]]) -> dict[str, str]:
    """File name -> text, with the kustomization that names them all."""
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(made)}
    return {
        KUSTOMIZATION: f"{MARK}\n{text([kustomization])}",
        **{name: f"{MARK}\n{text(those)}" for name, those in made.items()},
    }


def stream(made: Mapping[str, Sequence[Object]]) -> str:
    """All objects as one stream of YAML documents; a comment before each says which file it belongs to."""
    return "".join(f"---\n# {name}\n{text([found])}" for name, those in made.items() for found in those)


def listed(made: Mapping[str, Sequence[Object]]) -> str:
    """All objects as one List in JSON."""
    items = [found for those in made.values() for found in those]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, ensure_ascii=False, indent=1) + "\n"


def text(objects: Iterable[Any]) -> str:
    """YAML documents. Texts of several lines are blocks."""
    return "---\n".join(
        yaml.dump(found, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1_000_000)
        for found in objects
    )


class _Dumper(yaml.SafeDumper):
    """Safe YAML without anchors; what might be read as something else is in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = '"' if ODD.fullmatch(value) else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)
