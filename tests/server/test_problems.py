import json
from collections.abc import Iterator

import httpx
import pytest
from live_server import LiveServer

from infilld.engine import errors
from infilld.server import wire
from infilld.server.http import problems


def family(root: type[errors.InfilldError]) -> Iterator[type[errors.InfilldError]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


def test_every_error_has_a_status_of_its_own() -> None:
    ours = {kind for kind in family(errors.InfilldError) if kind.__module__.startswith("infilld.")}
    assert ours == set(problems.STATUS)
    for kind, status in problems.STATUS.items():
        assert 400 <= status < 600
        assert (status == 400) == issubclass(kind, errors.RequestError)


def test_what_may_succeed_later_says_when() -> None:
    for status in (429, 503):
        assert problems.response(status, {}).headers["retry-after"] == "1"
    assert "retry-after" not in problems.response(400, {}).headers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (408, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "unavailable_error"),
    ],
)
def test_an_error_is_one_of_ours_and_of_openai_s(status: int, kind: str) -> None:
    told = problems.body("a_code", "what", "do this", status=status, param="n")
    assert told == {
        "error": {
            "code": "a_code",
            "message": "what",
            "remedy": "do this",
            "type": kind,
            "param": "n",
        }
    }
    ours = wire.ErrorReply.model_validate(told).error
    assert (ours.code, ours.message, ours.remedy, ours.type) == ("a_code", "what", "do this", kind)


def test_an_older_daemon_s_errors_are_read() -> None:
    old = {"error": {"code": "busy", "message": "full", "remedy": ""}}
    assert wire.ErrorReply.model_validate(old).error.code == "busy"


def test_the_status_of_an_error_decides_its_type() -> None:
    told = problems.body_of(errors.Loading("not yet"))["error"]
    assert isinstance(told, dict)
    assert told["type"] == "unavailable_error"


def test_below_api_an_error_is_a_sentence() -> None:
    told = problems.body("c", "It is full.", "Wait.", status=429)
    assert json.loads(problems.response(429, told, path="/api/chat").body) == {
        "error": "It is full. Wait."
    }
    assert json.loads(problems.response(429, told, path="/v1/infill").body) == told


@pytest.mark.parametrize(
    ("message", "remedy", "said"),
    [
        ("It is full.", "Wait.", "It is full. Wait."),
        ("n is 99", "Ask for fewer.", "n is 99. Ask for fewer."),
        ("n is 99", "", "n is 99"),
    ],
)
def test_others_clients_read_what_to_do_in_the_message(
    message: str, remedy: str, said: str
) -> None:
    told = problems.body("c", message, remedy)
    for path in ("/v1/completions", "/infill", "/v1/nothing"):
        error = json.loads(problems.response(400, told, path=path).body)["error"]
        assert (error["message"], error["remedy"]) == (said, remedy)
    assert problems.as_ollama(told) == {"error": said}


@pytest.mark.parametrize("quote", ["'", '"', "`"])
def test_no_message_quotes_a_document(quote: str) -> None:
    document = "x" * 1000
    told = problems.body("c", f"no job {quote}{document}{quote}, and more")["error"]
    assert isinstance(told, dict)
    assert told["message"] == f"no job {quote}{'x' * 80}…{quote}, and more"
    whole = f"the model's folder {quote}{'y' * 80}{quote} isn't there"
    assert problems.body("c", whole)["error"] == told | {"message": whole}


@pytest.mark.parametrize(
    "wrong",
    [
        {"x" * 5000: 1},
        {"spans": "x" * 5000},
        {"n": "x" * 5000},
        {"context": [{"path": "a", "text": "b", "kind": "x" * 5000}]},
        {"text": "x" * 5000 + "\ud800"},
        {"draft": {"x" * 5000: 5}},
    ],
)
def test_what_is_wrong_with_a_body_is_said_without_it(
    shared: LiveServer, wrong: dict[str, object]
) -> None:
    body = {"text": "", "spans": [{"start": 0, "end": 0}]} | wrong
    headers = {"Authorization": f"Bearer {shared.token}", "Content-Type": "application/json"}
    for path in ("/v1/infill", "/v1/completions", "/api/generate", "/" + "x" * 5000):
        got = httpx.post(shared.url + path, content=json.dumps(body), headers=headers)
        assert "x" * 200 not in got.text
        assert path != "/v1/infill" or got.status_code == 400


def test_the_wrong_key_is_named_for_programs_too(shared: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {shared.token}"}
    body = {"text": "", "spans": [{"start": 0, "end": "z"}]}
    got = httpx.post(shared.url + "/v1/infill", json=body, headers=headers).json()["error"]
    assert (got["type"], got["param"]) == ("invalid_request_error", "spans.0.end")


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/api/generate", {"prompt": "x", "keep_alive": "\ud800"}, "keep_alive"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, "content"),
        ("/infill", {"stop": ["a", 3]}, "stop"),
    ],
)
def test_a_key_of_several_types_is_named_without_them(
    shared: LiveServer, path: str, body: dict[str, object], key: str
) -> None:
    headers = {"Authorization": f"Bearer {shared.token}", "Content-Type": "application/json"}
    got = httpx.post(shared.url + path, content=json.dumps(body), headers=headers, timeout=20)
    assert got.status_code == 400
    assert key in got.text
    assert "function" not in got.text
    assert "[" not in got.text
