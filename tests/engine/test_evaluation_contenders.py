"""Who answers, by what rule, and what is made of the answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_infill import byte_tokenizer, tiny_infiller

from infilld.engine.errors import GapTooLong, UnknownOption
from infilld.engine.evaluation import run
from infilld.engine.evaluation.contenders import Answer, Canvas, Retrieval, make_contender
from infilld.engine.evaluation.items import Check, Item
from infilld.engine.evaluation.names import CONTENDERS, KINDS, SWITCHES
from infilld.engine.evaluation.ngram import NGram
from infilld.engine.evaluation.run import EvaluationOptions, compare, format_evaluation
from infilld.engine.evaluation.sandbox import Outcome
from infilld.engine.evaluation.written import Limit, limit_of, write
from infilld.engine.infill import Infiller
from infilld.engine.plan import FillMethod
from infilld.engine.request import (
    Alternative,
    InfillRequest,
    InfillResult,
    Reason,
    SpanFill,
    Usage,
)

BEFORE = "def area(a, b):\n    return a * b\n\n\ndef volume(a, b, c):\n    return a "
ITEM = Item("rest_of_line", BEFORE, "* b * c", "\n", "made up")
LINES = Item("lines", "if a:\n    ", "b = 1\n    c = 2\n    d = 3", "\n", "made up")


class FakeEngine(Infiller):
    """Answers with one text, or with a reason for none, and keeps the requests."""

    def __init__(self, text: str, reason: Reason = "ok") -> None:
        plain = tiny_infiller()
        super().__init__(plain.model, plain.tokenizer, plain.sampler)
        self.text, self.reason_given = text, reason
        self.requests: list[InfillRequest] = []
        self.forgotten = 0

    def infill(self, request: InfillRequest, hooks: object = None) -> InfillResult:
        self.requests.append(request)
        assert self.forgotten == len(self.requests)
        at = request.spans[0].start
        found = Alternative((SpanFill(at, at, self.text, 0.5),), -0.7)
        return InfillResult(
            id="1", seed=0, alternatives=(found,), reason=self.reason_given, usage=Usage(passes=7)
        )

    def forget(self) -> None:
        self.forgotten += 1


def test_the_engine_is_asked_for_the_gap() -> None:
    engine = FakeEngine("* c")
    answer = Canvas("canvas", engine, seed=5).answer(ITEM)
    assert (answer.text, answer.reason, answer.confidence, answer.passes) == ("* c", "ok", 0.5, 7)
    assert answer.ms > 0
    (request,) = engine.requests
    assert request.text == BEFORE + "\n"
    assert (request.spans[0].start, request.spans[0].end) == (len(BEFORE), len(BEFORE))
    assert (request.seed, request.min_tokens, request.max_tokens) == (5, None, None)


def test_what_is_held_back_is_an_abstention() -> None:
    answer = Canvas("canvas", FakeEngine("* c", "low_confidence"), seed=5).answer(ITEM)
    assert (answer.text, answer.reason, answer.passes) == (None, "low_confidence", 7)


def test_the_oracle_tells_the_number_of_tokens() -> None:
    engine = FakeEngine("* c")
    Canvas("oracle_length", engine, seed=5, knows_length=True).answer(ITEM)
    # The tiny vocabulary has one token for each byte.
    assert (engine.requests[0].min_tokens, engine.requests[0].max_tokens) == (7, 7)


def test_the_oracle_has_nothing_to_tell_where_nothing_is_missing() -> None:
    engine = FakeEngine("", "empty")
    answer = Canvas("oracle_length", engine, seed=5, knows_length=True).answer(
        replace(ITEM, kind="silent", missing="")
    )
    assert (answer.text, engine.requests[0].max_tokens) == (None, None)


def test_a_gap_that_fits_no_canvas_is_an_abstention() -> None:
    contender = make_contender("oracle_length", tiny_infiller(), 0)
    answer = contender.answer(replace(ITEM, missing="x" * 500))
    assert (answer.text, answer.reason) == (None, GapTooLong.code)


def test_each_contender_has_the_method_of_its_name() -> None:
    engine = tiny_infiller()
    made = {name: make_contender(name, engine, 0) for name in CONTENDERS}
    assert [contender.name for contender in made.values()] == list(CONTENDERS)
    methods = {name: c.engine.method for name, c in made.items() if isinstance(c, Canvas)}
    assert methods == {name: FillMethod(**switch.changes) for name, switch in SWITCHES.items()}
    assert methods["canvas"] == FillMethod()
    # Every other switch changes something.
    plain = [name for name, method in methods.items() if method == FillMethod()]
    assert plain == ["canvas", "oracle_length"]
    assert len({id(c.engine) for c in made.values() if isinstance(c, Canvas)}) == len(methods)
    oracle = made["oracle_length"]
    assert isinstance(oracle, Canvas)
    assert oracle.knows_length


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("item", [ITEM, LINES], ids=["rest_of_line", "lines"])
def test_every_contender_answers_the_same_way_twice(name: str, item: Item) -> None:
    engine = tiny_infiller()
    first, second = (make_contender(name, engine, 1).answer(item) for _ in range(2))
    assert (first.text, first.reason) == (second.text, second.reason)
    assert (first.text is None) == (first.reason != "ok")
    assert first.ms > 0
    if item is ITEM and first.text is not None:
        assert "\n" not in first.text


def test_retrieval_is_the_best_found_draft() -> None:
    answer = Retrieval("retrieval").answer(ITEM)
    assert (answer.text, answer.passes) == ("* b", 0)
    assert Retrieval("retrieval").answer(Item("span", "", "x", "", "")).reason == "not_found"


def test_the_n_gram_model_continues_as_the_document_did() -> None:
    answer = make_contender("n_gram", tiny_infiller(), 0).answer(ITEM)
    assert answer.text == "* b"
    # Of two places the one before the gap counts as the later one.
    both = Item("span", "q1;q", "1", "q2", "")
    assert make_contender("n_gram", tiny_infiller(), 0).answer(both).text == "1"
    empty = Item("span", "", "x", "", "")
    assert make_contender("n_gram", tiny_infiller(), 0).answer(empty).reason == "empty"


class TestNGram:
    def test_the_longest_context_wins_over_a_frequent_short_one(self) -> None:
        model = NGram([[1, 2, 3, 9, 2, 4, 9, 2, 4]])
        assert model.next_token([2]) == 4
        assert model.next_token([1, 2]) == 3
        # This context occurs nowhere, its last token does.
        assert model.next_token([7, 2]) == 4

    def test_the_order_bounds_the_context(self) -> None:
        tokens = [1, 2, 3, 5, 2, 3, 6, 2, 3, 6]
        assert NGram([tokens], order=4).next_token([1, 2, 3]) == 5
        assert NGram([tokens], order=3).next_token([1, 2, 3]) == 6

    def test_the_latest_of_equals_wins(self) -> None:
        assert NGram([[1, 2, 1, 3]]).next_token([1]) == 3
        assert NGram([[1, 2], [1, 3]]).next_token([1]) == 3
        assert NGram([[1, 3], [1, 2]]).next_token([1]) == 2

    def test_no_n_gram_spans_two_parts(self) -> None:
        model = NGram([[5, 1], [2, 5, 5]])
        # Token 1 ends its part, so nothing follows it: the commonest token of all is left.
        assert model.next_token([1]) == 5
        assert NGram([[1, 2], [2, 3, 1, 4]]).next_token([1, 2]) == 3

    def test_an_unknown_or_no_context_gives_the_commonest(self) -> None:
        assert NGram([[4, 4, 1]]).next_token([8]) == 4
        assert NGram([[4, 4, 1]]).next_token([]) == 4

    def test_an_empty_document_gives_nothing(self) -> None:
        assert NGram([[], []]).next_token([1]) is None


class TestLimits:
    @pytest.mark.parametrize(
        ("kind", "missing", "limit"),
        [
            ("rest_of_line", "abc", Limit(1, 64)),
            ("line", "abc", Limit(1, 64)),
            ("lines", "a\nb\nc", Limit(3, 192)),
            ("silent", "", Limit(1, 64)),
            ("span", "a\nbc", Limit(None, 4)),
            ("benchmark", "a\nbc", Limit(None, 4)),
        ],
    )
    def test_kinds(self, kind: str, missing: str, limit: Limit) -> None:
        assert limit_of(Item(kind, "", missing, "", ""), byte_tokenizer()) == limit

    @pytest.mark.parametrize(
        ("limit", "expected"),
        [
            (Limit(1, 64), "ab"),
            (Limit(2, 64), "ab\ncd"),
            (Limit(9, 7), "ab\ncd\ne"),
            (Limit(None, 4), "ab\nc"),
        ],
    )
    def test_text_ends_there(self, limit: Limit, expected: str) -> None:
        tokenizer = byte_tokenizer()
        assert write(script("ab\ncd\nefgh\n"), limit, tokenizer) == expected


def script(text: str) -> Callable[[Sequence[int]], int]:
    tokens = byte_tokenizer().encode(text)
    return lambda written: tokens[len(written)]


def test_compare_measures_everyone_on_the_same_items(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"canvas": ["* b * c", "nothing"], "retrieval": ["* b", "x = 1"]}

    def make(name: str, engine: object, seed: int) -> "Scripted":
        return Scripted(name, texts[name])

    monkeypatch.setattr(run, "make_contender", make)
    said: list[str] = []
    items = [ITEM, Item("rest_of_line", "", "x = 1", "\n", "made up")]
    found = compare(tiny_infiller(), items, list(texts), 0, said.append)
    assert {name: row["exact_match"] for name, row in found.items()} == {
        "canvas": 0.5,
        "retrieval": 0.5,
    }
    assert (found["retrieval"]["only_it_exact"], found["retrieval"]["only_canvas_exact"]) == (1, 1)
    assert "only_it_exact" not in found["canvas"]
    assert "pass_at_1" not in found["canvas"]
    assert said == [
        f"rest_of_line: {name} has 50.0 % of 2 exact, 0 s" for name in ("canvas", "retrieval")
    ]


def test_compare_runs_tests_of_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[tuple[str, str]] = []

    def pretend(program: str, entry_point: str) -> Outcome:
        programs.append((program, entry_point))
        return Outcome("passed")

    monkeypatch.setattr(run, "run_tests", pretend)
    monkeypatch.setattr(run, "make_contender", lambda name, *_: Scripted(name, ["B", None]))
    items = [Item("benchmark", "a", "b", "c", "T", Check("test", "f"))] * 2
    found = compare(tiny_infiller(), items, ["canvas"], 0)["canvas"]
    assert programs == [("aBc\ntest", "f")]
    assert (found["pass_at_1"], found["tests"]) == (0.5, {"passed": 1, "abstained": 1})


def test_another_judge_runs_the_tests_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[Item, str]] = []

    def judge(item: Item, text: str) -> Outcome:
        judged.append((item, text))
        return Outcome("failed", "why")

    monkeypatch.setattr(run, "make_contender", lambda name, *_: Scripted(name, ["B", None]))
    items = [replace(ITEM, kind="repository")] * 2
    found = compare(tiny_infiller(), items, ["canvas"], 0, judge=judge)["canvas"]
    assert judged == [(items[0], "B")]
    assert (found["pass_at_1"], found["tests"]) == (0.0, {"failed": 1, "abstained": 1})


def test_silent_items_are_measured_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "make_contender", lambda name, *_: Scripted(name, ["B", None]))
    items = [replace(ITEM, kind="silent", missing="")] * 2
    found = compare(tiny_infiller(), items, ["canvas"], 0)["canvas"]
    assert (found["silent"], found["noise"], found["precision"]) == (0.5, 0.5, None)


class Scripted:
    """Gives its texts one after another."""

    def __init__(self, name: str, texts: Sequence[str | None]) -> None:
        self.name, self.texts = name, iter(texts)

    def answer(self, item: Item) -> Answer:
        text = next(self.texts)
        return Answer(text, "empty" if text is None else "ok")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("rest",)}, "'rest' is no kind"),
        ({"contenders": ("gpt",)}, "'gpt' is no contender"),
        ({"kinds": ("benchmark",)}, "no benchmark"),
        ({"repository": Path("x")}, "without the other"),
        ({"tests": ("x",)}, "without the other"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UnknownOption, match=message) as raised:
        EvaluationOptions(**options)  # type: ignore[arg-type]
    assert raised.value.remedy


def test_kinds_and_contenders_keep_the_order_of_the_report() -> None:
    options = EvaluationOptions(kinds=("span", "line"), contenders=("n_gram", "canvas"))
    assert options.chosen_kinds() == ["line", "span"]
    assert options.chosen_contenders() == ["canvas", "n_gram"]
    assert EvaluationOptions().chosen_kinds() == [kind for kind in KINDS if kind != "benchmark"]


def test_tables_show_shares_in_percent() -> None:
    row = {"exact_match": 0.5, "exact_match_95": (0.25, 0.75), "median_ms": 3.14, "precision": None}
    report = {
        "model": "m",
        "parameters": 1_800_000,
        "machine": {"dtype": "float32", "device": "cpu", "name": "x86_64"},
        "seed": 0,
        "kinds": {"line": {"about": "a line", "items": 2, "contenders": {"canvas": row}}},
    }
    *_, titles, cells = format_evaluation(report).splitlines()
    assert titles.split() == ["exact", "95", "%", "precise", "p50", "ms"]
    assert cells.split() == ["canvas", "50.0", "25.0–75.0", "-", "3.1"]
