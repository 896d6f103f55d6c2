"""The REST API against its own description: a real controller and etcd, any requests.

Schemathesis makes requests from docs/openapi.json: right ones, and ones with something wrong. No
answer is a 500, every answer is one that the document describes, and a field that does not exist is
refused wherever it stands. Hosts, a VM and its protection exist, so that requests get past the
first look-up.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.integration.controller.conftest import Agent, Controller, Etcd, ok

pytestmark = pytest.mark.etcd

EXAMPLES = 15
"""For each operation, right ones and wrong ones each; half a minute in all."""
DOCUMENT = schemathesis.openapi.from_path(
    Path(__file__).resolve().parents[2] / "docs" / "openapi.json"
)
OPERATIONS = {
    found.ok().label: found.ok() for found in DOCUMENT.get_all_operations() if isinstance(found, Ok)
}
WITH_BODY = sorted(label for label, operation in OPERATIONS.items() if operation.body)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
WAITING = frozenset({"wait_ms", "follow"})
"""Parameters that make an answer come late, by design."""
Case = schemathesis.Case[Any]
_numbers = itertools.count(1)
LIMITS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """A controller that takes nobody for dead while this lasts."""
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    controller = Controller(
        tmp_path_factory.mktemp("controller"), etcd, "fuzzed", heartbeat_ttl_seconds=300
    )
    try:
        etcd.start()
        controller.start()
        yield controller
    finally:
        controller.close()
        etcd.end()


@pytest.fixture
def known(controller: Controller) -> dict[str, Any]:
    """Names of two hosts, a policy and a protected VM that exist, whatever was done before."""
    vm = f"vm{next(_numbers)}"
    Agent(controller, "h1").run(vm)
    Agent(controller, "h2").beat()
    ok(controller.put("/v1/policies/gold", {}))
    ok(controller.put(f"/v1/vms/{vm}/protection", {}))
    generation = controller.protection(vm)["generation"]
    return {"host": "h1", "vm": vm, "name": "gold", "generation": generation}


def draw_case(data: st.DataObject, label: str, mode: GenerationMode, known: dict[str, Any]) -> Case:
    """Draw a request; half of the right ones are about things that exist."""
    operation = OPERATIONS[label]
    about_known = mode is GenerationMode.POSITIVE and data.draw(st.booleans())
    path = {name: value for name, value in known.items() if f"{{{name}}}" in operation.path}
    case: Case = data.draw(
        operation.as_strategy(mode, path_parameters=path if about_known and path else None)
    )
    if about_known and isinstance(case.body, dict):
        case.body |= {name: value for name, value in known.items() if name in case.body}
    for name in WAITING & set(case.query or {}):
        del case.query[name]
    return case


def ask(controller: Controller, case: Case) -> schemathesis.Response:
    """Send a request and hold its answer against the document."""
    response = case.call(base_url=str(controller.http.base_url).rstrip("/"), timeout=20)
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        assert response.headers["content-type"] == ["application/problem+json"]
        problem = response.json()
        assert problem["status"] == response.status_code
        assert problem["code"], problem
        assert problem["detail"], problem
    return response


def statuses_of(
    label: str, mode: GenerationMode, controller: Controller, known: dict[str, Any]
) -> Counter[int]:
    """Send many requests of one operation; return how often each status was the answer."""
    statuses: Counter[int] = Counter()

    @given(data=st.data())
    @LIMITS
    def check(data: st.DataObject) -> None:
        statuses[ask(controller, draw_case(data, label, mode, known)).status_code] += 1

    check()
    return statuses


@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_every_answer_to_a_right_request_is_one_that_the_document_describes(
    label: str, controller: Controller, known: dict[str, Any]
) -> None:
    statuses = statuses_of(label, GenerationMode.POSITIVE, controller, known)
    assert statuses, "nothing was asked"
    assert ok(controller.get("/healthz")) == {"status": "ok"}


@pytest.mark.parametrize(
    "label", [one for one, op in sorted(OPERATIONS.items()) if op.body or [*op.iter_parameters()]]
)
def test_every_answer_to_a_wrong_request_is_one_that_the_document_describes(
    label: str, controller: Controller, known: dict[str, Any]
) -> None:
    statuses = statuses_of(label, GenerationMode.NEGATIVE, controller, known)
    refused = sum(count for status, count in statuses.items() if status >= 400)
    assert refused > statuses.total() / 2, statuses
    assert ok(controller.get("/healthz")) == {"status": "ok"}


@pytest.mark.parametrize("label", WITH_BODY)
def test_a_field_that_does_not_exist_is_refused_by_name(
    label: str, controller: Controller, known: dict[str, Any]
) -> None:
    places: Counter[str] = Counter()

    @given(data=st.data())
    @LIMITS
    def check(data: st.DataObject) -> None:
        case = draw_case(data, label, GenerationMode.POSITIVE, known)
        if not isinstance(case.body, dict):
            return
        where = data.draw(st.sampled_from(["", *_parts_with_fields(case.body)]))
        part: Any = case.body[where] if where else case.body
        part["no_such_field"] = 1
        response = ask(controller, case)
        assert response.status_code == 422, response.text
        assert "no_such_field: there is no such field" in response.text
        places[where] += 1

    check()
    assert places, "no body was sent"


def _parts_with_fields(body: dict[str, Any]) -> list[str]:
    """Return the fields of `body` that are models of their own."""
    return [name for name in ("facts", "policy", "placement") if isinstance(body.get(name), dict)]
