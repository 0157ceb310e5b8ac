"""What editors send to llama.cpp's and Ollama's routes, with every key they send it with."""

from typing import Any

import dialects
import httpx
import pytest
from fake_worker import Script
from live_server import LiveServer

from infilld.engine.conversation import ChatRequest
from infilld.engine.request import InfillRequest

P, S = "import os\n\ndef f(a):\n    ", "\n    return b\n"
FIRST, LINE = P.rpartition("\n")[0] + "\n", "    "
CHUNKS = [{"text": "SIZE = 3\n", "time": [1, 2], "filename": "size.py"}]
SAMPLERS = {"top_k": 40, "top_p": 0.9, "samplers": ["top_k", "top_p", "infill"]}

LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": FIRST,
    "input_suffix": S,
    "input_extra": CHUNKS,
    "prompt": LINE,
    "n_predict": 128,
    "stop": [],
    "n_indent": 4,
    **SAMPLERS,
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 250,
    "response_fields": ["content", "timings/prompt_n", "truncated", "tokens_cached"],
    "model": "",
}
LLAMA_VSCODE = {
    "input_prefix": FIRST,
    "input_suffix": S,
    "input_extra": CHUNKS,
    "prompt": LINE,
    "n_predict": 128,
    **SAMPLERS,
    "stream": False,
    "cache_prompt": True,
    "n_indent": 4,
    "n_cmpl": 3,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
    "lora": [{"id": 0, "scale": 0.5}],
}
CONTINUE = {
    "model": "starter",
    "prompt": P,
    "suffix": S,
    "raw": True,
    "options": {"num_predict": 64, "stop": ["\n\n\n"], "temperature": 0.01, "num_ctx": 4096},
    "keep_alive": 1800,
    "stream": True,
}
CONTINUE_WITH_MARKS = {
    **CONTINUE,
    "model": "qwen2.5-coder:1.5b",
    "prompt": f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
    "suffix": None,
}
ZED = {
    "model": "codellama:7b-code",
    "prompt": f"<PRE> {P} <SUF>{S} <MID>",
    "raw": True,
    "stream": False,
    "options": {"num_predict": 128, "temperature": 0.2, "stop": ["<EOT>"]},
}


def post(server: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    got = dialects.post(server, path, body)
    assert got.status_code == 200, got.text
    return got


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/infill", LLAMA_VIM),
        ("/infill", LLAMA_VSCODE),
        ("/api/generate", CONTINUE),
        ("/api/generate", CONTINUE_WITH_MARKS),
        ("/api/generate", ZED),
    ],
    ids=["llama.vim", "llama.vscode", "continue", "continue with marks", "zed"],
)
def test_a_gap_arrives_as_it_stands_in_the_editor(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    assert "return 1" in post(server, path, body).text
    request = server.worker.jobs[-1].request
    assert isinstance(request, InfillRequest)
    (span,) = request.spans
    assert (request.text[: span.start], request.text[span.end :]) == (P, S)
    assert request.max_tokens is not None
    assert bool(request.context) == (path == "/infill")


def test_llama_vscode_gets_an_array_and_nested_timings(server: LiveServer) -> None:
    server.worker.script = Script(texts=("a", "b"))
    got = post(server, "/infill", LLAMA_VSCODE).json()
    assert [each["content"] for each in got] == ["a", "b"]
    for each in got:
        assert {"prompt_n", "prompt_ms", "predicted_n", "predicted_ms"} <= set(each["timings"])
        assert each["generation_settings"]["n_ctx"] > 0


@pytest.mark.parametrize("body", [LLAMA_VIM, LLAMA_VSCODE], ids=["llama.vim", "llama.vscode"])
def test_editors_prepare_for_what_they_will_ask(server: LiveServer, body: dict[str, Any]) -> None:
    nothing = {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "samplers": []}
    post(server, "/infill", body | nothing | {"n_cmpl": 1})
    request = server.worker.jobs[-1].request
    assert isinstance(request, InfillRequest)
    assert (request.warm, request.background) == (True, True)


def test_llama_vscode_has_a_selection_written_anew(server: LiveServer) -> None:
    body = {
        "messages": [
            {"role": "system", "content": "You write code."},
            {"role": "user", "content": "Use a dict:\nx = []"},
        ],
        "stream": False,
        "cache_prompt": True,
        "samplers": "edkypmxt",
        "temperature": 0.8,
        "dynatemp_range": 0,
        "repeat_last_n": 64,
        "max_tokens": -1,
        "timings_per_token": False,
    }
    got = post(server, "/v1/chat/completions", body).json()
    assert got["choices"][0]["message"]["content"] == "return 1"
    request = server.worker.jobs[-1].request
    assert isinstance(request, ChatRequest)
    assert request.max_tokens is None
