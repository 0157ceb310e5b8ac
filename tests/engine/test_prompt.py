"""The prompt keeps what is near, fits its budget, and stays put while somebody types."""

import itertools

import pytest
from tiny_infill import byte_tokenizer

from infilld.engine.prompt import Controls, infill_prompt, window_start

TOKENIZER = byte_tokenizer()
CONTROLS = Controls.of(TOKENIZER)
LINES = "".join(f"line {n} of a long document\n" for n in range(400))


def test_the_suffix_comes_first_and_the_prefix_last() -> None:
    assert CONTROLS is not None
    prompt = infill_prompt(TOKENIZER, CONTROLS, "ab", "yz", 64)
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
    prompt = infill_prompt(TOKENIZER, CONTROLS, LINES, LINES, budget)
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
    prompt = infill_prompt(TOKENIZER, CONTROLS, "x" * 10_000, "", 100)
    assert len(prompt.ids) <= 100
