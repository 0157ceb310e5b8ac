"""`POST /v1/completions` as OpenAI's clients use it, with a scripted worker."""

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from dialects import events, last_asked, post
from fake_worker import FakeWorker, Script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LiveServer

from infilld.engine import errors
from infilld.engine.request import Context, Span

PATH = "/v1/completions"
P, S = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 2,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 0},
}


@pytest.fixture
def served(shared: LiveServer) -> LiveServer:
    shared.worker.script = Script()
    return shared


def last_id(server: LiveServer) -> str:
    return server.worker.jobs[-1].id


def texts(server: LiveServer, body: dict[str, Any]) -> list[str]:
    got = post(server, PATH, body)
    assert got.status_code == 200, got.text
    return [choice["text"] for choice in got.json()["choices"]]


def test_the_reply_has_every_field(served: LiveServer) -> None:
    before = int(time.time())
    got = post(served, PATH, {"model": "gpt", "prompt": P, "suffix": S}).json()
    assert before <= got.pop("created") <= time.time()
    assert got == {
        "id": f"cmpl-{last_id(served)}",
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "return 1", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "infilld": {"id": last_id(served), "reason": "ok", "why": ""},
    }
    wanted = last_asked(served.worker)
    assert (wanted.text, wanted.spans) == (P + S, (Span(len(P), len(P)),))


def test_a_stream_has_the_same_shape_and_ends(served: LiveServer) -> None:
    served.worker.script = Script(texts=["a", "b"])
    body = {"prompt": P, "suffix": S, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, end = events(served, PATH, body)
    assert end == "[DONE]"
    heads = [(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks]
    assert set(heads) == {(f"cmpl-{last_id(served)}", "text_completion", "fake")}
    assert [chunk["usage"] for chunk in chunks] == [None] * 4 + [
        USAGE | {"completion_tokens": 2, "total_tokens": 12}
    ]
    assert [
        [(each["index"], each["text"], each["finish_reason"]) for each in chunk["choices"]]
        for chunk in chunks
    ] == [[(0, "a", None)], [(0, "", "stop")], [(1, "b", None)], [(1, "", "stop")], []]
    assert chunks[3]["infilld"] == {"id": last_id(served), "reason": "ok", "why": ""}


def test_no_usage_where_none_is_asked_for(served: LiveServer) -> None:
    *chunks, _ = events(served, PATH, {"prompt": P, "stream_options": None})
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_silence_is_an_empty_text_and_says_why(served: LiveServer, is_streamed: bool) -> None:
    served.worker.script = Script(reason="low_confidence", why="Not sure enough.")
    body = {"prompt": P, "suffix": S}
    if is_streamed:
        *chunks, _ = events(served, PATH, body)
        assert len(chunks) == 1
        got = chunks[0]
    else:
        got = post(served, PATH, body).json()
    assert got["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    assert got["infilld"]["reason"] == "low_confidence"
    assert got["infilld"]["why"] == "Not sure enough."


def test_every_field_reaches_the_engine(served: LiveServer) -> None:
    body = {
        "prompt": P,
        "suffix": S,
        "max_tokens": 4096.0,
        "min_tokens": 2,
        "n": 3,
        "seed": 2**64 + 5,
        "temperature": 0.2,
        "best_of": 4,
        "user": {"any": "thing"},
        "unheard_of": 1,
    }
    assert post(served, PATH, body).status_code == 200
    wanted = last_asked(served.worker)
    assert (wanted.max_tokens, wanted.min_tokens) == (240, 2)
    assert (wanted.alternatives, wanted.seed) == (3, 5)


def test_null_is_not_given(served: LiveServer) -> None:
    nothing = dict.fromkeys(
        [
            "model",
            "suffix",
            "max_tokens",
            "n",
            "stop",
            "stream",
            "stream_options",
            "seed",
            "logprobs",
            "echo",
            "temperature",
            "top_p",
            "response_format",
            "grammar",
            "guided_json",
            "structured_outputs",
        ]
    )
    assert texts(served, nothing | {"prompt": P}) == ["return 1"]
    assert last_asked(served.worker).text == P
    assert texts(served, {"prompt": None}) == ["return 1"]
    assert last_asked(served.worker).text == ""


def test_several_prompts_are_answered_in_order(served: LiveServer) -> None:
    served.worker.script = lambda asked: Script(texts=[asked.text + "1", asked.text + "2"])
    body = {"prompt": ["a", "b"], "n": 2}
    got = post(served, PATH, body).json()
    expected = [(0, "a1"), (1, "a2"), (2, "b1"), (3, "b2")]
    assert [(each["index"], each["text"]) for each in got["choices"]] == expected
    assert got["usage"]["prompt_tokens"] == 20
    *chunks, _ = events(served, PATH, body)
    sent = [each for chunk in chunks for each in chunk["choices"] if each["text"]]
    assert [(each["index"], each["text"]) for each in sent] == expected
    first, second = served.worker.jobs[-2:]
    assert {chunk["id"] for chunk in chunks} == {f"cmpl-{first.id}"}
    told = [chunk["infilld"]["id"] for chunk in chunks if "infilld" in chunk]
    assert told == [first.id, first.id, second.id, second.id]


def test_the_prompt_is_echoed_as_it_was_sent(served: LiveServer) -> None:
    prompt = f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>"
    assert texts(served, {"prompt": prompt, "echo": True}) == [prompt + "return 1"]
    chunk, *_ = events(served, PATH, {"prompt": "x", "echo": True})
    assert chunk["choices"][0]["text"] == "xreturn 1"


def test_log_probabilities_belong_to_tokens(served: LiveServer) -> None:
    body = {"prompt": "ab", "logprobs": 1, "echo": True}
    (choice,) = post(served, PATH, body).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["return ", "1"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": None,
        "text_offset": [2, 9],
    }
    (choice,) = post(served, PATH, {"prompt": "", "logprobs": 0, "stop": "1"}).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["return "]
    (choice,) = post(served, PATH, {"prompt": "", "logprobs": 5, "stop": ["urn"]}).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("ret", None)


def test_a_text_that_is_as_long_as_it_may_be_says_so(served: LiveServer) -> None:
    got = post(served, PATH, {"prompt": P, "max_tokens": 2}).json()
    assert got["choices"][0]["finish_reason"] == "length"
    got = post(served, PATH, {"prompt": P, "max_tokens": 0}).json()
    assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("", "length")
    assert last_asked(served.worker).warm


def test_markers_in_the_prompt_are_read(served: LiveServer) -> None:
    texts(served, {"prompt": f"<|file_sep|>a.py\n<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>"})
    wanted = last_asked(served.worker)
    assert (wanted.text, wanted.spans, wanted.path) == (P + S, (Span(len(P), len(P)),), "a.py")


def test_a_prompt_beside_a_suffix_stays_whole(served: LiveServer) -> None:
    prompt = f"<fim_prefix>{P}<fim_suffix>{S}<fim_middle>"
    texts(served, {"prompt": prompt, "suffix": "\n"})
    assert last_asked(served.worker).text == prompt + "\n"


# Bodies as these programs write them.
ZED = {
    "model": "qwen2.5-coder",
    "prompt": f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
    "max_tokens": 64,
    "temperature": None,
    "stop": ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
    "environment": None,
}
MINUET = {
    "model": "any",
    "prompt": P,
    "suffix": S,
    "max_tokens": 256,
    "top_p": 0.9,
    "stop": ["\n\n"],
    "stream": True,
}
CONTINUE = {
    "model": "any",
    "prompt": P,
    "suffix": S,
    "max_tokens": 4096,
    "temperature": 0.01,
    "stop": ["\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```"],
    "stream": True,
}
CURSORTAB = {
    "model": "",
    "prompt": P,
    "suffix": S,
    "temperature": 0.0,
    "max_tokens": 512,
    "top_k": 50,
    "stop": None,
    "n": 1,
    "echo": False,
    "stream": True,
}


@pytest.mark.parametrize("body", [ZED, MINUET, CONTINUE, CURSORTAB], ids=lambda body: body["model"])
def test_bodies_of_editors(served: LiveServer, body: dict[str, Any]) -> None:
    served.worker.script = Script(texts=["a + b\n\nmore"])
    if body.get("stream"):
        *chunks, end = events(served, PATH, body)
        assert end == "[DONE]"
        got = "".join(each["text"] for chunk in chunks for each in chunk["choices"])
    else:
        (got,) = texts(served, body)
    has_blank = "\n\n" in (body["stop"] or [])
    assert got == ("a + b" if has_blank else "a + b\n\nmore")
    assert last_asked(served.worker).text == P + S


@pytest.mark.parametrize("path", [PATH, "/v1/fim/completions", "/v1/edit/completions"])
def test_the_examples_are_served(served: LiveServer, path: str) -> None:
    headers = {"Authorization": f"Bearer {served.token}"}
    told = httpx.get(f"{served.url}/openapi.json", headers=headers, timeout=20).json()
    (content,) = told["paths"][path]["post"]["requestBody"]["content"].values()
    name = content["schema"].get("$ref", "").rpartition("/")[2]
    examples = told["components"]["schemas"].get(name, {}).get("examples") or [
        example["value"] for example in content["examples"].values()
    ]
    for body in examples:
        assert post(served, path, body).json()["infilld"]["reason"] == "ok"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ([], "body"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "token ids"),
        ({"prompt": [[1, 2], [3]]}, "token ids"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": "a", "suffix": "\ud800"}, "lone surrogate"),
        ({"prompt": "a", "stop": ["\ud800"]}, "lone surrogate"),
        ({"prompt": "a", "stop": 3}, "stop"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": "a", "n": 99}, "n is 99"),
        ({"prompt": "a", "n": "2"}, "n: expected a whole number"),
        ({"prompt": "a", "n": True}, "n: expected a whole number"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "response_format": {"type": "yaml"}}, "response_format.type"),
        ({"prompt": "a", "guided_choice": []}, "guided_choice"),
        ({"prompt": "a", "stream": True, "guided_choice": []}, "guided_choice"),
    ],
)
def test_bad_bodies_say_what_is_wrong(served: LiveServer, body: object, word: str) -> None:
    got = post(served, PATH, body)
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"


def test_numbers_beyond_all_bounds_are_no_matter(served: LiveServer) -> None:
    huge = 10**40
    body = {"prompt": "a", "seed": huge, "max_tokens": huge, "temperature": huge, "logprobs": huge}
    assert post(served, PATH, body).status_code == 200
    assert post(served, PATH, {"prompt": "a", "seed": -1, "max_tokens": -1}).status_code == 200
    wanted = last_asked(served.worker)
    assert (wanted.seed, wanted.max_tokens) == (None, None)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_failure_is_told(served: LiveServer, is_streamed: bool) -> None:
    served.worker.script = Script(error=errors.ContextTooLong("too long"))
    if is_streamed:
        (frame,) = events(served, PATH, {"prompt": P})
    else:
        got = post(served, PATH, {"prompt": P})
        assert got.status_code == 400
        frame = got.json()
    assert frame["error"]["code"] == "context_too_long"
    assert frame["error"]["message"] == f"too long. {errors.ContextTooLong.remedy}"


def test_the_second_prompt_may_find_it_busy(served: LiveServer) -> None:
    def script(asked: Any) -> Script:
        if asked.text == "b":
            raise errors.Busy("full")
        return Script()

    served.worker.script = script
    *chunks, last = events(served, PATH, {"prompt": ["a", "b"]})
    assert [each["text"] for chunk in chunks for each in chunk["choices"]] == ["return 1", ""]
    assert last["error"]["code"] == "busy"


def test_what_cannot_begin_is_refused_before_the_stream(server: LiveServer) -> None:
    server.worker.state = "loading"
    got = post(server, PATH, {"prompt": P, "stream": True})
    assert (got.status_code, got.json()["error"]["code"]) == (503, "loading")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_closing_the_connection_cancels(server: LiveServer, is_streamed: bool) -> None:
    server.worker.hold()
    where = urlsplit(server.url)
    assert where.hostname is not None
    content = json.dumps({"prompt": P, "stream": is_streamed}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.token}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((where.hostname, where.port or 80), timeout=20) as connection:
        connection.sendall(head.encode() + content)
        server.worker.wait_for(lambda: len(server.worker.jobs) == 1)
        if is_streamed:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)


def test_closing_a_stream_cancels_its_later_prompts(server: LiveServer) -> None:
    def script(asked: Any) -> Script:
        if asked.text == "b":
            server.worker.hold()
        return Script()

    server.worker.script = script
    headers = {"Authorization": f"Bearer {server.token}"}
    body = {"prompt": ["a", "b"], "stream": True}
    with httpx.stream("POST", server.url + PATH, json=body, headers=headers) as got:
        assert next(got.iter_text()).startswith("data: ")
        server.worker.wait_for(lambda: len(server.worker.jobs) == 2)
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)


WORDS = st.text(st.sampled_from("ab \n;"), max_size=12)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    drafts=st.lists(WORDS, max_size=4),
    found=st.lists(WORDS, max_size=2),
    stop=st.lists(st.text(st.sampled_from("ab;"), min_size=1, max_size=2), max_size=2),
)
def test_what_was_streamed_is_the_final_text(
    served: LiveServer, drafts: list[str], found: list[str], stop: list[str]
) -> None:
    """Whatever the canvas showed and took back on the way, and wherever the text is cut."""
    reason = "ok" if found else "low_confidence"
    worker: FakeWorker = served.worker
    worker.script = Script(drafts=drafts, texts=found, reason=reason)
    body = {"prompt": P, "suffix": S, "stop": stop, "n": 2}
    final = post(served, PATH, body).json()
    sent: dict[int, str] = {}
    *chunks, end = events(served, PATH, body)
    assert end == "[DONE]"
    whole = {choice["index"]: choice["text"] for choice in final["choices"]}
    for chunk in chunks:
        for each in chunk["choices"]:
            sent[each["index"]] = sent.get(each["index"], "") + each["text"]
            assert whole[each["index"]].startswith(sent[each["index"]])
    assert sent == whole


def test_other_files_in_the_prompt_are_context(served: LiveServer) -> None:
    prompt = f"<|file_sep|>b.py\nB = 1\n<|file_sep|>a.py\n<|fim_prefix|>{P}<|fim_suffix|>{S}"
    texts(served, {"prompt": prompt + "<|fim_middle|>"})
    assert last_asked(served.worker).context == (Context("b.py", "B = 1\n"),)
