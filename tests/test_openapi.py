"""The OpenAPI document: valid, whole, and what the real gateway does when it is asked what the document allows, and what it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from conftest import serving, toy_graph
from lmgraph import __version__
from lmgraph.serve.openapi import document

NODES = ("math", "law", "health")
DOCUMENT = document(__version__, NODES)
PATHS = {
    "/v1/chat/completions": {"post"}, "/v1/responses": {"post"}, "/v1/route": {"post"}, "/v1/models": {"get"},
    "/v1/graph": {"get", "put", "patch"}, "/v1/graph/undo": {"post"}, "/v1/live": {"get"},
    "/v1/history": {"get"}, "/v1/history/{id}": {"get", "delete"}, "/v1/cache": {"delete"},
    "/healthz": {"get"}, "/readyz": {"get"}, "/metrics": {"get"}, "/openapi.json": {"get"}, "/": {"get"}, "/web/{file}": {"get"},
}
METHODS = {"get", "put", "post", "patch", "delete"}
SCHEMA = schemathesis.openapi.from_dict(json.loads(json.dumps(DOCUMENT)))
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}
CHECKS = [schemathesis.checks.not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        yield from ((f"{method.upper()} {path}", item[method]) for method in METHODS & item.keys())


# ---------------------------------------------------------------- the document alone


def test_the_document_is_valid_openapi_and_plain_json() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_every_reference_leads_somewhere_and_everything_named_is_used() -> None:
    named = {f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in DOCUMENT["components"][kind]}
    assert set(references(DOCUMENT)) == named


def test_every_path_of_the_contract_is_there_and_no_other() -> None:
    assert {path: METHODS & item.keys() for path, item in DOCUMENT["paths"].items()} == PATHS


def test_every_operation_has_a_name_of_its_own_and_describes_its_errors() -> None:
    names = [operation["operationId"] for _, operation in operations()]
    assert len(set(names)) == len(names) == 19
    for label, operation in operations():
        statuses = set(operation["responses"])
        assert "200" in statuses, label
        assert ("requestBody" not in operation) or {"400", "408", "413"} <= statuses, label
        assert ("/v1/" not in label) or {"401", "403", "503"} <= statuses, label


def test_the_models_are_those_of_the_graph() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("ChatRequest", "ResponseRequest"):
        assert schemas[name]["properties"]["model"]["enum"] == ["lmgraph", "lmgraph/math", "lmgraph/law", "lmgraph/health"]


# ---------------------------------------------------------------- the document and the gateway


@pytest.fixture(scope="module")
def address(toy_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(toy_graph(toy_master), tmp_path_factory.mktemp("openapi")) as found:
        yield found


def test_the_gateway_serves_this_document(address: str) -> None:
    answer = httpx.get(f"{address}/openapi.json")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json" and answer.json() == DOCUMENT


def test_every_path_that_the_gateway_has_is_in_the_document(address: str) -> None:
    said = httpx.get(f"{address}/v1/nothing").json()["error"]["message"]
    found = re.findall(r"/[\w/.]*", said.partition("Valid:")[2])
    assert len(found) > 10
    for path in found:
        assert any(known == path or (path.endswith("/") and known.startswith(path) and "{" in known) for known in PATHS), path


@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_answers_conform_whatever_is_asked(address: str, label: str) -> None:
    operation = OPERATIONS[label]
    takes = "requestBody" in operation.definition.raw or operation.query or operation.headers
    kinds = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if takes else [GenerationMode.POSITIVE]

    @settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(*(operation.as_strategy(generation_mode=kind) for kind in kinds)))
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=address, checks=CHECKS, timeout=60)

    ask()
