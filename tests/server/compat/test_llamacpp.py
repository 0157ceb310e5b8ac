"""llama.cpp's routes as llama.vim and llama.vscode use them, with a scripted worker."""

import json
from typing import Any

import dialects
import httpx
import pytest
from dialects import get
from fake_worker import Script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LiveServer

from infilld.engine.request import Context, InfillRequest, InfillResult, Span, Timings, Usage
from infilld.server.compat import llamacpp_reply

ASK: dict[str, Any] = {"input_prefix": "def f():\n", "prompt": "    ", "input_suffix": "\n"}
FIELDS = [
    "content",
    *(
        f"timings/{phase}_{what}"
        for phase in ("prompt", "predicted")
        for what in ("n", "ms", "per_token_ms", "per_second")
    ),
    "truncated",
    "tokens_cached",
]
TIMINGS = {
    "cache_n": 0,
    "prompt_n": 10,
    "prompt_ms": 0.0,
    "prompt_per_token_ms": 0.0,
    "prompt_per_second": 0.0,
    "predicted_n": 2,
    "predicted_ms": 1.0,
    "predicted_per_token_ms": 0.5,
    "predicted_per_second": 2000.0,
}


def post(server: LiveServer, body: dict[str, Any], path: str = "/infill") -> httpx.Response:
    return dialects.post(server, path, body)


def asked(server: LiveServer) -> InfillRequest:
    request = server.worker.jobs[-1].request
    assert isinstance(request, InfillRequest)
    return request


def test_the_reply_has_every_field(server: LiveServer) -> None:
    got = post(server, ASK | {"seed": 4, "n_predict": 40}).json()
    assert got == {
        "index": 0,
        "content": "return 1",
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": "fake",
        "tokens_predicted": 2,
        "tokens_evaluated": 10,
        "generation_settings": {
            "n_ctx": 256,
            "n_predict": 40,
            "n_indent": 0,
            "n_cmpl": 1,
            "seed": 4,
            "stop": [],
            "stream": False,
            "t_max_predict_ms": 0,
        },
        "prompt": "def f():\n    ",
        "has_new_line": False,
        "truncated": False,
        "stop_type": "eos",
        "stopping_word": "",
        "tokens_cached": 0,
        "timings": TIMINGS,
        "infilld": {"id": "job-0", "reason": "ok", "why": ""},
    }


def test_the_prompt_is_the_end_of_the_prefix(server: LiveServer) -> None:
    extra = [
        {"filename": "b.py", "text": "B = 1\n", "time": [1, 2]},
        {"text": "C = 2\n"},
        {"filename": "empty.py", "text": ""},
    ]
    body = ASK | {"input_extra": extra, "n_predict": 128, "seed": -1, "stop": ["x"], "id_slot": 0}
    assert post(server, body | {"samplers": ["infill"], "top_k": 40}).status_code == 200
    assert asked(server) == InfillRequest(
        text="def f():\n    \n",
        spans=(Span(13, 13),),
        context=(Context("b.py", "B = 1\n", "recent"), Context("context", "C = 2\n", "recent")),
        max_tokens=128,
    )


@pytest.mark.parametrize(
    ("times", "deadline_ms"),
    [
        ({"t_max_prompt_ms": 500, "t_max_predict_ms": 250}, 750),
        ({"t_max_predict_ms": 1000}, 1500),
        ({"t_max_prompt_ms": 500}, None),
        ({"t_max_predict_ms": 0}, None),
        ({"t_max_prompt_ms": 1, "t_max_predict_ms": 1}, 10),
        ({"t_max_predict_ms": 10**30}, 3_600_000),
        ({}, None),
    ],
)
def test_the_deadline_has_time_for_the_prompt(
    server: LiveServer, times: dict[str, Any], deadline_ms: float | None
) -> None:
    assert post(server, ASK | times).status_code == 200
    assert asked(server).deadline_ms == deadline_ms


def test_no_tokens_warm_the_cache_behind_everything_else(server: LiveServer) -> None:
    """As llama.vim and llama.vscode prepare the pieces of other files."""
    body = {
        "id_slot": 0,
        "input_prefix": "",
        "input_suffix": "",
        "input_extra": [{"filename": "b.py", "text": "B = 1\n", "time": [1, 2]}],
        "prompt": "",
        "n_predict": 0,
        "temperature": 0.0,
        "samplers": [],
        "stream": False,
        "cache_prompt": True,
        "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1,
        "response_fields": [""],
    }
    assert post(server, body).json() == {}
    request = asked(server)
    assert (request.warm, request.background, request.deadline_ms) == (True, True, None)
    assert request.context == (Context("b.py", "B = 1\n", "recent"),)
    whole = post(server, body | {"response_fields": None}).json()
    assert (whole["content"], whole["stop_type"]) == ("", "limit")


def test_fields_with_a_slash_become_flat_keys(server: LiveServer) -> None:
    """What llama.vim looks at: the raw text, and six keys with a slash."""
    got = post(server, ASK | {"response_fields": FIELDS})
    assert '"content":"return 1"' in got.text
    assert list(got.json()) == FIELDS
    assert {f"timings/{key}": value for key, value in TIMINGS.items() if key != "cache_n"} == {
        key: value for key, value in got.json().items() if key.startswith("timings/")
    }


_PARTS = st.sampled_from(
    ["content", "timings", "prompt_n", "", "/", "x", "0", "infilld", "é", "stop"]
)
_PATHS = st.one_of(
    st.lists(_PARTS, max_size=4).map("/".join), st.none(), st.integers(), st.lists(st.booleans())
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=st.lists(_PATHS, max_size=5), n_cmpl=st.integers(-1, 6))
def test_no_list_of_fields_breaks_an_answer(
    shared: LiveServer, fields: list[object], n_cmpl: int
) -> None:
    got = post(shared, ASK | {"response_fields": fields, "n_cmpl": n_cmpl})
    assert got.status_code == 200
    replies = got.json() if n_cmpl > 1 else [got.json()]
    for reply in replies:
        assert not fields or set(reply) <= {str(field) for field in fields}
        assert bool(fields) or "timings" in reply


def test_fields_lead_through_objects_only() -> None:
    reply = {"a": {"b": {"c": 1}}, "d": [1], "": {"x": 2}}
    assert llamacpp_reply.chosen(reply, ["a/b/c", "a/b", "a/c", "d/0", "/x", "a/b/c/d"]) == {
        "a/b/c": 1,
        "a/b": {"c": 1},
        "/x": 2,
    }


def test_what_was_cached_was_not_evaluated() -> None:
    spent = Timings(encode_ms=30.0, denoise_ms=100.0)
    result = InfillResult(
        id="x", seed=0, usage=Usage(prompt_tokens=20, cached_tokens=14), timings=spent
    )
    told = llamacpp_reply.timings(result, 5)
    assert (told["cache_n"], told["prompt_n"], told["predicted_n"]) == (14, 6, 5)
    assert (told["prompt_per_token_ms"], told["prompt_per_second"]) == (5.0, 200.0)
    assert (told["predicted_per_token_ms"], told["predicted_per_second"]) == (20.0, 50.0)


def test_several_completions_are_an_array(server: LiveServer) -> None:
    server.worker.script = Script(texts=("one", "two", "three", "four", "five"))
    got = post(server, ASK | {"n_cmpl": 3}).json()
    assert [(each["index"], each["content"]) for each in got] == [
        (0, "one"),
        (1, "two"),
        (2, "three"),
    ]
    assert len(post(server, ASK | {"n_cmpl": 99}).json()) == 4
    server.worker.script = Script(reason="empty", why="nothing is missing")
    assert [each["content"] for each in post(server, ASK | {"n_cmpl": 3}).json()] == [""]


def test_silence_is_an_empty_content_with_its_reason(server: LiveServer) -> None:
    server.worker.script = Script(reason="low_confidence", why="not sure")
    got = post(server, ASK).json()
    assert (got["content"], got["stop_type"]) == ("", "eos")
    assert got["infilld"] == {"id": "job-0", "reason": "low_confidence", "why": "not sure"}
    server.worker.script = Script(reason="deadline")
    assert post(server, ASK).json()["stop_type"] == "limit"


def test_a_stopping_word_is_named(server: LiveServer) -> None:
    server.worker.script = Script(texts=("a = 1; b = 2",))
    got = post(server, ASK | {"stop": [";", "\n\n"]}).json()
    assert (got["content"], got["stop_type"], got["stopping_word"]) == ("a = 1", "word", ";")


def test_lines_with_less_indentation_end_it(server: LiveServer) -> None:
    server.worker.script = Script(texts=("a = 1\n    b = 2\n\nc = 3",))
    assert post(server, ASK | {"n_indent": 4}).json()["content"] == "a = 1\n    b = 2"


def test_a_stream_ends_with_everything_that_is_told(server: LiveServer) -> None:
    frames = post(server, ASK | {"stream": True}).text.split("\n\n")
    assert frames.pop() == ""
    first, last = (json.loads(frame.removeprefix("data: ")) for frame in frames)
    assert first == {"index": 0, "content": "return 1", "tokens": [], "stop": False}
    assert (last["content"], last["stop"], last["stop_type"]) == ("", True, "eos")
    assert last["timings"] == TIMINGS


def test_a_completion_is_a_text_to_go_on_with(server: LiveServer) -> None:
    assert post(server, {"prompt": "x = "}, "/completion").json()["content"] == "return 1"
    assert (asked(server).text, asked(server).spans) == ("x = ", (Span(4, 4),))
    assert post(server, {"prompt": ["x = "]}, "/completions").status_code == 200
    marked = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert post(server, {"prompt": marked}, "/completion").status_code == 200
    assert (asked(server).text, asked(server).spans) == ("ab", (Span(1, 1),))


@pytest.mark.parametrize("prompt", [[1, 2, 3], ["a", "b"], [[1], [2]], []])
def test_prompts_that_are_no_single_text_are_refused(shared: LiveServer, prompt: object) -> None:
    got = post(shared, {"prompt": prompt}, "/completion")
    assert got.status_code == 400
    assert "one text" in got.text


def test_the_server_describes_itself_without_paths(server: LiveServer) -> None:
    got = get(server, "/props")
    assert (got["model_path"], got["total_slots"], got["is_sleeping"]) == ("fake", 1, False)
    assert got["default_generation_settings"]["n_ctx"] == 256
    assert got["build_info"].startswith("infilld ")
    server.worker.state = "unloaded"
    assert get(server, "/props")["is_sleeping"] is True


def test_slots_show_that_somebody_works_and_no_text(server: LiveServer) -> None:
    assert get(server, "/slots") == [{"id": 0, "n_ctx": 256, "is_processing": False}]
    server.worker.hold()
    headers = {"Authorization": f"Bearer {server.token}"}
    with httpx.stream("POST", server.url + "/infill", json=ASK | {"stream": True}, headers=headers):
        assert get(server, "/slots") == [{"id": 0, "n_ctx": 256, "is_processing": True}]
        server.worker.release()
