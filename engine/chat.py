"""A checkpoint's chat template: messages to prompt text."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from infilld.engine.config import read_json
from infilld.engine.errors import CheckpointMismatch, RequestError

TEMPLATE = "chat_template.jinja"


class ChatTemplate:
    """Renders messages as the model was trained to read them.

    The environment follows `transformers`, whose templates these are: trimmed blocks,
    `raise_exception`, `strftime_now`, a `tojson` that leaves Unicode as it is; sandboxed, because
    a template is code from a download.

    Args:
        source: Jinja text.
        special_tokens: such as `{"bos_token": "<bos>"}`; templates use them by name.

    Raises:
        CheckpointMismatch: not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointMismatch(f"{TEMPLATE} line {error.lineno}: {error.message}") from None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """The template of a checkpoint folder; None where it has none.

        `chat_template.jinja` wins over the field of the same name in tokenizer_config.json.

        Raises:
            CheckpointMismatch: not a Jinja template, or tokenizer_config.json is malformed.
        """
        is_there = (folder / "tokenizer_config.json").is_file()
        about = read_json(folder, "tokenizer_config.json") if is_there else {}
        path = folder / TEMPLATE
        source = path.read_text(encoding="utf-8") if path.is_file() else about.get("chat_template")
        if not isinstance(source, str):
            return None
        named = {key: _content(about[key]) for key in about if key.endswith("_token")}
        return cls(source, {key: token for key, token in named.items() if token is not None})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """Prompt text of messages, each `{"role", "content"}`.

        Args:
            messages: oldest first.
            add_generation_prompt: end with the start of the model's turn.
            options: variables of the template, such as `enable_thinking`.

        Raises:
            RequestError: the template refuses these messages.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **options,
            )
        except TemplateError as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}",
                remedy="Send the roles in the order the model knows.",
            ) from None


def _content(token: Any) -> str | None:
    # tokenizer_config.json spells a token as text, or as an object that holds it, or as null.
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
