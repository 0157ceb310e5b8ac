"""Ollama's routes, with a scripted worker."""

import json
from typing import Any

import dialects
import httpx
import pytest
from dialects import get
from fake_worker import Script
from live_server import LiveServer

from infilld.engine.conversation import ChatRequest, Message
from infilld.engine.errors import NotEnoughMemory
from infilld.engine.request import InfillRequest, Span

FILL: dict[str, Any] = {"model": "any:7b", "prompt": "a", "suffix": "b", "stream": False}
CHAT: dict[str, Any] = {"model": "any:7b", "messages": [{"role": "user", "content": "hello"}]}
COSTS = {
    "total_duration": 1_500_000,
    "load_duration": 0,
    "prompt_eval_count": 10,
    "prompt_eval_duration": 0,
    "eval_count": 2,
    "eval_duration": 1_000_000,
}


def post(server: LiveServer, body: dict[str, Any], path: str = "/api/generate") -> httpx.Response:
    return dialects.post(server, path, body)


def lines(got: httpx.Response) -> list[dict[str, Any]]:
    assert got.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in got.text.split("\n")[:-1]]


def gap(server: LiveServer) -> InfillRequest:
    request = server.worker.jobs[-1].request
    assert isinstance(request, InfillRequest)
    return request


def question(server: LiveServer) -> ChatRequest:
    request = server.worker.jobs[-1].request
    assert isinstance(request, ChatRequest)
    return request


def test_a_gap_is_filled_in_one_object(server: LiveServer) -> None:
    got = post(server, FILL).json()
    assert got.pop("created_at").endswith("Z")
    assert got == {
        "model": "any:7b",
        "response": "return 1",
        "done": True,
        "done_reason": "stop",
        "infilld": {"id": "job-0", "reason": "ok", "why": ""},
        **COSTS,
    }
    assert gap(server) == InfillRequest(text="ab", spans=(Span(1, 1),))


def test_options_reach_the_engine(server: LiveServer) -> None:
    options = {"num_predict": 12, "stop": ["\n\n"], "seed": 5, "temperature": 0.2, "num_ctx": 4096}
    more = {"context": [1], "template": "x", "raw": True, "keep_alive": "5m", "images": []}
    assert post(server, FILL | {"options": options} | more).status_code == 200
    assert (gap(server).max_tokens, gap(server).seed) == (12, 5)
    for none in (-1, -2, 0, None):
        assert post(server, FILL | {"options": {"num_predict": none}}).status_code == 200
        assert (gap(server).max_tokens, gap(server).warm) == (None, False)


def test_a_fill_ends_before_a_stop_text(server: LiveServer) -> None:
    server.worker.script = Script(texts=("one\n\ntwo",))
    for stop in ("\n\n", ["x", "\n\n"]):
        assert post(server, FILL | {"options": {"stop": stop}}).json()["response"] == "one"


def test_a_stream_is_what_comes_unless_told_otherwise(server: LiveServer) -> None:
    got = lines(post(server, {"model": "m", "prompt": "a", "suffix": "b"}))
    assert [(line["response"], line["done"]) for line in got] == [("return 1", False), ("", True)]
    assert {key: got[-1][key] for key in COSTS} == COSTS


def test_a_stream_of_nothing_says_why(server: LiveServer) -> None:
    server.worker.script = Script(reason="low_confidence", why="not sure")
    (last,) = lines(post(server, FILL | {"stream": True}))
    assert (last["response"], last["done"], last["done_reason"]) == ("", True, "stop")
    assert last["infilld"] == {"id": "job-0", "reason": "low_confidence", "why": "not sure"}
    server.worker.script = Script(reason="deadline")
    assert post(server, FILL).json()["done_reason"] == "length"


def test_marks_in_a_prompt_are_a_gap(server: LiveServer) -> None:
    prompt = "<fim_prefix>x = <fim_suffix>\n<fim_middle>"
    assert post(server, {"prompt": prompt, "raw": True, "stream": False}).status_code == 200
    assert (gap(server).text, gap(server).spans) == ("x = \n", (Span(4, 4),))


def test_a_raw_prompt_is_gone_on_with(server: LiveServer) -> None:
    assert post(server, {"prompt": "x = ", "raw": True, "stream": False}).status_code == 200
    assert (gap(server).text, gap(server).spans) == ("x = ", (Span(4, 4),))


def test_an_empty_suffix_is_none(server: LiveServer) -> None:
    """Ollama's own client sends every key."""
    assert post(server, {"prompt": "why?", "suffix": "", "system": ""}).status_code == 200
    assert question(server).messages == (Message("user", "why?"),)


def test_any_other_prompt_is_a_question(server: LiveServer) -> None:
    server.worker.script = Script(texts=("one two",), thoughts="hm")
    body = {"model": "m", "prompt": "why?", "system": "be short", "think": True}
    options = {"num_predict": 9, "stop": ";", "seed": 2, "temperature": 0}
    got = lines(post(server, body | {"options": options}))
    assert question(server) == ChatRequest(
        messages=(Message("system", "be short"), Message("user", "why?")),
        max_tokens=9,
        stop=(";",),
        seed=2,
        greedy=True,
        think=True,
    )
    assert [line["response"] for line in got] == ["one", " two", ""]
    assert [line.get("thinking") for line in got] == ["hm", None, None]
    whole = post(server, body | {"stream": False}).json()
    assert (whole["response"], whole["thinking"], whole["done"]) == ("one two", "hm", True)


def test_a_chat_is_streamed_as_messages(server: LiveServer) -> None:
    server.worker.script = Script(texts=("one two",), finish="length")
    got = lines(post(server, CHAT | {"think": False}, "/api/chat"))
    assert [line["message"] for line in got] == [
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": " two"},
        {"role": "assistant", "content": ""},
    ]
    assert (got[-1]["done"], got[-1]["done_reason"]) == (True, "length")
    whole = post(server, CHAT | {"stream": False}, "/api/chat").json()
    assert whole["message"] == {"role": "assistant", "content": "one two"}
    assert {key: whole[key] for key in COSTS} == COSTS


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_nothing_to_say_loads_the_model(server: LiveServer, path: str) -> None:
    got = post(server, {"model": "m"}, path).json()
    assert (got["done"], got["done_reason"]) == (True, "load")
    assert gap(server).warm
    assert server.worker.state == "ready"


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
@pytest.mark.parametrize("keep_alive", [0, 0.0, "0", "0s", "0.0m"])
def test_nothing_to_say_and_no_time_unloads_it(
    server: LiveServer, path: str, keep_alive: object
) -> None:
    got = post(server, {"model": "m", "keep_alive": keep_alive}, path).json()
    assert (got["done"], got["done_reason"]) == (True, "unload")
    assert (server.worker.jobs, server.worker.state) == ([], "unloaded")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_no_time_unloads_behind_an_answer(server: LiveServer, is_streamed: bool) -> None:
    assert post(server, FILL | {"keep_alive": 0, "stream": is_streamed}).status_code == 200
    assert (len(server.worker.jobs), server.worker.state) == (1, "unloaded")


@pytest.mark.parametrize("keep_alive", [-1, "5m", "10s", "-1", "", None, 300])
def test_any_other_time_keeps_it(server: LiveServer, keep_alive: object) -> None:
    assert post(server, FILL | {"keep_alive": keep_alive}).status_code == 200
    assert server.worker.state == "ready"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", FILL | {"format": "yaml"}),
        ("/api/generate", {"prompt": "what?", "images": ["aGk="]}),
        ("/api/chat", CHAT | {"tools": [{"type": "function"}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}),
        ("/api/chat", {"messages": [{"role": "wizard", "content": "x"}]}),
        ("/api/generate", {"prompt": 3}),
    ],
)
def test_what_cannot_be_served_is_a_400(
    shared: LiveServer, path: str, body: dict[str, Any]
) -> None:
    got = post(shared, body, path)
    assert got.status_code == 400, got.text
    assert "error" in got.json()


def test_an_error_within_a_stream_is_a_line(server: LiveServer) -> None:
    server.worker.script = Script(error=NotEnoughMemory("6 GB are missing"))
    *_, last = lines(post(server, FILL | {"stream": True}))
    assert last == {"error": f"6 GB are missing. {NotEnoughMemory.remedy}"}


def test_a_client_that_leaves_cancels(server: LiveServer) -> None:
    server.worker.hold()
    headers = {"Authorization": f"Bearer {server.token}"}
    body = FILL | {"stream": True}
    with httpx.stream("POST", server.url + "/api/generate", json=body, headers=headers):
        pass
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)


def test_the_model_is_listed_and_shown(server: LiveServer) -> None:
    (entry,) = get(server, "/api/tags")["models"]
    assert (entry["name"], entry["model"], entry["details"]["format"]) == (
        "fake",
        "fake",
        "safetensors",
    )
    assert len(entry["digest"]) == 64
    shown = post(server, {"model": "codellama:7b-code"}, "/api/show").json()
    assert shown["capabilities"] == ["completion", "insert"]
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == 256
    assert get(server, "/api/version")["version"].count(".") == 2


def test_only_a_model_in_memory_runs(server: LiveServer) -> None:
    (entry,) = get(server, "/api/ps")["models"]
    assert (entry["name"], entry["size_vram"], entry["context_length"]) == ("fake", 0, 256)
    server.worker.unload()
    assert get(server, "/api/ps") == {"models": []}


def test_somebody_looks_for_a_server(server: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {server.token}"}
    assert httpx.head(server.url + "/", headers=headers).status_code == 200
