"""Tabby's routes as its agent uses them, with a scripted worker."""

from typing import Any

import httpx
import pytest
from dialects import last_asked, post
from fake_worker import Script
from live_server import LiveServer

from infilld.engine.request import Context, Span

PATH = "/v1/completions"
P, S = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
# As the agent writes it.
AGENT: dict[str, Any] = {
    "language": "python",
    "segments": {
        "prefix": P,
        "suffix": S,
        "filepath": "add.py",
        "git_url": "git@example.com:a/b.git",
        "declarations": [{"filepath": "sub.py", "body": "def sub(a, b): ..."}],
        "relevant_snippets_from_changed_files": [
            {"filepath": "mul.py", "body": "def mul(a, b): ...", "score": 0.5}
        ],
        "relevant_snippets_from_recently_opened_files": [
            {"filepath": "div.py", "body": "def div(a, b): ...", "score": 1}
        ],
        "clipboard": "a + b",
    },
    "temperature": None,
    "mode": "standard",
    "user": "somebody",
}


@pytest.fixture
def served(shared: LiveServer) -> LiveServer:
    shared.worker.script = Script()
    shared.worker.told.clear()
    return shared


def complete(server: LiveServer, body: dict[str, Any]) -> Any:
    got = post(server, PATH, body)
    assert got.status_code == 200, got.text
    return got.json()


def test_the_agents_request_is_answered(served: LiveServer) -> None:
    got = complete(served, AGENT)
    job_id = served.worker.jobs[-1].id
    assert got == {
        "id": f"cmpl-{job_id}",
        "choices": [{"index": 0, "text": "return 1"}],
        "mode": "standard",
        "infilld": {"id": job_id, "reason": "ok", "why": ""},
    }
    wanted = last_asked(served.worker)
    assert (wanted.text, wanted.spans) == (P + S, (Span(len(P), len(P)),))
    assert (wanted.path, wanted.language) == ("add.py", "python")
    assert wanted.context == (
        Context("sub.py", "def sub(a, b): ...", "definition"),
        Context("mul.py", "def mul(a, b): ...", "recent"),
        Context("div.py", "def div(a, b): ...", "open"),
        Context("clipboard", "a + b", "clipboard"),
    )


def test_silence_is_an_empty_text_and_says_why(served: LiveServer) -> None:
    served.worker.script = Script(reason="repetition", why="It says so again.")
    got = complete(served, {"segments": {"prefix": P}})
    assert got["choices"] == [{"index": 0, "text": ""}]
    assert got["infilld"]["why"] == "It says so again."


def test_what_was_read_is_told_to_those_who_look(served: LiveServer) -> None:
    options = {"return_snippets": True, "return_prompt": True}
    got = complete(served, AGENT | {"debug_options": options})
    assert got["debug_data"]["prompt"] is None
    names = [each["filepath"] for each in got["debug_data"]["snippets"]]
    assert names == ["sub.py", "mul.py", "div.py"]
    got = complete(served, AGENT | {"debug_options": {"return_prompt": False}})
    assert "debug_data" not in got


def test_code_from_elsewhere_can_be_left_out(served: LiveServer) -> None:
    options = {"disable_retrieval_augmented_code_completion": True}
    complete(served, AGENT | {"debug_options": options})
    assert last_asked(served.worker).context == ()


def test_a_raw_prompt_takes_the_place_of_segments(served: LiveServer) -> None:
    raw = f"<fim_prefix>{P}<fim_suffix>{S}<fim_middle>"
    complete(served, {"debug_options": {"raw_prompt": raw}})
    wanted = last_asked(served.worker)
    assert (wanted.text, wanted.spans) == (P + S, (Span(len(P), len(P)),))


def next_edit(current: str) -> dict[str, Any]:
    history = {"original_code": "x", "edits_diff": "+y", "current_version": current}
    segments = {"prefix": P, "suffix": S, "edit_history": history}
    return {"segments": segments, "mode": "next_edit_suggestion"}


def test_a_next_edit_is_all_of_the_code(served: LiveServer) -> None:
    served.worker.script = Script(texts=["a + b"])
    got = complete(served, next_edit(P + S))
    assert (got["choices"][0]["text"], got["mode"]) == (P + "a + b" + S, "next_edit_suggestion")
    assert last_asked(served.worker).context == (Context("recent edits", "+y", "recent"),)
    assert complete(served, next_edit("other"))["choices"][0]["text"] == "other"
    served.worker.script = Script(reason="empty")
    assert complete(served, next_edit(P + S))["choices"][0]["text"] == P + S


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"segments": {}}, "segments.prefix"),
        ({"segments": 3}, "segments"),
        ({"segments": {"prefix": "a", "declarations": [3]}}, "declarations"),
        ({"segments": {"prefix": "a", "clipboard": "\ud800"}}, "lone surrogate"),
        ({"debug_options": {}}, "no segments"),
        ({"segments": {"prefix": "a"}, "mode": "next_edit_suggestion"}, "edit_history"),
    ],
)
def test_bad_bodies_say_what_is_wrong(served: LiveServer, body: object, word: str) -> None:
    got = post(served, PATH, body)
    assert got.status_code == 400
    assert word in got.json()["error"]["message"]


def test_a_score_may_be_any_number(served: LiveServer) -> None:
    body = b'{"segments": {"prefix": "a", "declarations": [{"score": NaN}]}}'
    head = {"Authorization": f"Bearer {served.token}", "Content-Type": "application/json"}
    assert httpx.post(served.url + PATH, content=body, headers=head).status_code == 400


def tell(server: LiveServer, query: str = "", **event: Any) -> httpx.Response:
    return post(server, f"/v1/events{query}", event)


def test_events_are_feedback(served: LiveServer) -> None:
    served.worker.script = Script(texts=["ab\ncd"])
    name = complete(served, AGENT)["id"]
    job_id = name.removeprefix("cmpl-")
    for kind in ("view", "select", "dismiss"):
        told = {
            "type": kind,
            "completion_id": name,
            "choice_index": 0,
            "view_id": "v",
            "elapsed": 3,
        }
        got = tell(served, **told)
        assert (got.status_code, got.content) == (200, b"")
    assert served.worker.told == [
        (job_id, "shown", 0, None),
        (job_id, "inserted", 0, None),
        (job_id, "dismissed", 0, None),
    ]
    served.worker.told.clear()
    line = {"type": "select", "completion_id": name, "choice_index": 0}
    assert tell(served, select_kind="line", **line).status_code == 200
    assert tell(served, "?select_kind=line", **line).status_code == 200
    assert served.worker.told == [(job_id, "partly", 0, 2)] * 2


def test_events_of_nobody_are_passed_over(served: LiveServer) -> None:
    for event in (
        {"completion_id": "cmpl-unknown"},
        {"completion_id": "", "choice_index": 3},
        {"completion_id": "cmpl-a", "choice_index": 10**30},
        {"completion_id": "cmpl-a", "choice_index": -1, "select_kind": "line"},
    ):
        assert tell(served, type="select", **event).status_code == 200
    assert served.worker.told == []
    assert tell(served, type="shrug", completion_id="a").status_code == 400


def test_health_has_the_shape_that_is_asked_for(served: LiveServer) -> None:
    head = {"Authorization": f"Bearer {served.token}"}
    got = httpx.get(served.url + "/v1/health", headers=head).json()
    assert got == post(served, "/v1/health", {}).json()
    assert (got["model"], got["device"], got["cuda_devices"]) == ("fake", "cpu", [])
    assert set(got["version"]) == {"build_date", "build_timestamp", "git_sha", "git_describe"}
    assert {type(got[key]) for key in ("arch", "cpu_info")} == {str}
    assert got["cpu_count"] >= 1
