"""Texts under a grammar: what is refused, what a canvas spends on it, and that it always holds."""

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_infill import byte_tokenizer, tiny_config, tiny_infiller, tiny_model
from tiny_tokenizers import CHANNEL, CHANNEL_END, TURN_END, chat_template, chat_tokenizer

from infilld.engine.chat_prompt import ChatLayout
from infilld.engine.config import SamplerConfig
from infilld.engine.conversation import ChatAnswer, ChatRequest, ChatResult, ChatUpdate, Message
from infilld.engine.draws import SeededDraws
from infilld.engine.errors import BadGrammar, Cancelled, UnknownOption
from infilld.engine.grammar import MAX_GRAMMAR_BYTES, refuse_bad
from infilld.engine.guided import GuidedText, guided_denoising
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.loading import load_infiller, starter_folder
from infilld.engine.matching import GrammarTokens, Matching
from infilld.engine.passes import drive
from infilld.engine.plan import FillMethod
from infilld.engine.prompt import EOS
from infilld.engine.reading import Belief, Reading
from infilld.engine.request import Grammar, InfillRequest, InfillResult, Pin, Span
from infilld.engine.writing import never_written

TOKENIZER = byte_tokenizer()
END = TOKENIZER.control(EOS)
TOKENS = GrammarTokens(TOKENIZER, TOKENIZER.vocab_tokens)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "email", "tags", "active"],
    "additionalProperties": False,
}
GOOD = '{"name": "Ada", "age": 36, "email": "a@b.org", "tags": [], "active": true}'


def schema(content: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(content))


# What is refused.


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"properties": {"a": {"not": {}}}}), "not"),
        (schema({"x-guidance": {"lenient": True}, "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "strin"}), "strin"),
        (schema({"type": "string", "format": "nonsense"}), "nonsense"),
        (schema({"$ref": "https://example.org/schema"}), "example.org"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "grammar"),
        (schema({"type": "array", "minItems": 3, "maxItems": 1}), "minItems"),
        (schema({"type": "integer", "multipleOf": 1000003}), "multipleOf"),
        (schema(False), "no text"),
        (schema([]), "object"),
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", '{"a":' * 5000 + "1" + "}" * 5000), "not JSON"),
        (Grammar("json_schema", '{"maximum": NaN}'), "NaN"),
        (Grammar("json_schema", '{"enum": ["\\ud800"]}'), "escape"),
        (Grammar("json_schema", " " * MAX_GRAMMAR_BYTES + "{}"), "bytes"),
        (Grammar("regex", "a(b"), "unclosed"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", ""), "empty"),
        (Grammar("regex", "a\0"), "NUL"),
        (Grammar("regex", "\ud800"), "surrogate"),
        (Grammar("lark", "start: x"), "unknown name"),
        (Grammar("lark", 'start: "a" <|eot|>'), "token"),
        (Grammar("lark", "start: <[12-20]>"), "token"),
        (Grammar("lark", '%llguidance {"allow_invalid_utf8": true}\nstart: "a"'), "character"),
        (Grammar("lark", '# "\nstart: <|eot|> "a"\n# "'), "token"),
        (Grammar("lark", 'start: /a\n/ <|eot|> "/"'), "token"),
        (Grammar("lark", 'start: "a" start'), "grammar"),
        (Grammar("gbnf", "root ::= root"), "no text matches it$"),
        (Grammar("regex", r"[^\s\S]"), "no text matches it$"),
        (Grammar("regex", "a?" * 3000 + "a" * 3000), "too large or too ambiguous to compile$"),
        (Grammar("gbnf", "root ::= ("), "GBNF"),
        (Grammar("gbnf", 'x ::= "a"'), "root"),
        (Grammar("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "deep"),
        (Grammar("gbnf", "root ::= " + '"a" ' * 60000), "grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_name(grammar: Grammar, told: str) -> None:
    with pytest.raises(BadGrammar, match=told) as caught:
        refuse_bad(grammar)
    assert caught.value.remedy
    assert len(str(caught.value)) < 600


def referring(count: int, wrapped: Callable[[Any], Any]) -> Any:
    """A schema whose definitions each refer to the next."""
    chain = {f"a{n}": wrapped({"$ref": f"#/$defs/a{n + 1}"}) for n in range(count)}
    return {"$defs": {**chain, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def ruled(count: int, rule: str, *, name: str = "r", kind: Any = "lark") -> Grammar:
    """A grammar whose rules each are the next, as `rule` says."""
    says, start = ("::=", "root") if kind == "gbnf" else (":", "start")
    rules = [f"{name}{n}{says} " + rule.format(f"{name}{n + 1}") for n in range(count)]
    return Grammar(kind, "\n".join([f"{start}{says} {name}0", *rules, f'{name}{count}{says} "a"']))


def nested(count: int, content: Any) -> Any:
    for _ in range(count):
        content = {"items": content}
    return content


@pytest.mark.parametrize(
    "grammar",
    [
        schema(referring(4000, lambda next_one: next_one)),
        schema(referring(3000, lambda next_one: {"allOf": [next_one]})),
        schema(referring(200, lambda next_one: nested(50, next_one))),
        schema(nested(900, {})),
        ruled(5000, "{}"),
        ruled(5000, '{} "b"', name="T"),
        ruled(800, "((((((((((((((((({})))))))))))))))))"),
        ruled(5000, '{} # "'),
        ruled(10000, "{}", kind="gbnf"),
        Grammar("lark", f"start: %json {json.dumps(referring(4000, dict))}"),
        Grammar("lark", 'start: "' + '\\"' * 120000),
    ],
    ids=lambda grammar: f"{grammar.kind} {grammar.text[:40]}",
)
def test_what_would_take_the_stack_of_a_thread_is_refused(grammar: Grammar) -> None:
    """In a process of its own: it would be ended."""
    code = (
        "import sys, threading\n"
        "from infilld.engine.errors import BadGrammar\n"
        "from infilld.engine.grammar import refuse_bad\n"
        "from infilld.engine.request import Grammar\n"
        "def refused():\n"
        "    try: refuse_bad(Grammar(sys.argv[1], sys.stdin.read()))\n"
        "    except BadGrammar as error: print(error)\n"
        "thread = threading.Thread(target=refused)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, grammar.kind],
        input=grammar.text,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    "grammar",
    [
        schema(referring(150, lambda next_one: {"properties": {"next": next_one}})),
        ruled(300, '("(" {} ":")?'),
        ruled(300, '("(" {})?', kind="gbnf"),
        Grammar("json"),
        schema(True),
        schema({}),
        schema(PERSON),
        schema({"type": "string", "format": "date-time"}),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}),
        Grammar("regex", r"\d{4}-\d\d"),
        Grammar("lark", 'start: "<|eot|>" /<[a-z]>/ // <b>'),
        Grammar("gbnf", r'root ::= [^"\\\x7F\x00-\x1F]+ "\n"'),
    ],
    ids=str,
)
def test_what_can_be_served_is_not_refused(grammar: Grammar) -> None:
    refuse_bad(grammar)


# What a canvas spends on it.


def written(
    grammar: Grammar,
    says: Sequence[str],
    *,
    chance: float = 0.99,
    max_tokens: int = 128,
    ends: Iterable[int] = (END or 0,),
    turns: list[int] | None = None,
    check: Callable[[], None] = lambda: None,
    is_late: Callable[[], bool] = lambda: False,
) -> tuple[GuidedText, int, str]:
    """A text whose model believes `says` in turn, one in each pass; passes; the text.

    `turns` gets the tokens written when others had their turn.
    """
    guided = GuidedText(TOKENS.start(grammar), frozenset(ends), max_tokens)
    draws = SeededDraws(0)
    vocab, length = TOKENIZER.vocab_tokens, 128
    begun = len(guided.tokens)
    work = guided_denoising(
        None,  # type: ignore[arg-type]  # nothing reads it here
        draws.first_canvas(1, length, vocab),
        SamplerConfig(max_steps=12),
        draws,
        guided,
        never_written(TOKENIZER, vocab, {END}),
        greedy=True,
        belief_tokens=None,
        on_step=lambda step: None,
        check=check,
        is_late=is_late,
    )
    passes = 0
    try:
        wanted = next(work)
        while True:
            if not wanted:
                if turns is not None:
                    turns.append(len(guided.tokens))
                wanted = work.send([])
                continue
            (asked,) = wanted
            text = [*TOKENIZER.encode(says[min(passes, len(says) - 1)]), END]
            ids = (text[begun:] + [END] * length)[:length]
            logits = torch.zeros(1, length, vocab)
            logits.scatter_(-1, torch.tensor(ids)[None, :, None], 20.0)
            banned = asked.ask.banned.dense()
            probabilities = logits.masked_fill(banned, -torch.inf).softmax(-1)
            top = probabilities.topk(16, -1)
            argmax = torch.where(asked.ask.pins.mask, asked.ask.pins.tokens, top.indices[..., 0])
            reading = Reading(
                argmax=argmax,
                log_probability=torch.full((1, length), chance).log(),
                entropy_nats=torch.full((1, length), 1.0 - chance),
                proposal=argmax,
                belief=Belief(ids=top.indices, probabilities=top.values),
            )
            passes += 1
            assert passes < 100, "it goes on for ever"
            wanted = work.send([reading])
    except StopIteration:
        pass
    return guided, passes, TOKENIZER.text(guided.tokens)


def test_a_model_that_agrees_needs_no_pass_more() -> None:
    guided, passes, text = written(schema(PERSON), [GOOD])
    assert (guided.is_ended, passes, text) == (True, 1, GOOD)


def test_nothing_is_committed_to_noise() -> None:
    """The first two passes are not sure of what they write; only what must follow is there."""
    noise = '{"name": "' + "q" * 90
    guided, passes, text = written(schema(PERSON), [noise, noise, GOOD], chance=0.7)
    assert guided.is_ended
    assert text == GOOD
    assert passes > 2


def test_where_the_model_disagrees_one_position_gets_the_mask() -> None:
    guided, passes, text = written(Grammar("regex", "[a-z]{3}X[a-z]{3}"), ["abc-defg"])
    assert guided.is_ended
    assert re.fullmatch("[a-z]{3}X[a-z]{3}", text)
    # X is what must follow: it costs no mask, but what stands behind it is looked at again.
    assert passes == 2
    guided, passes, text = written(Grammar("regex", "[a-z]{3}[0-9][a-z]{3}"), ["abc-defg"])
    assert re.fullmatch("[a-z]{3}[0-9][a-z]{3}", text)
    assert text.startswith("abc")
    assert text[4:] == "def"
    assert passes == 2


def test_what_must_follow_needs_no_pass() -> None:
    guided = GuidedText(TOKENS.start(Grammar("regex", "constant")), frozenset({1}), 20)
    assert guided.is_ended
    assert TOKENIZER.text(guided.tokens) == "constant"


def test_a_text_is_closed_while_there_is_room() -> None:
    endless = '{"name": "' + "x" * 500
    for most in (72, 80, 100, 120):
        guided, _, text = written(schema(PERSON), [endless], max_tokens=most)
        assert guided.is_ended, most
        assert len(guided.tokens) <= most
        assert jsonschema_rs.is_valid(PERSON, json.loads(text))
        # As much as there is room for was written.
        assert len(guided.tokens) > most - 4
    guided, _, _ = written(schema(PERSON), [endless], max_tokens=30)
    assert guided.is_stuck
    assert not guided.is_ended


def test_no_control_token_belongs_to_a_text() -> None:
    text = TOKENS.start(Grammar("regex", "(.|\n)*"))
    allowed = text.allowed()
    assert not allowed[sorted(TOKENIZER.control_ids)].any()
    assert allowed.sum() > 100
    assert not text.accept(END or 0)
    assert text.can_end


# That it always holds, whatever the model writes.


@pytest.fixture(scope="module")
def random_engine() -> Infiller:
    config = tiny_config(TOKENIZER.vocab_tokens, canvas_tokens=32)
    sampler = replace(SamplerConfig(), max_steps=3)
    return Infiller(tiny_model(config), TOKENIZER, sampler, FillMethod(holds_back=False))


def answered(
    engine: Infiller, grammar: Grammar, **fields: object
) -> tuple[ChatAnswer, ChatResult, list[ChatUpdate]]:
    updates: list[ChatUpdate] = []
    wanted: Any = {"seed": 1, "messages": (Message("user", "Answer."),), "grammar": grammar}
    request = ChatRequest(**(wanted | fields))
    result = drive(engine.model, engine.conversing(request, Hooks(on_canvas=updates.append)))
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(updates))
    return result.answers[0], result, updates


# A case is a conversation: to look for smaller ones takes minutes.
PROPERTY = settings(
    deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate), database=None
)
names = st.sampled_from(["a", "bc", "ä\n", "x y"])
scalars = st.one_of(
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-20, 20),
        st.integers(0, 30),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "number", "minimum": -2, "maximum": 2.5}),
    st.builds(lambda n: {"type": "string", "minLength": n, "maxLength": n + 3}, st.integers(0, 4)),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.sampled_from(["r", "g", 1, None]), min_size=1)
    ),
    st.just({"type": "string", "pattern": "^[0-9]{2}-[a-f]+$"}),
    st.just({"const": "€"}),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda properties, count, extra: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:count],
            "additionalProperties": extra,
        },
        st.dictionaries(names, inner, max_size=3),
        st.integers(0, 3),
        st.booleans(),
    )


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 2},
        inner,
        st.integers(0, 2),
    )


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
    ),
    max_leaves=4,
)


@settings(PROPERTY, max_examples=12)
@given(content=schemas, seed=st.integers(0, 99), most=st.integers(20, 150), greedy=st.booleans())
def test_a_random_model_always_writes_what_a_schema_allows(
    random_engine: Infiller, content: Any, seed: int, most: int, greedy: bool
) -> None:
    answer, _, _ = answered(
        random_engine, schema(content), seed=seed, max_tokens=most, greedy=greedy
    )
    if answer.finish == "stop":
        assert jsonschema_rs.is_valid(content, json.loads(answer.text)), answer.text
    else:
        assert answer.finish == "length"


@settings(PROPERTY, max_examples=10)
@given(
    parts=st.lists(
        st.sampled_from(["[a-z]+", "x{2,5}", "(ab|cd)?", "[0-9]{2}", "é", "[^a]", r"(1|22)*"]),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 99),
)
def test_a_random_model_always_writes_what_a_pattern_allows(
    random_engine: Infiller, parts: list[str], seed: int
) -> None:
    pattern = "".join(parts)
    answer, result, _ = answered(random_engine, Grammar("regex", pattern), seed=seed, max_tokens=60)
    assert result.usage.text_tokens <= 60
    if answer.finish == "stop":
        assert re.fullmatch(pattern, answer.text, re.DOTALL)
    else:
        assert answer.finish == "length"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("gbnf", 'root ::= "yes" | "no" item*\nitem ::= " " [a-z]'), "yes|no( [a-z])*"),
        (Grammar("lark", 'start: "a"+ "b"'), "a+b"),
        (Grammar("lark", "start: NAME\nNAME: /[a-z]{2,4}/"), "[a-z]{2,4}"),
    ],
    ids=str,
)
def test_other_grammars_hold_too(random_engine: Infiller, grammar: Grammar, pattern: str) -> None:
    answer, _, _ = answered(random_engine, grammar, max_tokens=60)
    assert answer.finish == "stop"
    assert re.fullmatch(pattern, answer.text)


def test_a_text_goes_on_over_canvases(random_engine: Infiller) -> None:
    answer, result, updates = answered(random_engine, Grammar("regex", "[a-z]{70}"), max_tokens=90)
    assert (len(answer.text), answer.finish) == (70, "stop")
    assert {each.canvas for each in updates} >= {0, 1, 2}
    assert result.usage.text_tokens == 70


def test_a_bad_grammar_costs_no_pass(random_engine: Infiller) -> None:
    with pytest.raises(BadGrammar):
        next(
            random_engine.conversing(
                ChatRequest(messages=(Message("user", "?"),), grammar=Grammar("regex", "(")),
                Hooks(),
            )
        )


@pytest.mark.parametrize("end", [CHANNEL_END, TURN_END])
def test_thoughts_are_free_before_a_grammar(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """A model that ends its turn within them owes the answer."""
    tokenizer = chat_tokenizer()
    model = tiny_model(tiny_config(tokenizer.vocab_tokens, canvas_tokens=32))
    layout = ChatLayout(tokenizer, chat_template())
    engine = Infiller(model, tokenizer, replace(SamplerConfig(), max_steps=2), layout=layout)
    from infilld.engine import writing

    plain: Callable[..., Any] = writing.denoising
    thought = [CHANNEL, *tokenizer.encode("thought\nhm"), end]

    def scripted(*rest: Any, **more: Any):
        denoised = yield from plain(*rest, **more)
        denoised.tokens[0, : len(thought)] = torch.tensor(thought)
        return denoised

    monkeypatch.setattr(writing, "denoising", scripted)
    answer, _, _ = answered(engine, Grammar("regex", "yes|no"), think=True)
    assert (answer.thoughts, answer.finish) == ("hm", "stop")
    assert answer.text in ("yes", "no")


# The starter.


@pytest.fixture(scope="module")
def starter() -> Infiller:
    return load_infiller(starter_folder(), "cpu")


@pytest.mark.parametrize(
    "content",
    [
        PERSON,
        {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 4},
        {
            "type": "object",
            "properties": {"items": {"type": "array", "items": {"type": "integer"}}},
            "required": ["items"],
            "additionalProperties": False,
        },
    ],
    ids=["person", "colours", "numbers"],
)
def test_the_starter_writes_what_a_schema_asks_for(starter: Infiller, content: Any) -> None:
    answer, result, _ = answered(starter, schema(content))
    assert answer.finish == "stop"
    assert jsonschema_rs.is_valid(content, json.loads(answer.text))
    # A weak model, and still more than a token in each pass, beside those of its schedule.
    assert result.usage.passes <= result.usage.text_tokens + 20


# A gap.

TEXT = "data = json.loads('')\n"
AT = TEXT.index("''") + 1


def filled(engine: Infiller, grammar: Grammar, **fields: object) -> InfillResult:
    wanted: Any = {"text": TEXT, "spans": (Span(AT, AT),), "seed": 1, "grammar": grammar}
    return engine.infill(InfillRequest(**(wanted | fields)))


def test_a_gap_is_filled_with_what_matches(random_engine: Infiller) -> None:
    result = filled(random_engine, Grammar("regex", "[a-f]{4}"), alternatives=3)
    texts = [each.spans[0].text for each in result.alternatives]
    assert result.reason == "ok"
    assert texts
    assert all(re.fullmatch("[a-f]{4}", text) for text in texts)
    assert len(set(texts)) == len(texts)
    scores = [each.score for each in result.alternatives]
    assert scores == sorted(scores, reverse=True)
    best = result.alternatives[0].spans[0]
    assert "".join(token.text for token in best.tokens) == best.text
    assert 0 < best.confidence < 1


def test_a_gap_that_cannot_be_whole_stays_empty_and_says_why(random_engine: Infiller) -> None:
    result = filled(random_engine, schema(PERSON), max_tokens=10)
    assert (result.alternatives, result.reason) == ((), "empty")
    assert "max_tokens" in result.why


def test_a_gap_whose_deadline_strikes_stays_empty(random_engine: Infiller) -> None:
    request = InfillRequest(text=TEXT, spans=(Span(AT, AT),), grammar=Grammar("regex", "[a-z]{9}"))
    result = random_engine.infill(request, Hooks(deadline_at=time.monotonic() - 1))
    assert (result.alternatives, result.reason) == ((), "deadline")
    assert result.usage.passes == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails what would go on for ever."""
    forced, calls = Matching.forced, itertools.count()

    def counted(text: Matching) -> list[int]:
        assert next(calls) < 2000, "it goes on for ever"
        return forced(text)

    monkeypatch.setattr(Matching, "forced", counted)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("pattern", ["```[a-z]{1,5}", "[`]{3}x", "[a-z`]{8}"])
def test_a_fence_in_a_gap_is_text_where_a_grammar_says_so(pattern: str) -> None:
    """It is a token that ends every other fill."""
    tokenizer = chat_tokenizer(words=("```",))
    assert len(tokenizer.encode("```")) == 1
    model = tiny_model(tiny_config(tokenizer.vocab_tokens, canvas_tokens=32))
    sampler = replace(SamplerConfig(), max_steps=2)
    layout = ChatLayout(tokenizer, chat_template())
    engine = Infiller(model, tokenizer, sampler, FillMethod(holds_back=False), layout=layout)
    calls = itertools.count()

    def check() -> None:
        assert next(calls) < 200, "it goes on for ever"

    request = InfillRequest(
        text=TEXT, spans=(Span(AT, AT),), seed=1, grammar=Grammar("regex", pattern)
    )
    result = engine.infill(request, Hooks(check=check))
    assert result.reason == "ok"
    assert re.fullmatch(pattern, result.alternatives[0].spans[0].text)


@pytest.mark.usefixtures("impatient")
def test_an_end_that_spells_text_is_never_taken_for_text() -> None:
    """Such an end comes from a generation configuration."""
    (end,) = TOKENIZER.encode("`")
    guided = GuidedText(TOKENS.start(Grammar("regex", "`[a-z]+")), frozenset({end}), 20)
    assert (guided.tokens, guided.is_over) == ([], False)
    guided, passes, text = written(Grammar("regex", "[`ab]{3}c"), ["`a`c"], ends={end})
    assert re.fullmatch("[ab]{3}c", text)
    assert passes < 9
    # No other token spells it.
    guided, passes, _ = written(Grammar("regex", "`[`a]c"), ["``c"], ends={end})
    assert (guided.is_stuck, guided.is_ended) == (True, False)
    assert passes < 9


def test_thoughts_before_a_gap_end_with_the_deadline() -> None:
    """It strikes after the first pass over the thoughts."""
    tokenizer = chat_tokenizer()
    config = replace(tiny_config(tokenizer.vocab_tokens, canvas_tokens=32), max_positions=2048)
    layout = ChatLayout(tokenizer, chat_template())
    sampler = replace(SamplerConfig(), max_steps=3)
    engine = Infiller(tiny_model(config), tokenizer, sampler, layout=layout)
    passes = 0
    run = engine.model.run

    def counted(wanted: Any) -> Any:
        nonlocal passes
        passes += 1
        return run(wanted)

    class Late(Hooks):
        def is_late(self, needed_s: float = 0.0) -> bool:
            return passes > 0

    request = InfillRequest(
        text=TEXT, spans=(Span(AT, AT),), seed=1, think=True, grammar=Grammar("regex", "[a-z]{9}")
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.model, "run", counted)
        result = engine.infill(request, Late())
    assert (result.alternatives, result.reason, passes) == ((), "deadline", 1)
    assert result.usage.prompt_tokens > 0
    assert result.why
    assert not engine._prefixes._used


def test_who_goes_away_or_waits_is_heard_between_the_tokens_of_a_canvas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A grammar may take milliseconds for each."""
    plain, _, text = written(Grammar("regex", "[a-z]{40}"), ["abcd" * 10])
    assert len(plain.tokens) == 40
    monkeypatch.setattr("infilld.engine.guided._TURN_S", -1.0)
    turns: list[int] = []
    guided, _, again = written(Grammar("regex", "[a-z]{40}"), ["abcd" * 10], turns=turns)
    assert (again, len(turns)) == (text, 40)
    # It is late after ten.
    guided, _, cut = written(
        Grammar("regex", "[a-z]{40}"), ["abcd" * 10], turns=turns, is_late=lambda: len(turns) >= 50
    )
    assert (cut, guided.is_over) == (text[: len(cut)], False)
    assert 9 <= len(cut) <= 11
    calls = itertools.count()

    def check() -> None:
        if next(calls) == 5:
            raise Cancelled("gone")

    with pytest.raises(Cancelled):
        written(Grammar("regex", "[a-z]{40}"), ["abcd" * 10], check=check)


def test_a_text_that_cannot_go_on_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matching, "accept", lambda text, token: False)
    guided, passes, _ = written(Grammar("regex", "[a-z]+"), ["a"], ends=())
    assert (guided.is_stuck, passes) == (True, 2)


def test_a_grammar_does_not_keep_a_prompt_from_being_warmed(random_engine: Infiller) -> None:
    result = filled(random_engine, Grammar("json"), warm=True)
    assert (result.alternatives, result.usage.passes) == ((), 0)


@pytest.mark.parametrize(
    "more",
    [
        {"pins": (Pin(0, "start", "x"),)},
        {"drafts": ("x",)},
        {"spans": (Span(0, 1),), "repair": ()},
        {"spans": (Span(0, 0), Span(3, 3))},
        {"min_tokens": 2},
    ],
    ids=lambda more: next(reversed(more)),
)
def test_nothing_else_may_say_what_the_text_is(more: dict[str, object]) -> None:
    with pytest.raises(UnknownOption, match="grammar"):
        filled(tiny_infiller(), Grammar("json"), **more)
