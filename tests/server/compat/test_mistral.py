"""`POST /v1/fim/completions` as Mistral's and Mercury's clients use it, with a scripted worker."""

from typing import Any

import pytest
from dialects import events, last_asked, post
from fake_worker import Script
from live_server import LiveServer

from infilld.engine.request import Span

PATH = "/v1/fim/completions"
P, S = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
# Bodies as these programs write them.
MINUET = {
    "model": "codestral-latest",
    "prompt": P,
    "suffix": S,
    "stream": False,
    "max_tokens": 256,
    "stop": ["\n\n"],
}
ZED = {
    "model": "codestral-latest",
    "prompt": P,
    "suffix": S,
    "max_tokens": 150,
    "temperature": 0.2,
    "top_p": 1.0,
    "stream": False,
    "stop": None,
    "random_seed": None,
    "min_tokens": None,
}
MERCURY = {
    "model": "mercury-edit-2",
    "prompt": P,
    "suffix": S,
    "max_tokens": 64,
    "presence_penalty": 1,
    "stop": "\n\n",
}


@pytest.fixture
def served(shared: LiveServer) -> LiveServer:
    shared.worker.script = Script()
    return shared


def test_the_reply_is_a_turn_and_a_text(served: LiveServer) -> None:
    got = post(served, PATH, {"model": "codestral", "prompt": P, "suffix": S}).json()
    job_id = served.worker.jobs[-1].id
    assert isinstance(got.pop("created"), int)
    assert got == {
        "id": f"cmpl-{job_id}",
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "return 1", "tool_calls": None},
                "text": "return 1",
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "infilld": {"id": job_id, "reason": "ok", "why": ""},
    }
    wanted = last_asked(served.worker)
    assert (wanted.text, wanted.spans) == (P + S, (Span(len(P), len(P)),))


def test_a_stream_has_deltas(served: LiveServer) -> None:
    *chunks, end = events(served, PATH, {"prompt": P, "suffix": S})
    assert end == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"] for chunk in chunks] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "return 1"},
                "text": "return 1",
                "finish_reason": None,
            }
        ],
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "text": "",
                "finish_reason": "stop",
            }
        ],
    ]
    assert chunks[-1]["usage"] == USAGE


def test_silence_is_an_empty_text_and_says_why(served: LiveServer) -> None:
    served.worker.script = Script(reason="unbalanced", why="A bracket is missing.")
    got = post(served, PATH, {"prompt": P, "suffix": S}).json()
    assert got["choices"][0]["message"]["content"] == got["choices"][0]["text"] == ""
    assert got["infilld"]["reason"] == "unbalanced"
    *chunks, _ = events(served, PATH, {"prompt": P})
    assert [chunk["infilld"]["why"] for chunk in chunks] == ["A bracket is missing."]


def test_every_field_reaches_the_engine(served: LiveServer) -> None:
    body = {"prompt": P, "min_tokens": 2, "max_tokens": 9, "random_seed": 4, "metadata": {"a": 1}}
    assert post(served, PATH, body).status_code == 200
    wanted = last_asked(served.worker)
    assert (wanted.min_tokens, wanted.max_tokens, wanted.seed) == (2, 9, 4)


@pytest.mark.parametrize("body", [MINUET, ZED, MERCURY], ids=["minuet", "zed", "mercury"])
def test_bodies_of_editors(served: LiveServer, body: dict[str, Any]) -> None:
    served.worker.script = Script(texts=["a + b\n\nmore"])
    got = post(served, PATH, body).json()
    cut = "a + b" if body["stop"] else "a + b\n\nmore"
    assert got["choices"][0]["message"]["content"] == cut
    assert last_asked(served.worker).text == P + S


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "metadata": 3}, "metadata"),
        ({"prompt": "a", "random_seed": "x"}, "random_seed"),
        ({"prompt": "a\udfff"}, "lone surrogate"),
    ],
)
def test_bad_bodies_say_what_is_wrong(served: LiveServer, body: object, word: str) -> None:
    got = post(served, PATH, body)
    assert got.status_code == 400
    assert word in got.json()["error"]["message"]
