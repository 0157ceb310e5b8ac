"""Chat templates render as `transformers` renders them."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from infilld.engine.chat import ChatTemplate
from infilld.engine.errors import CheckpointMismatch, RequestError

# In the manner of this model's turns: controls, a switch, a loop that skips, JSON.
SOURCE = """{{ bos_token }}
{%- if tools %}
    {{- '<|turn>system\\n' + (tools | tojson) + '<turn|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'note' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role not in ('user', 'model') %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|turn>' + message.role + '\\n' + message.content | trim + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' + ('<|think|>' if enable_thinking else '') }}
{%- endif %}
"""
MESSAGES = [
    {"role": "user", "content": "  fill é\U0001f600 "},
    {"role": "note", "content": "left out"},
    {"role": "model", "content": "done"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "chat_template.jinja").write_text(SOURCE)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": "no"})
    )
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"tools": [{"name": "é"}]}])
@pytest.mark.parametrize("more", [True, False])
def test_same_text_as_transformers(folder: Path, more: bool, options: dict[str, object]) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(BPE()), bos_token="<bos>", eos_token="<eos>"
    )
    theirs.chat_template = SOURCE
    expected = theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=more, **options
    )
    ours = ChatTemplate.from_folder(folder)
    assert ours is not None
    assert ours.render(MESSAGES, add_generation_prompt=more, **options) == expected


def test_the_config_is_read_where_there_is_no_file(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages | length }}"}')
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render(MESSAGES) == "3"


def test_what_the_template_refuses_is_a_request_error(folder: Path) -> None:
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    with pytest.raises(RequestError, match="unknown role root"):
        template.render([{"role": "root", "content": ""}])


def test_a_template_cannot_reach_out() -> None:
    with pytest.raises(RequestError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render([])


def test_a_broken_template_is_named() -> None:
    with pytest.raises(CheckpointMismatch, match="line 2"):
        ChatTemplate("{{ bos_token }}\n{% for %}")


def test_a_null_token_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "chat_template": "[{{ bos_token }}]"})
    )
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render([]) == "[]"
