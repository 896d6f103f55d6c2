"""The checked-in OpenAPI document is the one that the application serves."""

import json
from pathlib import Path

import pytest

from holdfast_api.errors import PROBLEMS
from holdfast_controller.http.app import openapi_document
from holdfast_controller.main import main

CHECKED_IN = Path(__file__).parents[3] / "docs" / "openapi.json"


def test_the_checked_in_document_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openapi"]) == 0
    printed = capsys.readouterr().out
    again = "run `holdfast-controller openapi > docs/openapi.json`"
    assert CHECKED_IN.read_text("utf-8") == printed, again


def test_every_operation_declares_problem_documents_for_its_errors() -> None:
    document = json.loads(openapi_document())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            error = operation["responses"]["default"]
            assert "application/problem+json" in error["content"], where
            assert "422" not in operation["responses"], where
            assert all(f"`{code}`" in error["description"] for code in PROBLEMS), where


def test_the_contracts_routes_are_all_there() -> None:
    paths = json.loads(openapi_document())["paths"]
    assert {path: set(operations) for path, operations in paths.items()} == {
        "/healthz": {"get"},
        "/metrics": {"get"},
        "/readyz": {"get"},
        "/v1/agent/claims": {"post"},
        "/v1/agent/events": {"post"},
        "/v1/agent/hosts/{host}/assignments": {"get"},
        "/v1/agent/hosts/{host}/heartbeat": {"post"},
        "/v1/agent/released": {"post"},
        "/v1/agent/seeded": {"post"},
        "/v1/agent/seeding-failed": {"post"},
        "/v1/events": {"get"},
        "/v1/hosts": {"get"},
        "/v1/hosts/{host}": {"get", "patch"},
        "/v1/policies": {"get"},
        "/v1/policies/{name}": {"get", "put", "delete"},
        "/v1/vms": {"get"},
        "/v1/vms/{vm}": {"get"},
        "/v1/vms/{vm}/preflight": {"get"},
        "/v1/vms/{vm}/protection": {"put", "get", "patch", "delete"},
        "/v1/vms/{vm}/switchover": {"post"},
    }
