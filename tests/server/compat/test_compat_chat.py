"""`POST /v1/chat/completions`: shapes, streams, switches and refusals, with a scripted worker."""

import json
from typing import Any

import dialects
import httpx
import pytest
from fake_worker import FakeWorker, Script
from live_server import LiveServer

from infilld.engine.conversation import ChatRequest, Message
from infilld.engine.errors import NotEnoughMemory

ASK: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


def post(server: LiveServer, body: dict[str, Any], path: str = PATH) -> httpx.Response:
    return dialects.post(server, path, body)


def events(got: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream that ended as OpenAI's do."""
    assert got.headers["content-type"].startswith("text/event-stream")
    *frames, rest = got.text.split("\n\n")
    assert (frames[-1], rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def asked(server: LiveServer) -> ChatRequest:
    request = server.worker.jobs[-1].request
    assert isinstance(request, ChatRequest)
    return request


def test_the_reply_is_openais(server: LiveServer) -> None:
    got = post(server, ASK).json()
    assert got.pop("created") > 1_600_000_000
    assert got == {
        "id": "chatcmpl-job-0",
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "return 1"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "infilld": {"id": "job-0", "reason": "ok", "why": ""},
    }


def test_every_field_reaches_the_engine(server: LiveServer) -> None:
    body = ASK | {
        "messages": [
            {"role": "developer", "content": "be short"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "42", "tool_call_id": "x"},
        ],
        "max_tokens": 9,
        "max_completion_tokens": 7.0,
        "n": 2,
        "stop": ["x", "", "y"],
        "seed": 3,
        "temperature": 0,
        "reasoning_effort": "high",
        "t_max_predict_ms": 250,
        "unknown": {"to": "us"},
        "top_p": 0.5,
    }
    server.worker.script = Script(texts=("a", "b"))
    got = post(server, body).json()
    assert asked(server) == ChatRequest(
        messages=(
            Message("system", "be short"),
            Message("user", "ab"),
            Message("assistant", ""),
            Message("user", "42"),
        ),
        alternatives=2,
        max_tokens=7,
        stop=("x", "y"),
        seed=3,
        greedy=True,
        think=True,
        deadline_ms=250,
    )
    assert [each["message"]["content"] for each in got["choices"]] == ["a", "b"]


def test_what_is_null_or_absent_means_nothing(server: LiveServer) -> None:
    keys = ("max_tokens", "n", "stop", "stream", "seed", "temperature", "response_format", "tools")
    assert post(server, ASK | dict.fromkeys(keys) | {"seed": -1, "stop": ""}).status_code == 200
    assert asked(server) == ChatRequest(messages=(Message("user", "hello"),))


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "think": True}, False),
        ({"reasoning_effort": "instant"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning": {"effort": "medium"}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 1}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"think": True}, True),
        ({"think": "high"}, True),
        ({"think": False}, False),
        ({}, False),
    ],
)
def test_the_thinking_switch(server: LiveServer, switch: dict[str, Any], expected: bool) -> None:
    assert post(server, ASK | switch).status_code == 200
    assert asked(server).think is expected


def test_thoughts_stay_apart(server: LiveServer) -> None:
    server.worker.script = Script(texts=("yes",), thoughts="because")
    (choice,) = post(server, ASK | {"think": True}).json()["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "because",
        "reasoning": "because",
    }
    chunks = events(post(server, ASK | {"think": True, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "because"
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "because"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"


def test_a_stream_appends_what_is_final(server: LiveServer) -> None:
    server.worker.script = Script(texts=("one two three",))
    chunks = events(post(server, ASK | {"stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-job-0"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {"content": " two"},
        {"content": " three"},
        {},
    ]
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes == [None] * 4 + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_tells_its_usage_when_asked(server: LiveServer) -> None:
    *chunks, last = events(
        post(server, ASK | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_a_stream_of_several_answers_has_each_of_them(server: LiveServer) -> None:
    server.worker.script = Script(texts=("a b", "c d"))
    chunks = [each["choices"][0] for each in events(post(server, ASK | {"stream": True, "n": 2}))]
    texts = dict.fromkeys((0, 1), "")
    for chunk in chunks:
        texts[chunk["index"]] += chunk["delta"].get("content", "")
    assert texts == {0: "a b", 1: "c d"}
    assert [chunk["index"] for chunk in chunks if chunk["finish_reason"]] == [0, 1]


def test_diffusing_replaces_the_text(server: LiveServer) -> None:
    server.worker.script = Script(texts=("one two three",))
    chunks = events(post(server, ASK | {"stream": True, "diffusing": True}))
    shown = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert shown[1:4] == ["oneTWO THREE", "one twoTHREE", "one two three"]
    assert shown[-2] == "one two three"


@pytest.mark.parametrize(
    ("finish", "told"), [("stop", "stop"), ("length", "length"), ("deadline", "length")]
)
def test_why_it_ends(server: LiveServer, finish: Any, told: str) -> None:
    server.worker.script = Script(finish=finish)
    assert post(server, ASK).json()["choices"][0]["finish_reason"] == told


def test_no_answer_is_an_empty_one_with_its_reason(server: LiveServer) -> None:
    server.worker.script = Script(reason="deadline", why="too late", drafts=())
    got = post(server, ASK).json()
    (choice,) = got["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert got["infilld"] == {"id": "job-0", "reason": "deadline", "why": "too late"}
    last = events(post(server, ASK | {"stream": True}))[-1]
    assert last["infilld"]["reason"] == "deadline"


def test_nothing_is_written_where_no_token_is_wanted(server: LiveServer) -> None:
    """llama.vim prepares for an instruction so."""
    got = post(server, ASK | {"n_predict": 0, "samplers": [], "response_fields": [""]})
    assert got.json()["choices"][0]["message"]["content"] == ""
    *_, last = events(post(server, ASK | {"max_tokens": 0, "stream": True}))
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert last["id"] != got.json()["id"]
    assert server.worker.jobs == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown_option"),
        ({"messages": []}, "bad_request"),
        ({"n": 99}, "unknown_option"),
        ({"stop": ["x"] * 65}, "unknown_option"),
        ({"stop": "x" * 1025}, "unknown_option"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "bad_text"),
    ],
)
def test_what_cannot_be_served_is_a_400(
    shared: LiveServer, change: dict[str, Any], code: str
) -> None:
    for stream in (False, True):
        content = json.dumps(ASK | change | {"stream": stream})
        headers = {"Authorization": f"Bearer {shared.token}", "Content-Type": "application/json"}
        got = httpx.post(shared.url + PATH, content=content, headers=headers, timeout=20)
        assert got.status_code == 400, got.text
        assert code in got.text


def test_no_refusal_sends_back_what_was_sent(shared: LiveServer) -> None:
    """Not even where what was sent is made to look like the end of a quotation."""
    role = "a'b\"c" * 20_000
    part = {"role": "user", "content": [{"type": role}]}
    for messages in ([{"role": role, "content": "x"}], [part]):
        got = post(shared, ASK | {"messages": messages})
        assert got.status_code == 400
        assert len(got.content) < 2000


def test_tools_that_may_not_be_called_are_fine(server: LiveServer) -> None:
    assert post(server, ASK | {"tools": [{}], "tool_choice": "none"}).status_code == 200
    assert post(server, ASK | {"tools": []}).status_code == 200


def test_an_error_within_a_stream_is_an_event(server: LiveServer) -> None:
    server.worker.script = Script(error=NotEnoughMemory("6 GB are missing"), texts=("a b",))
    frames = post(server, ASK | {"stream": True}).text.split("\n\n")
    error = json.loads(frames[-2].removeprefix("data: "))["error"]
    assert "6 GB" in error["message"]


def test_a_client_that_leaves_cancels(server: LiveServer) -> None:
    server.worker.hold()
    headers = {"Authorization": f"Bearer {server.token}"}
    body = ASK | {"stream": True}
    with httpx.stream("POST", server.url + PATH, json=body, headers=headers) as got:
        next(got.iter_bytes())
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)


def test_the_path_without_a_version_is_served(server: LiveServer) -> None:
    assert post(server, ASK, "/chat/completions").status_code == 200


def test_a_worker_that_loads_is_a_503(server: LiveServer) -> None:
    server.worker.state = "loading"
    assert post(server, ASK).status_code == 503
    assert isinstance(server.worker, FakeWorker)
