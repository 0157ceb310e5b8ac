"""`POST /v1/edit/completions`: tagged documents, and the region that comes back."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from dialects import last_asked, post
from fake_worker import Script
from hypothesis import given
from hypothesis import strategies as st
from live_server import LiveServer, serving
from tiny_infill import tiny_config, tiny_model
from tiny_tokenizers import chat_template, chat_tokenizer

from infilld.engine import resident
from infilld.engine.chat_prompt import ChatLayout
from infilld.engine.config import SamplerConfig
from infilld.engine.errors import UnknownOption
from infilld.engine.infill import Infiller
from infilld.engine.plan import FillMethod
from infilld.engine.request import Context, Span
from infilld.engine.worker import Worker
from infilld.server.client import Client
from infilld.server.compat.mercury import Document, parse
from infilld.server.settings import Settings

PATH = "/v1/edit/completions"
DIFF = "--- a.py\n+++ a.py\n@@ -1,1 +1,1 @@\n-import o\n+import os"
# As cursortab writes it: whole lines, sections with a blank line between them.
CURSORTAB = (
    "<|recently_viewed_code_snippets|>\n"
    "<|recently_viewed_code_snippet|>\ncode_snippet_file_path: b.py\nB = 1\n"
    "<|/recently_viewed_code_snippet|>\n"
    "<|/recently_viewed_code_snippets|>\n\n"
    "<|current_file_content|>\ncurrent_file_path: a.py\nimport os\n"
    "<|code_to_edit|>\ndef f():\n    return <|cursor|>\n<|/code_to_edit|>\nprint(f())\n"
    "<|/current_file_content|>\n\n"
    f"<|edit_diff_history|>\n{DIFF}\n\n<|/edit_diff_history|>\n"
)
# As Zed writes it: a region may begin and end anywhere.
ZED = (
    "<|recently_viewed_code_snippets|>\n<|/recently_viewed_code_snippets|>\n"
    "<|current_file_content|>\ncurrent_file_path: a.py\nimport os\n"
    "<|code_to_edit|>\ndef f():\n    return <|cursor|><|/code_to_edit|>\n\nprint(f())\n"
    "<|/current_file_content|>\n<|edit_diff_history|>\n<|/edit_diff_history|>\n"
)
REGION = "def f():\n    return \n"


@pytest.fixture
def served(shared: LiveServer) -> Iterator[LiveServer]:
    shared.worker.script = Script(texts=["os.name"])
    yield shared
    shared.worker.facts = {}


def edit(server: LiveServer, content: object, **more: Any) -> Any:
    return post(server, PATH, {"messages": [{"role": "user", "content": content}]} | more)


def content_of(server: LiveServer, content: object) -> str:
    got = edit(server, content)
    assert got.status_code == 200, got.text
    text: str = got.json()["choices"][0]["message"]["content"]
    return text


def test_a_document_is_read() -> None:
    context = (Context("b.py", "B = 1\n", "recent"), Context("recent edits", DIFF, "recent"))
    cursor = REGION.index("\n", 10)
    assert parse(CURSORTAB) == Document(
        "import os\n", REGION, "print(f())\n", cursor, "a.py", context
    )
    assert parse(ZED) == Document("import os\n", REGION[:-1], "\nprint(f())\n", cursor, "a.py", ())


def test_a_region_may_stand_alone() -> None:
    got = parse("<|code_to_edit|>\na = <|cursor|>\n<|/code_to_edit|>")
    assert got == Document("", "a = \n", "", 4, None, ())


CODE = st.text(st.sampled_from("ab \n\r`<|>"), max_size=12)


@given(CODE, CODE, CODE)
def test_the_document_is_what_was_tagged(before: str, region: str, after: str) -> None:
    content = (
        f"<|current_file_content|>\ncurrent_file_path: a.py\n{before}"
        f"<|code_to_edit|>\n{region}<|cursor|><|/code_to_edit|>\n{after}<|/current_file_content|>"
    )
    got = parse(content)
    assert (got.before, got.region, got.after) == (before, region, after)
    assert got.cursor == len(region)


@pytest.mark.parametrize("content", [CURSORTAB, ZED], ids=["cursortab", "zed"])
def test_the_gap_at_the_cursor_is_filled(served: LiveServer, content: str) -> None:
    assert content_of(served, content) == "```\ndef f():\n    return os.name\n```"
    wanted = last_asked(served.worker)
    place = len("import os\n") + REGION.index("\n", 10)
    assert wanted.text == "import os\n" + REGION + "print(f())\n"
    assert wanted.spans == (Span(place, place),)
    assert (wanted.path, wanted.instruction) == ("a.py", None)


@pytest.mark.parametrize("content", [CURSORTAB, ZED], ids=["cursortab", "zed"])
def test_silence_leaves_the_region_as_it_is(served: LiveServer, content: str) -> None:
    served.worker.script = Script(reason="empty", why="Nothing is missing.")
    got = edit(served, content).json()
    assert got["choices"][0]["message"]["content"] == "```\ndef f():\n    return \n```"
    assert got["infilld"]["why"] == "Nothing is missing."


def test_a_model_that_follows_instructions_writes_the_region_anew(served: LiveServer) -> None:
    served.worker.facts = {"follows_instructions": True}
    served.worker.script = Script(texts=["def f():\n    return 1\n"])
    assert content_of(served, CURSORTAB) == "```\ndef f():\n    return 1\n```"
    wanted = last_asked(served.worker)
    start = len("import os\n")
    assert wanted.spans == (Span(start, start + len(REGION)),)
    assert wanted.instruction
    served.worker.script = Script(reason="empty")
    assert content_of(served, CURSORTAB) == f"```\n{REGION}```"


def test_the_reply_is_a_turn(served: LiveServer) -> None:
    got = edit(served, ZED, model="mercury-edit", seed=3).json()
    assert (got["object"], got["model"]) == ("chat.completion", "fake")
    assert got["choices"][0]["finish_reason"] == "stop"
    assert last_asked(served.worker).seed == 3


def test_a_region_without_a_cursor_is_continued_at_its_end(served: LiveServer) -> None:
    content = CURSORTAB.replace("<|cursor|>", "")
    assert content_of(served, content) == "```\ndef f():\n    return os.name\n```"


def test_fences_in_the_region_stay(served: LiveServer) -> None:
    content = "<|code_to_edit|>\n```\nx\n```\n<|cursor|>\n<|/code_to_edit|>"
    assert content_of(served, content) == "```\n```\nx\n```\nos.name\n```"


def test_no_line_end_is_divided(served: LiveServer) -> None:
    content = "<|code_to_edit|>\na = \r<|cursor|>\nb\r\n<|/code_to_edit|>"
    assert content_of(served, content) == "```\na = os.name\r\nb\r\n```"
    cut = "<|current_file_content|>\na\r<|code_to_edit|>\n<|cursor|>\nb<|/code_to_edit|>\n"
    assert content_of(served, cut + "<|/current_file_content|>") == "```\n\nb\n```"


def test_a_message_may_come_in_parts_and_behind_others(served: LiveServer) -> None:
    parts = [{"type": "text", "text": ZED[:40]}, {"type": "text", "text": ZED[40:]}]
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]
    got = post(served, PATH, {"messages": messages})
    assert "os.name" in got.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": ZED}]}, "code_to_edit"),
        ({"messages": [{"role": "user", "content": "fix it"}]}, "code_to_edit"),
        ({"messages": [{"role": "user", "content": "<|code_to_edit|>"}]}, "code_to_edit"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": ZED}], "stream": True}, "stream"),
    ],
)
def test_bad_bodies_say_what_is_wrong(served: LiveServer, body: object, word: str) -> None:
    got = post(served, PATH, body)
    assert got.status_code == 400
    assert word in got.json()["error"]["message"]


def test_a_document_without_a_region_is_refused() -> None:
    with pytest.raises(UnknownOption):
        parse("<|/code_to_edit|> <|code_to_edit|>")


def test_a_real_engine_that_follows_instructions_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On random weights: what it writes makes no sense, and stands between the same lines."""
    tokenizer = chat_tokenizer()
    config = replace(tiny_config(tokenizer.vocab_tokens, canvas_tokens=64), max_positions=2048)
    engine = Infiller(
        tiny_model(config),
        tokenizer,
        replace(SamplerConfig(), max_steps=4),
        FillMethod(holds_back=False, trims=False),
        layout=ChatLayout(tokenizer, chat_template()),
    )
    monkeypatch.setattr(resident, "load_infiller", lambda *wishes: engine)
    wanted = Settings(state_dir=tmp_path / "state", port=0)
    with serving(wanted, Worker(Path("tiny"))) as found:
        with Client(found.url, found.token) as client:
            client.wait_ready(20)
        body = {"messages": [{"role": "user", "content": CURSORTAB}], "seed": 1}
        headers = {"Authorization": f"Bearer {found.token}"}
        got = httpx.post(found.url + PATH, json=body, headers=headers, timeout=60)
    assert got.status_code == 200, got.text
    told, usage = got.json()["infilld"], got.json()["usage"]
    text = got.json()["choices"][0]["message"]["content"]
    assert text.startswith("```\n")
    assert text.endswith("\n```")
    assert usage["prompt_tokens"] > 0
    assert (text == f"```\n{REGION}```") == (told["reason"] != "ok")


def test_snippets_that_never_end_cost_no_more_than_reading_them() -> None:
    """A pattern would look for the end of each to the end of all."""
    snippets = "<|recently_viewed_code_snippet|>\n" * 100_000
    began = time.monotonic()
    found = parse(f"{snippets}<|code_to_edit|>x<|/code_to_edit|>")
    assert time.monotonic() - began < 1.0
    assert found.context == ()
