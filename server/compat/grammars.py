"""What an answer must match, as the keys of OpenAI, llama.cpp and vLLM say it.

response_format      {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema"}},
                     {"type": "regex", "pattern"}, {"type": "grammar", "grammar"}
json_schema          a schema (llama.cpp)
grammar              GBNF where it has a `::=`, else Lark
regex                Rust's syntax
guided_json, guided_regex, guided_choice, guided_grammar
structured_outputs   {"json", "json_object", "regex", "choice", "grammar"} (vLLM)
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infilld.engine.errors import BadGrammar, UnknownOption
from infilld.engine.request import Grammar
from infilld.server.compat.fields import Body

# Longer than any schema in use; a compiler's time grows with it.
_MOST_CHARS = 1 << 18
_META = frozenset(r"\.+*?()|[]{}^$#&-~/")


class Constrained(Body):
    """A request with these keys."""

    response_format: dict[str, Any] | None = None
    json_schema: dict[str, Any] | bool | str | None = None
    grammar: str | None = None
    regex: str | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None

    async def grammar_wanted(self) -> Grammar | None:
        """As `wanted`."""
        return await wanted({key: getattr(self, key) for key in KEYS})


async def wanted(body: Mapping[str, Any]) -> Grammar | None:
    """The grammar a body asks for, once it is known to be one that can be kept to.

    Raises:
        BadGrammar: it cannot. UnknownOption: two are asked for, or one in no known form.
    """
    grammar = grammar_of(body)
    if grammar is not None:
        # Compiling one takes a while, and loads its library.
        await asyncio.to_thread(_refuse_bad, grammar)
    return grammar


def _refuse_bad(grammar: Grammar) -> None:
    from infilld.engine.grammar import refuse_bad

    refuse_bad(grammar)


def grammar_of(body: Mapping[str, Any]) -> Grammar | None:
    """The grammar a body asks for; None: none.

    Raises:
        BadGrammar, UnknownOption: as `wanted`, as far as it can be seen without compiling it.
    """
    found = {}
    for key, read in _READERS.items():
        value = body.get(key)
        # llama.cpp's clients send empty texts and objects for "none".
        if value is not None and value != "" and (grammar := read(key, value)) is not None:
            found[key] = grammar
    if len(found) > 1:
        raise UnknownOption(
            f"{' and '.join(found)} both say what the answer must match", remedy="Send one of them."
        )
    return next(iter(found.values()), None)


def _response_format(key: str, value: Any) -> Grammar | None:
    asked = _object(key, value)
    kind = asked.get("type")
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return _schema(key, asked["schema"]) if asked.get("schema") else Grammar("json")
    if kind == "json_schema":
        named = asked.get("json_schema")
        # llama.cpp takes the schema without the object that names it, too.
        inner = asked if named is None else _object(f"{key}.json_schema", named)
        schema = inner.get("schema")
        if schema is None:
            raise BadGrammar(f"{key} has no schema", remedy="Send it as json_schema.schema.")
        return _schema(key, schema)
    if kind == "regex":
        return _regex(key, asked.get("pattern"))
    if kind == "grammar":
        return _rules(key, asked.get("grammar"))
    raise UnknownOption(
        f"{key}.type is {str(kind)[:40]!r}",
        remedy='Ask for "text", "json_object", "json_schema", "regex" or "grammar".',
    )


def _structured(key: str, value: Any) -> Grammar | None:
    asked = _object(key, value)
    if asked.get("structural_tag") is not None:
        raise UnknownOption(
            f"{key}.structural_tag is not served", remedy="Ask for a schema, a regex or a grammar."
        )
    inner = {
        "guided_json": asked.get("json"),
        "guided_regex": asked.get("regex"),
        "guided_choice": asked.get("choice"),
        "guided_grammar": asked.get("grammar"),
        "response_format": {"type": "json_object"} if asked.get("json_object") is True else None,
    }
    return grammar_of(inner)


def _schema(key: str, value: Any) -> Grammar:
    if not isinstance(value, (dict, str, bool)):
        raise BadGrammar(f"{key} is no schema", remedy="Send a JSON schema, as an object.")
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        raise BadGrammar(f"{key} is nested too deeply") from None
    return Grammar("json_schema", _short(key, text))


def _bare_schema(key: str, value: Any) -> Grammar | None:
    return None if value == {} else _schema(key, value)


def _regex(key: str, value: Any) -> Grammar:
    return Grammar("regex", _short(key, _text(key, value)))


def _rules(key: str, value: Any) -> Grammar:
    text = _short(key, _text(key, value))
    return Grammar("gbnf" if "::=" in text else "lark", text)


def _choice(key: str, value: Any) -> Grammar:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(each, str) for each in value):
        raise BadGrammar(f"{key} is no list of texts", remedy="Send the texts to choose from.")
    escaped = ["".join(f"\\{c}" if c in _META else c for c in each) for each in value]
    return Grammar("regex", _short(key, "|".join(escaped)))


def _object(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnknownOption(f"{key} is no object", remedy="Send a JSON object.")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadGrammar(f"{key} is no text", remedy="Send it as a text that is not empty.")
    return value


def _short(key: str, text: str) -> str:
    if len(text) > _MOST_CHARS:
        raise BadGrammar(f"{key} has {len(text)} characters, the limit is {_MOST_CHARS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadGrammar(f"lone surrogate at code point {error.start} of {key}") from None
    return text


_READERS: Mapping[str, Callable[[str, Any], Grammar | None]] = {
    "response_format": _response_format,
    "json_schema": _bare_schema,
    "grammar": _rules,
    "regex": _regex,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _rules,
    "structured_outputs": _structured,
}
KEYS = frozenset(_READERS)
