"""`/openapi.json` describes what the routes really do."""

import json
from typing import Any

import pytest
from fake_worker import FakeWorker
from live_server import LiveServer

from infilld.server import wire
from infilld.server.app import create_app


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return create_app(FakeWorker(), token="secret").openapi()


def test_errors_have_our_shape_only(told: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in told["components"]["schemas"]
    for path, operations in told["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "422" not in answers, (method, path)
            assert {"400", "503"} <= set(answers), (method, path)
            assert ("401" in answers) == bool(operation["security"]), (method, path)


def test_a_body_may_suit_two_dialects(told: dict[str, Any]) -> None:
    content = told["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    # Tabby's requests are no others to whoever ignores what is Tabby's.
    assert len(schema["anyOf"]) == 2
    assert "oneOf" not in schema


def test_every_reference_leads_somewhere(told: dict[str, Any]) -> None:
    names = set(told["components"]["schemas"])
    wanted = {part.split('"')[0] for part in json.dumps(told).split("#/components/schemas/")[1:]}
    assert wanted <= names


def test_every_body_has_an_example_that_is_valid(told: dict[str, Any]) -> None:
    for path, operations in told["paths"].items():
        for operation in operations.values():
            if "requestBody" not in operation:
                continue
            (content,) = operation["requestBody"]["content"].values()
            name = content["schema"].get("$ref", "").rpartition("/")[2]
            examples = told["components"]["schemas"].get(name, {}).get("examples")
            assert examples or content.get("examples") or content.get("example"), path


def test_the_native_examples_are_served(shared: LiveServer) -> None:
    with shared.client() as client:
        for body in wire.InfillRequest.model_json_schema()["examples"]:
            assert client.infill(wire.InfillRequest.model_validate(body)).reason == "ok"


def test_every_key_of_a_request_is_explained(told: dict[str, Any]) -> None:
    properties = told["components"]["schemas"]["InfillRequest"]["properties"]
    assert not [name for name, about in properties.items() if "description" not in about]


def test_events_are_described(told: dict[str, Any]) -> None:
    answer = told["paths"]["/v1/infill"]["post"]["responses"]["200"]
    assert "event: done" in answer["content"]["text/event-stream"]["example"]
    assert "tokens" in told["components"]["schemas"]["CanvasEvent"]["properties"]
