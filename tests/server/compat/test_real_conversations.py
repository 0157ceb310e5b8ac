"""The packages `ollama` and, for conversations, `openai` against the daemon with the starter model.

The starter answers by continuing code: what it says is not the point, except where the prompt says
it already or a schema leaves no choice.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import ollama
import openai
import pytest
from live_server import serving

from infilld.engine.worker import Worker
from infilld.server.client import Client
from infilld.server.settings import Settings

P = "def add(a, b):\n    return a + b\n\n\ndef plus(a, b):\n    return "
S = "\n\n\nprint(add(1, 2))\n"
FILL = "a + b"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ASK: list[Any] = [{"role": "user", "content": P}]


@dataclass(frozen=True)
class Starter:
    ollama: ollama.Client
    openai: openai.OpenAI


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    wanted = Settings(state_dir=tmp_path_factory.mktemp("conversing") / "state", port=0)
    with serving(wanted, Worker(device="cpu")) as found:
        with Client(found.url, found.token) as client:
            client.wait_ready(60)
        headers = {"Authorization": f"Bearer {found.token}"}
        with (
            # No proxy of this machine is looked for.
            httpx.Client(trust_env=False) as web,
            ollama.Client(host=found.url, headers=headers, trust_env=False) as first,
            openai.OpenAI(
                base_url=f"{found.url}/v1", api_key=found.token, max_retries=0, http_client=web
            ) as second,
        ):
            yield Starter(first, second)


def is_ours(text: str) -> bool:
    said = json.loads(text)
    return set(said) == {"a", "b"} and 0 <= said["a"] <= 9 and isinstance(said["b"], bool)


def test_ollama_fills_before_a_suffix(starter: Starter) -> None:
    got = starter.ollama.generate(
        model="codellama:7b-code", prompt=P, suffix=S, options={"num_predict": 64, "seed": 1}
    )
    assert (got.response, got.done, got.done_reason) == (FILL, True, "stop")
    assert got.model == "codellama:7b-code"
    assert got.total_duration is not None
    assert got.eval_duration is not None
    assert got.total_duration >= got.eval_duration > 0
    assert got.prompt_eval_count


def test_ollama_streams_a_fill(starter: Starter) -> None:
    lines = list(
        starter.ollama.generate(
            model="m", prompt=P, suffix=S, options={"seed": 1}, keep_alive="5m", stream=True
        )
    )
    assert "".join(line.response or "" for line in lines) == FILL
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]


def test_ollama_with_marks_gets_the_same(starter: Starter) -> None:
    """As Zed and Continue ask, in the marks of the model they take it for."""
    marked = f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>"
    got = starter.ollama.generate(
        model="qwen2.5-coder", prompt=marked, raw=True, options={"seed": 1}
    )
    assert got.response == FILL


def test_ollama_gets_what_a_schema_asks_for(starter: Starter) -> None:
    got = starter.ollama.generate(model="m", prompt="two values", format=SCHEMA)
    assert is_ours(str(got.response))
    chat = starter.ollama.chat(model="m", messages=ASK, format=SCHEMA)
    assert is_ours(str(chat.message.content))
    with pytest.raises(ollama.ResponseError) as caught:
        starter.ollama.generate(model="m", prompt="x", format={"type": "wizard"})
    assert caught.value.status_code == 400


def test_ollama_chats(starter: Starter) -> None:
    whole = starter.ollama.chat(model="m", messages=ASK, options={"seed": 1, "temperature": 0})
    assert (whole.message.role, whole.done) == ("assistant", True)
    lines = list(
        starter.ollama.chat(
            model="m", messages=ASK, options={"seed": 1, "temperature": 0}, stream=True
        )
    )
    assert lines[-1].done
    assert lines[-1].done_reason in ("stop", "length")
    assert "".join(line.message.content or "" for line in lines)


def test_ollama_finds_the_model(starter: Starter) -> None:
    (listed,) = starter.ollama.list().models
    assert listed.model == "starter"
    assert listed.modified_at is not None
    shown = starter.ollama.show("codellama")
    assert shown.capabilities is not None
    # It has learned no conversation, and no thoughts in one.
    assert shown.capabilities == ["completion", "insert"]
    assert shown.modelinfo is not None
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.context_length"] > 0
    assert shown.details is not None
    assert shown.details.parameter_size == "3.3M"


def test_ollama_unloads_and_loads(starter: Starter) -> None:
    (running,) = starter.ollama.ps().models
    assert running.context_length
    assert starter.ollama.generate(model="m", keep_alive=0).done_reason == "unload"
    # Memory is given back on the engine's own thread, once no job is open.
    until = time.monotonic() + 20
    while starter.ollama.ps().models:
        assert time.monotonic() < until, "still in memory"
    assert starter.ollama.generate(model="m").done_reason == "load"
    assert starter.ollama.ps().models


def test_ollama_hears_what_is_wrong(starter: Starter) -> None:
    with pytest.raises(ollama.ResponseError, match="tools") as caught:
        starter.ollama.chat(
            model="m", messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="think"):
        starter.ollama.chat(model="m", messages=ASK, think=True)


def test_openai_converses(starter: Starter) -> None:
    got = starter.openai.chat.completions.create(model="gpt", messages=ASK, max_tokens=16, seed=1)
    (choice,) = got.choices
    assert (choice.message.role, choice.index) == ("assistant", 0)
    assert choice.finish_reason in ("stop", "length")
    assert (got.object, got.model) == ("chat.completion", "starter")
    assert got.usage is not None
    assert got.usage.completion_tokens <= 16


def test_openai_streams_what_it_would_have_got(starter: Starter) -> None:
    asked: dict[str, Any] = {"model": "gpt", "messages": ASK, "temperature": 0, "seed": 1}
    chunks = list(
        starter.openai.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(choice.delta.content or "" for c in chunks for choice in c.choices)
    assert text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_openai_gets_what_a_schema_asks_for(starter: Starter) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "two", "schema": SCHEMA}}
    for is_streamed in (False, True):
        answer: Any = starter.openai.chat.completions.create(
            model="gpt", messages=ASK, response_format=wanted, stream=is_streamed
        )
        if is_streamed:
            text = "".join(c.choices[0].delta.content or "" for c in answer)
        else:
            text = answer.choices[0].message.content
        assert is_ours(text), text


def test_openai_hears_of_a_bad_schema_before_a_stream_begins(starter: Starter) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        starter.openai.chat.completions.create(
            model="gpt", messages=ASK, response_format=wanted, stream=True
        )
    assert caught.value.code == "bad_grammar"


def test_openai_hears_that_the_starter_does_not_think(starter: Starter) -> None:
    with pytest.raises(openai.BadRequestError, match="think"):
        starter.openai.chat.completions.create(model="gpt", messages=ASK, reasoning_effort="high")
