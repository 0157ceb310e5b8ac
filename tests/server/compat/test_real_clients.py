"""The packages `openai` and `mistralai` against the daemon with the starter model.

What the model says is not the point, except where one line of the prompt says it already.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from live_server import serving
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

from infilld.engine.worker import Worker
from infilld.server.client import Client
from infilld.server.settings import Settings

# The model is sure where code resembles code nearby, and silent elsewhere.
P = "def add(a, b):\n    return a + b\n\n\ndef plus(a, b):\n    return "
S = "\n\n\nprint(add(1, 2))\n"
FILL = "a + b"


@dataclass(frozen=True)
class Starter:
    """A daemon with the starter model."""

    url: str
    token: str
    openai: openai.OpenAI
    mistral: Mistral

    def post(self, path: str, body: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    wanted = Settings(state_dir=tmp_path_factory.mktemp("clients") / "state", port=0)
    with serving(wanted, Worker(device="cpu")) as found:
        with Client(found.url, found.token) as client:
            client.wait_ready(60)
        with (
            # No proxy of this machine is looked for.
            httpx.Client(trust_env=False) as web,
            openai.OpenAI(
                base_url=f"{found.url}/v1", api_key=found.token, max_retries=0, http_client=web
            ) as first,
            Mistral(api_key=found.token, server_url=found.url, client=web) as second,
        ):
            yield Starter(found.url, found.token, first, second)


def test_openai_fills_between_prompt_and_suffix(starter: Starter) -> None:
    got = starter.openai.completions.create(model="gpt", prompt=P, suffix=S, seed=1)
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason, choice.index) == (FILL, "stop", 0)
    assert (got.object, got.model) == ("text_completion", "starter")
    assert got.id.startswith("cmpl-")
    assert got.usage is not None
    assert got.usage.completion_tokens > 0
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_openai_streams(starter: Starter) -> None:
    chunks = list(
        starter.openai.completions.create(
            model="gpt",
            prompt=P,
            suffix=S,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == FILL
    assert [choice.finish_reason for choice in chunks[-2].choices] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize(
    "prompt",
    [
        f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
        f"<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
        f"<PRE> {P} <SUF>{S} <MID>",
        f"<｜fim▁begin｜>{P}<｜fim▁hole｜>{S}<｜fim▁end｜>",
        f"<|code_prefix|>{P}<|code_suffix|>{S}<|code_middle|>",
        f"[SUFFIX]{S}[PREFIX]{P}",
    ],
)
def test_openai_with_markers_gets_the_same(starter: Starter, prompt: str) -> None:
    got = starter.openai.completions.create(model="gpt", prompt=prompt, seed=1)
    assert got.choices[0].text == FILL


def test_openai_without_a_suffix_continues(starter: Starter) -> None:
    got = starter.openai.completions.create(model="gpt", prompt=P, seed=1, max_tokens=4096)
    assert got.choices[0].finish_reason == "stop"


def test_openai_gets_several_choices_and_several_prompts(starter: Starter) -> None:
    got = starter.openai.completions.create(model="gpt", prompt=[P, P], suffix=S, n=2, seed=1)
    first, second = ([c for c in got.choices if c.index // 2 == number] for number in (0, 1))
    assert 1 <= len(first) <= 2
    assert [choice.text for choice in first] == [choice.text for choice in second]
    assert first[0].text == FILL
    assert len({choice.text for choice in first}) == len(first)


def test_openai_stops_where_it_is_told(starter: Starter) -> None:
    got = starter.openai.completions.create(model="gpt", prompt=P, suffix=S, seed=1, stop=[" +"])
    assert (got.choices[0].text, got.choices[0].finish_reason) == ("a", "stop")
    short = starter.openai.completions.create(model="gpt", prompt=P, suffix=S, seed=1, max_tokens=1)
    assert short.usage is not None
    assert short.usage.completion_tokens <= 1
    if short.choices[0].text:
        assert short.choices[0].finish_reason == "length"


def test_openai_gets_log_probabilities_and_an_echo(starter: Starter) -> None:
    got = starter.openai.completions.create(
        model="gpt", prompt=P, suffix=S, seed=1, logprobs=1, echo=True
    )
    (choice,) = got.choices
    assert choice.text == P + FILL
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert "".join(found.tokens) == FILL
    assert len(found.token_logprobs) == len(found.tokens)
    assert all(each <= 0 for each in found.token_logprobs)
    assert found.text_offset is not None
    assert [
        choice.text[at:].startswith(token)
        for at, token in zip(found.text_offset, found.tokens, strict=True)
    ] == [True] * len(found.tokens)


def test_openai_hears_why_there_is_nothing(starter: Starter) -> None:
    got = starter.openai.completions.create(model="gpt", prompt="a\0b", suffix="c")
    assert got.choices[0].text == ""
    extension: Any = got.model_extra
    assert extension["infilld"]["reason"] == "filtered"
    assert "NUL" in extension["infilld"]["why"]


def test_openai_hears_what_is_wrong(starter: Starter) -> None:
    with pytest.raises(openai.BadRequestError, match="token ids") as caught:
        starter.openai.completions.create(model="gpt", prompt=[1, 2, 3])
    assert (caught.value.param, caught.value.type) == ("prompt", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="n is 9"):
        starter.openai.completions.create(model="gpt", prompt=P, n=9, stream=True)
    stranger = starter.openai.with_options(api_key="another")
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="gpt", prompt=P)


def test_openai_gets_json_where_it_wants_it(starter: Starter) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    got = starter.openai.completions.create(
        model="gpt", prompt="DATA = ", suffix="\n", seed=1, extra_body={"response_format": wanted}
    )
    assert json.loads(got.choices[0].text) in ({"a": 1}, {"a": 2})
    choice = {"structured_outputs": {"choice": ["foo", "bar"]}}
    chunks = starter.openai.completions.create(
        model="gpt", prompt="x = ", suffix="\n", seed=1, stream=True, extra_body=choice
    )
    assert "".join(each.text for chunk in chunks for each in chunk.choices) in ("foo", "bar")
    with pytest.raises(openai.BadRequestError):
        starter.openai.completions.create(
            model="gpt", prompt="DATA = ", stream=True, extra_body={"regex": "(a"}
        )


def test_a_long_text_is_windowed(starter: Starter) -> None:
    line = "def f(a, b):\n    return a + b\n\n\n"
    got = starter.openai.completions.create(
        model="gpt", prompt=line * 10_000 + P, suffix=S + line * 10_000, seed=1
    )
    assert got.choices[0].finish_reason == "stop"


def test_mistral_completes(starter: Starter) -> None:
    got = starter.mistral.fim.complete(
        model="codestral-latest", prompt=P, suffix=S, random_seed=1, max_tokens=64, stop="\n\n"
    )
    (choice,) = got.choices
    assert choice.message is not None
    assert (choice.message.content, choice.finish_reason) == (FILL, "stop")
    assert (got.object, got.model) == ("chat.completion", "starter")
    assert got.usage.completion_tokens


def test_mistral_streams(starter: Starter) -> None:
    with starter.mistral.fim.stream(
        model="codestral-latest", prompt=P, suffix=S, random_seed=1, min_tokens=1
    ) as stream:
        chunks = [event.data for event in stream]
    assert "".join(str(choice.delta.content) for c in chunks for choice in c.choices) == FILL
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


def test_mistral_hears_what_is_wrong(starter: Starter) -> None:
    with pytest.raises(SDKError) as caught:
        starter.mistral.fim.complete(model="codestral-latest", prompt=P, stop=["\ud83d"])
    assert caught.value.status_code == 400


def test_tabbys_request_on_the_same_path(starter: Starter) -> None:
    segments = {"prefix": P, "suffix": S, "filepath": "add.py", "clipboard": "x"}
    got = starter.post("/v1/completions", {"language": "python", "segments": segments, "seed": 1})
    assert got.json()["choices"] == [{"index": 0, "text": FILL}]
    event = {"type": "select", "completion_id": got.json()["id"], "choice_index": 0}
    assert starter.post("/v1/events", event).status_code == 200


def test_mercurys_region_is_filled_at_its_cursor(starter: Starter) -> None:
    content = (
        "<|current_file_content|>\ncurrent_file_path: add.py\n"
        "def add(a, b):\n    return a + b\n\n\n"
        "<|code_to_edit|>\ndef plus(a, b):\n    return <|cursor|>\n<|/code_to_edit|>\n"
        "\n\nprint(add(1, 2))\n<|/current_file_content|>\n"
    )
    got = starter.post("/v1/edit/completions", {"messages": [{"role": "user", "content": content}]})
    text = got.json()["choices"][0]["message"]["content"]
    assert text == f"```\ndef plus(a, b):\n    return {FILL}\n```"
