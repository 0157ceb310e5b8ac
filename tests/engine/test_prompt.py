"""The prompt keeps what is near, fits its budget, and stays put while somebody types."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import fim_tokenizer, pieces

from infilld.engine.comments import as_comment
from infilld.engine.errors import ContextTooLong, Unsupported
from infilld.engine.packing import window_start
from infilld.engine.prompt import Controls, FimLayout, InfillPrompt, PromptParts
from infilld.engine.request import Context

TOKENIZER = fim_tokenizer(words=("line ", "document\n", "return"))
CONTROLS = Controls.of(TOKENIZER)
LINES = "".join(f"line {n} of a long document\n" for n in range(400))


def infill_prompt(prefix: str, suffix: str, budget: int) -> InfillPrompt:
    assert CONTROLS is not None
    return FimLayout(TOKENIZER, CONTROLS).write(PromptParts(prefix=prefix, suffix=suffix), budget)


def test_the_suffix_comes_first_and_the_prefix_last() -> None:
    assert CONTROLS is not None
    prompt = infill_prompt("ab", "yz", 64)
    text = TOKENIZER.encode
    assert prompt.ids == (
        CONTROLS.bos,
        CONTROLS.suffix_mark,
        *text("yz"),
        CONTROLS.prefix_mark,
        *text("ab"),
    )
    assert not prompt.suffix_is_cut


@pytest.mark.parametrize("budget", [8, 33, 200, 1000])
def test_the_budget_holds_and_the_near_text_stays(budget: int) -> None:
    assert CONTROLS is not None
    prompt = infill_prompt(LINES, LINES, budget)
    assert len(prompt.ids) <= budget
    assert prompt.suffix_is_cut
    kept = TOKENIZER.text(prompt.ids[prompt.ids.index(CONTROLS.prefix_mark) :])
    assert kept
    assert LINES.endswith(kept)
    assert LINES.startswith(TOKENIZER.text(prompt.suffix))


def test_the_window_moves_in_hops() -> None:
    starts = [window_start(LINES[:n], 1000) for n in range(1000, 6000)]
    assert starts == sorted(starts)
    assert all(n - start <= 1000 for n, start in enumerate(starts, 1000))
    moves = sum(a != b for a, b in itertools.pairwise(starts))
    assert moves <= 5000 / 250 + 1
    assert all(start == 0 or LINES[start - 1] == "\n" for start in starts)


def test_text_without_lines_is_cut_all_the_same() -> None:
    assert CONTROLS is not None
    prompt = infill_prompt("x" * 10_000, "", 100)
    assert len(prompt.ids) <= 100


def write(prefix: str, suffix: str, budget: int = 4096, **parts: object) -> InfillPrompt:
    assert CONTROLS is not None
    layout = FimLayout(TOKENIZER, CONTROLS)
    return layout.write(PromptParts(prefix=prefix, suffix=suffix, **parts), budget)  # type: ignore[arg-type]


def shown(prompt: InfillPrompt) -> str:
    """Text behind the prefix mark."""
    return str(pieces(TOKENIZER, prompt.ids)[-1])


def test_context_stands_before_the_prefix_best_first() -> None:
    assert CONTROLS is not None
    context = (
        Context("b.py", "B = 2\r\n\n", "recent"),
        Context("a.py", "def a(): ...", "definition"),
        Context("c.py", "1: unused", "diagnostic"),
        Context("", "pasted", "clipboard"),
    )
    prompt = write("x = ", "\n", context=context, language="python")
    assert pieces(TOKENIZER, prompt.ids) == [
        CONTROLS.bos,
        CONTROLS.suffix_mark,
        "\n",
        CONTROLS.prefix_mark,
        "# a.py\ndef a(): ...\n# b.py\nB = 2\n# clipboard\npasted\nx = ",
    ]
    assert prompt.used == (1, 0, 3)
    assert prompt.answer_at is None


def test_an_instruction_is_a_comment_before_the_line_of_the_selection() -> None:
    context = (Context("c.ts", "1: unused\n2: odd", "diagnostic"),)
    parts = {"instruction": "Make it\nnew.", "selection": "old()", "path": "c.ts"}
    prompt = write("a\n    b = ", ";", context=context, **parts)
    assert shown(prompt) == (
        "// c.ts:\n// 1: unused\n// 2: odd\n\na\n    // Make it\n    // new.\n    b = "
    )
    prompt = write("a\n", "", instruction="new", selection="\told()\n", language="lua")
    assert shown(prompt) == "a\n\t-- new\n"


def test_an_instruction_longer_than_half_the_prompt_is_refused() -> None:
    instruction = "word " * 2000
    assert instruction.strip() in shown(write("a", "b", 24_000, instruction=instruction))
    with pytest.raises(ContextTooLong, match=r"the instruction needs \d+ tokens, 2048 fit") as e:
        write("a", "b", instruction=instruction)
    assert e.value.remedy == "Shorten the instruction."


def test_thoughts_are_refused() -> None:
    with pytest.raises(Unsupported):
        write("a", "b", think=True)


def test_a_reader_is_told_what_ends_a_text_and_what_a_gap_never_holds() -> None:
    assert CONTROLS is not None
    prompt = write("a", "b")
    assert prompt.ends == prompt.suffix_end == (CONTROLS.eos,)
    assert set(prompt.banned) == TOKENIZER.control_ids - {CONTROLS.filler}


def test_context_that_does_not_fit_is_cut_at_a_line_or_left_out() -> None:
    context = (
        Context("long.py", LINES, "definition"),
        Context("one.py", "x" * 5000, "definition"),
        Context("short.py", "s = 1\n", "open"),
    )
    prompt = write("here", "", 1000, context=context)
    cut = shown(prompt).removeprefix("# long.py\n").removesuffix("here")
    assert LINES.startswith(cut)
    assert cut.endswith("\n")
    assert len(prompt.ids) > 600
    assert 0 in prompt.used
    assert 1 not in prompt.used
    prompt = write("here", "", 200, context=context[1:])
    assert shown(prompt) == "# short.py\ns = 1\nhere"


@given(
    prefix=st.integers(0, 400).map(lambda n: LINES[: n * 20] + "é" * (n % 3)),
    suffix=st.integers(0, 400).map(lambda n: "ß" * (n % 2) + LINES[: n * 20]),
    budget=st.integers(8, 3000),
    instruction=st.sampled_from([None, "i", "shorter\nplease"]),
    sizes=st.lists(st.integers(0, 3000), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_no_budget_is_exceeded(
    prefix: str, suffix: str, budget: int, instruction: str | None, sizes: list[int]
) -> None:
    context = [Context(f"{n}.py", LINES[n : n + size]) for n, size in enumerate(sizes)]
    try:
        prompt = write(prefix, suffix, budget, instruction=instruction, context=context)
    except ContextTooLong:
        assert instruction is not None
        assert budget < 100
        return
    assert len(prompt.ids) <= budget
    assert suffix.encode().startswith(TOKENIZER.decode(prompt.suffix))
    assert prompt.suffix_is_cut == (len(TOKENIZER.decode(prompt.suffix)) < len(suffix.encode()))
    if instruction is None:
        text = shown(prompt) if prompt.ids[-1] not in TOKENIZER.control_ids else ""
        near = prefix[-20:] if budget > 300 else ""
        assert text.endswith(near)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [600, 3000])
def test_typing_only_appends(budget: int) -> None:
    context = [Context(f"{n}.py", LINES[: 200 * n]) for n in range(1, 5)]
    streams = [write(LINES[:n], LINES, budget, context=context).ids for n in range(0, 4000, 7)]
    kept = 0
    for old, new in itertools.pairwise(streams):
        pairs = zip(old, new, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(old))
        kept += same >= len(old) - 8
    # Seven characters at once: at a keystroke each it is seven times as rare.
    assert kept / len(streams) > 1 - 70 / budget


@pytest.mark.parametrize(
    ("language", "path", "expected"),
    [
        ("python", "a.ts", "# x\n#\n"),
        (None, "a/b.C", "// x\n//\n"),
        ("nonsense", None, "# x\n#\n"),
        (None, "a.css", "/* x */\n/*  */\n"),
        ("html", None, "<!-- x -->\n<!--  -->\n"),
    ],
)
def test_comments_of_languages(language: str | None, path: str | None, expected: str) -> None:
    assert as_comment("x\n", language, path) == expected


def test_a_comment_cannot_be_left() -> None:
    assert as_comment("--->-> a", "html", None).count("-->") == 1
    assert as_comment("**//x", "css", None) == "/* x */\n"
