"""Grammars: what a text must match, compiled by llguidance.

The library is loaded with the first grammar. `refuse_bad` needs no model: it says before an answer
begins what cannot be served.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import TYPE_CHECKING, Any

from infilld.engine.errors import BadGrammar
from infilld.engine.request import Grammar
from infilld.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMAR_BYTES = 1 << 18
# JSON is written on one line, with a space behind commas and colons: what may stand between its
# parts is settled, so it costs no pass, and a weak model cannot write blanks for ever.
_JSON_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
# An automaton that counts remainders has so many states, at least.
_MOST_REMAINDERS = 10_000
# What the compiler may spend: a schema of some thousand properties is beyond it.
_MOST_SYMBOLS, _MOST_LEXER_STATES, _MOST_ITEMS = 30_000, 50_000, 10_000
# The compiler calls itself once for each level of what nests or refers to another, and more of them
# than these could take all of a thread's stack, which ends the process: at 8 MiB, twice as many do.
_MOST_LEVELS = 800
# Masks that are computed before a grammar is believed to be one.
_PROBED_STEPS = 3
_BYTES = 256
# Lark as the library reads it: text and comments, and what asks for a token by name or number.
# It refuses text without an end.
_LARK_PIECE = re.compile(
    r'"(?:\\.|[^"\\\x00-\x1f])*"?|(?:#|//)[^\n]*|/(?:\\.|[^/\\])+/?|(?P<token><[^<>\s]+>)'
)
# A rule, a group, or a part of a schema begins.
_LARK_LEVEL = re.compile(r"[:(\[{]")


def refuse_bad(grammar: Grammar) -> None:
    """Refuse a grammar that cannot be served, whatever the model is.

    Raises:
        BadGrammar: it is malformed, too large, satisfied by no text, or asks for what cannot be
            enforced.
    """
    # A token is a byte: every grammar can be spelled in them.
    Constraint(grammar, _byte_tokens()).probe()


class Constraint:
    """A compiled grammar over tokens.

    Args:
        grammar: as it was asked for. tokens: it is to be written in.

    Raises:
        BadGrammar: see `refuse_bad`.
    """

    def __init__(self, grammar: Grammar, tokens: "LLTokenizer") -> None:
        self._source, self._tokens = _source(grammar), tokens

    def matcher(self) -> "LLMatcher":
        """A matcher at the start of a text.

        Raises:
            BadGrammar: see `refuse_bad`.
        """
        from llguidance import LLMatcher

        made = LLMatcher(self._tokens, self._source, log_level=0, limits=_limits())
        if made.is_error():
            raise _refusal(made.get_error())
        return made

    def probe(self) -> None:
        """Try the first tokens: some faults show only then.

        Raises:
            BadGrammar: see `refuse_bad`.
        """
        matcher = self.matcher()
        for _ in range(_PROBED_STEPS):
            if matcher.is_accepting():
                return
            mask = matcher.compute_bitmask()
            if matcher.is_error():
                raise _refusal(matcher.get_error())
            first = next((n for n in range(_BYTES) if mask[n // 8] >> n % 8 & 1), None)
            if first is None:
                raise BadGrammar("no text matches the grammar")
            matcher.consume_token(first)


def vocabulary_of(tokenizer: Tokenizer, spelled: Sequence[bytes]) -> "LLTokenizer":
    """The tokens of a vocabulary as the library wants them.

    Control tokens stand for no text, so no grammar can ask for one. The end of a text is a token
    of its own, behind all others.

    Args:
        tokenizer: makes tokens of what must follow. spelled: bytes of every token.
    """

    def encode(text: bytes | str) -> list[int]:
        return tokenizer.encode(text.decode() if isinstance(text, bytes) else text)

    return _wrapped(spelled, encode)


@cache
def _byte_tokens() -> "LLTokenizer":
    def encode(text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    return _wrapped([bytes([n]) for n in range(_BYTES)], encode)


def _wrapped(spelled: Sequence[bytes], encode: Any) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    class Wanted:
        """Names that the library asks for."""

        def __init__(self) -> None:
            self.eos_token_id = len(spelled)
            self.bos_token_id: int | None = None
            self.tokens = [*spelled, b""]
            self.special_token_ids = [len(spelled)]

        def __call__(self, text: bytes | str) -> list[int]:
            ids: list[int] = encode(text)
            return ids

    # Slices make masks faster (0.1 ms instead of 0.4 ms of 262,144 tokens) and take 1.7 s to make.
    return LLTokenizer(TokenizerWrapper(Wanted()), slices=[])


@cache
def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=_MOST_SYMBOLS,
        max_lexer_states=_MOST_LEXER_STATES,
        step_max_items=_MOST_ITEMS,
        verbose_errors=False,
    )


def _source(grammar: Grammar) -> str:
    """A grammar in the library's own form.

    Raises:
        BadGrammar: it is malformed or too large.
    """
    from llguidance import LLMatcher

    try:
        size = len(grammar.text.encode())
    except UnicodeEncodeError as error:
        raise BadGrammar(f"lone surrogate at code point {error.start} of the grammar") from None
    if size > MAX_GRAMMAR_BYTES:
        raise BadGrammar(
            f"the grammar has {size} bytes, {MAX_GRAMMAR_BYTES} fit", remedy="Make it smaller."
        )
    if "\0" in grammar.text:
        raise BadGrammar("the grammar holds NUL characters", remedy="Leave them out.")
    if grammar.kind in ("json", "json_schema"):
        schema = {"type": "object"} if grammar.kind == "json" else _schema(grammar.text)
        options: Any = _JSON_FORM
        _refuse_levels(_schema_levels(schema))
        try:
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        except ValueError as error:
            raise _refusal(str(error)) from None
    if not grammar.text.strip():
        raise BadGrammar("the grammar is empty", remedy="Leave it out, or write one.")
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        _refuse_tokens(grammar.text)
        return _of_lark(grammar.text)
    # The translation takes a time that grows with the square of the rules.
    _refuse_levels(grammar.text.count("::="))
    return _of_lark(_lark_of_gbnf(grammar.text))


def _of_lark(lark: str) -> str:
    from llguidance import LLMatcher

    _refuse_levels(len(_LARK_LEVEL.findall(_LARK_PIECE.sub("", lark))))
    return LLMatcher.grammar_from_lark(lark)


def _refuse_levels(levels: int) -> None:
    if levels > _MOST_LEVELS:
        raise BadGrammar(
            f"the grammar has up to {levels} levels, {_MOST_LEVELS} fit",
            remedy="Use fewer rules, or fewer references, that stand less deeply.",
        )


def _schema_levels(schema: Any) -> int:
    """How deeply a schema may nest where every reference is followed once, at most."""
    deepest = 0
    # Containers between a definition and what in it refers to another.
    levels: dict[str, int] = {}
    open_values = [(schema, 1)]
    while open_values:
        value, depth = open_values.pop()
        deepest = max(deepest, depth)
        if isinstance(value, dict):
            if isinstance(target := value.get("$ref"), str):
                # The root and `$defs` are no part of a definition.
                levels[target] = max(levels.get(target, 1), depth - 2)
            open_values += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            open_values += [(each, depth + 1) for each in value]
    return deepest + sum(levels.values())


def _refuse_tokens(lark: str) -> None:
    """Refuse what asks for tokens or bytes instead of text."""
    if "allow_invalid_utf8" in lark:
        raise BadGrammar("an answer is text: it cannot hold bytes that form no character")
    for found in _LARK_PIECE.finditer(lark):
        if token := found["token"]:
            raise BadGrammar(f"{token} asks for a token, not for text", remedy="Ask for its text.")


# The translation keeps its place in the text, and a parser of Python may run out of stack.
_translating = threading.Lock()


def _lark_of_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        with _translating:
            return gbnf_to_lark(text)
    except RecursionError:
        raise BadGrammar("the GBNF grammar is nested too deeply") from None
    except Exception as error:  # the translation raises bare Exception, too
        raise BadGrammar(f"GBNF: {_one_line(str(error))}") from None


def _schema(text: str) -> Any:
    """A schema as JSON.

    Raises:
        BadGrammar: not JSON, or a number in it would need an automaton without end.
    """
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadGrammar(f"the schema is not JSON: {_one_line(str(error))}") from None
    if not isinstance(schema, dict | bool):
        raise BadGrammar("a schema is an object, or true", remedy='For example {"type": "object"}.')
    if schema is False:
        raise BadGrammar("no text matches the schema `false`")
    for key, value in _members(schema):
        if key == "multipleOf" and _remainders(value) > _MOST_REMAINDERS:
            raise BadGrammar(
                f"multipleOf {value} has too many digits",
                remedy=f"Use a number whose digits are at most {_MOST_REMAINDERS}.",
            )
    # The library takes objects alone.
    return {} if schema is True else schema


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _members(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, wherever it stands."""
    open_values = [schema]
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            yield from value.items()
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value


def _remainders(value: Any) -> int:
    try:
        digits = Decimal(str(value)).normalize().as_tuple()
    except InvalidOperation:
        return 0
    exponent = digits.exponent if isinstance(digits.exponent, int) else 0
    return int("".join(map(str, digits.digits)) + "0" * max(0, min(exponent, 9)))


# What the compiler says of its own bounds names settings that nobody here can reach.
_TOO_LARGE = ("limits.", "Too many items", "too many expressions")


def _refusal(message: str) -> BadGrammar:
    if message.startswith("panic"):
        message = "it asks for what the compiler does not know"
    elif message.startswith("NoExtensionBias"):
        message = "no text matches it"
    elif any(bound in message for bound in _TOO_LARGE):
        message = "it is too large or too ambiguous to compile"
    return BadGrammar(f"the grammar cannot be served: {_one_line(message)}")


def _one_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines).removesuffix(" <non-verbose/>")[:400]
