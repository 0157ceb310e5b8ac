"""A fill that turns in a circle."""

import re

from infilld.engine.silence.lines import Lines, is_telling, solid

# A circle shows within this much text.
_JUDGED_CHARS = 4_000
# So many lines are one turn, and so many turns in a row are a circle.
_MOST_LINES = 4
_LINE_TURNS = 3
# Text that is said over and over within a line: at least 5 times, 6 with its first.
_CIRCLE = re.compile(r"(?s)(.{2,60}?)\1{5,}")
# Digits and signs are repeated in tables and frames.
_FEWEST_LETTERS = 3
_FEWEST_CHARS = 40
_FEWEST_CHARS_OF_DIGITS = 120
_FEWEST_SHARE = 0.5


def repetition(fill: str, lines_around: Lines) -> str | None:
    """What a fill says over and over, in a sentence; None: nothing.

    Args:
        fill: judged. lines_around: of the gap; what is repeated there may go on.
    """
    around = "\n".join(
        (*lines_around.above[-2:], lines_around.left, lines_around.right, *lines_around.below[:2])
    )
    fill = fill[:_JUDGED_CHARS]
    lines = solid(fill.split("\n"))
    for count in range(1, _MOST_LINES + 1):
        for start in range(len(lines) - _LINE_TURNS * count + 1):
            turn = lines[start : start + count]
            if (
                any(map(is_telling, turn))
                and turn * _LINE_TURNS == (lines[start : start + _LINE_TURNS * count])
            ):
                return "The text writes the same lines over and over."
    for found in _CIRCLE.finditer(fill):
        unit = found[1]
        chars = found.end() - found.start()
        if len(set(unit)) == 1 or not any(map(str.isalnum, unit)):
            continue
        has_words = sum(map(str.isalpha, unit)) >= _FEWEST_LETTERS
        fewest_chars = _FEWEST_CHARS if has_words else _FEWEST_CHARS_OF_DIGITS
        if chars >= max(fewest_chars, _FEWEST_SHARE * len(fill)) and unit * 2 not in around:
            return "The text says the same over and over."
    return None
