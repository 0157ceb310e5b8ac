"""What the daemon says of itself, in its own words and in those of llama.cpp and OpenAI."""

from pathlib import Path

import httpx
import pytest
from fake_worker import FakeWorker
from live_server import LiveServer, live_server

from infilld.engine.errors import NotEnoughMemory
from infilld.server.routes import facts


def test_health_of_a_loaded_model_is_ok_for_every_client(shared: LiveServer) -> None:
    got = httpx.get(shared.url + "/health")
    assert got.status_code == 200
    assert set(got.json()) == {"api", "version", "state", "status"}
    assert (got.json()["state"], got.json()["status"]) == ("ready", "ok")


def test_health_while_loading_is_llama_cpps_error_beside_our_state(tmp_path: Path) -> None:
    with live_server(tmp_path / "state", FakeWorker(is_loading=True)) as server:
        got = httpx.get(server.url + "/health")
        assert got.status_code == 503
        assert got.json()["error"] == {
            "code": 503,
            "message": "Loading model",
            "type": "unavailable_error",
        }
        assert got.json()["state"] == "loading"
        server.worker.finish_loading(NotEnoughMemory("6 GB are missing"))
        got = httpx.get(server.url + "/health")
        assert (got.status_code, got.json()["state"]) == (503, "failed")
        assert got.json()["error"]["message"] != "Loading model"


def test_models_are_listed_for_openai_and_for_llama_cpp(shared: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {shared.token}"}
    listed = httpx.get(shared.url + "/v1/models", headers=headers).json()
    assert listed["object"] == "list"
    (entry,) = listed["data"]
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("fake", "model", "infilld")
    assert isinstance(entry["created"], int)
    assert set(entry["meta"]) == {"n_ctx_train", "n_params", "size"}
    (other,) = listed["models"]
    assert (other["name"], other["capabilities"]) == ("fake", ["completion"])


def test_a_model_is_told_by_its_name(shared: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {shared.token}"}
    (entry,) = httpx.get(shared.url + "/v1/models", headers=headers).json()["data"]
    assert httpx.get(shared.url + "/v1/models/fake", headers=headers).json() == entry
    for other in ("gpt-4", "org/fake"):
        got = httpx.get(f"{shared.url}/v1/models/{other}", headers=headers)
        assert (got.status_code, got.json()["error"]["code"]) == (404, "unknown_id")
        assert "the configured model is fake" in got.json()["error"]["message"]


@pytest.mark.parametrize(
    ("parameters", "size"),
    [(0, "0"), (999, "999"), (3_300_000, "3.3M"), (25_200_000_000, "25.2B")],
)
def test_a_size_is_written_as_people_write_it(parameters: int, size: str) -> None:
    assert facts.facts({"model": "m", "parameters": parameters}).size == size


def test_what_is_not_known_yet_is_nothing() -> None:
    known = facts.facts({"model": "m", "state": "loading"})
    assert (known.parameters, known.context_tokens, known.can_think) == (0, 0, False)
    assert known.digest != facts.facts({"model": "n"}).digest
    assert len(known.digest) == 64


def test_what_a_model_can_is_told() -> None:
    told = {"canvas_tokens": 256, "prompt_tokens": 512, "thinking": True, "max_live": 4}
    known = facts.facts({"model": "m", **told})
    assert (known.context_tokens, known.can_think, known.max_live) == (768, True, 4)
    assert facts.facts({"model": "m", **told, "context_tokens": 9000}).context_tokens == 9256


def test_times_are_utc() -> None:
    assert facts.iso_time(0.5) == "1970-01-01T00:00:00.500000Z"
