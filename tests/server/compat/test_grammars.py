"""What an answer must match, in the words of three servers."""

import json
from typing import Any

import pytest

from infilld.engine.errors import BadGrammar, RequestError, UnknownOption
from infilld.engine.request import Grammar
from infilld.server.compat.grammars import grammar_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": None, "grammar": "", "json_schema": {}}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json")),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Grammar("json_schema", TEXT),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar("json_schema", TEXT),
        ),
        (
            {"response_format": {"type": "json_schema", "schema": SCHEMA}},
            Grammar("json_schema", TEXT),
        ),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, Grammar("regex", "a+")),
        (
            {"response_format": {"type": "grammar", "grammar": 'root ::= "a"'}},
            Grammar("gbnf", 'root ::= "a"'),
        ),
        ({"json_schema": SCHEMA}, Grammar("json_schema", TEXT)),
        ({"grammar": 'root ::= "a"'}, Grammar("gbnf", 'root ::= "a"')),
        ({"grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"regex": "a|b"}, Grammar("regex", "a|b")),
        ({"guided_json": SCHEMA}, Grammar("json_schema", TEXT)),
        ({"guided_json": TEXT}, Grammar("json_schema", TEXT)),
        ({"guided_regex": "a"}, Grammar("regex", "a")),
        ({"guided_choice": ["a.b", "c"]}, Grammar("regex", "a\\.b|c")),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", TEXT)),
        ({"structured_outputs": {"regex": "a"}}, Grammar("regex", "a")),
        ({"structured_outputs": {"choice": ["x y"]}}, Grammar("regex", "x y")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json")),
        ({"structured_outputs": {}}, None),
    ],
)
def test_every_name_is_read(body: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar_of(body) == expected


def deep(depth: int) -> Any:
    nested: Any = {}
    for _ in range(depth):
        nested = {"items": nested}
    return nested


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"response_format": "json"}, UnknownOption),
        ({"response_format": {"type": "yaml"}}, UnknownOption),
        ({"response_format": {"type": ["json_object"]}}, UnknownOption),
        ({"response_format": {"type": "json_schema"}}, BadGrammar),
        ({"response_format": {"type": "json_schema", "json_schema": 3}}, UnknownOption),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, BadGrammar),
        ({"response_format": {"type": "regex"}}, BadGrammar),
        ({"response_format": {"type": "grammar", "grammar": 3}}, BadGrammar),
        ({"regex": 3}, BadGrammar),
        ({"regex": "\ud800"}, BadGrammar),
        ({"regex": "a" * 300_000}, BadGrammar),
        ({"guided_json": deep(20_000)}, BadGrammar),
        ({"guided_choice": []}, BadGrammar),
        ({"guided_choice": "ab"}, BadGrammar),
        ({"guided_choice": [1]}, BadGrammar),
        ({"structured_outputs": {"structural_tag": {}}}, UnknownOption),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, UnknownOption),
        ({"regex": "a", "guided_regex": "a"}, UnknownOption),
    ],
)
def test_what_means_nothing_is_refused(body: dict[str, Any], error: type[RequestError]) -> None:
    with pytest.raises(error):
        grammar_of(body)


def test_both_names_are_told_where_two_are_sent() -> None:
    with pytest.raises(UnknownOption, match="grammar and guided_json"):
        grammar_of({"guided_json": SCHEMA, "grammar": 'start: "a"'})
