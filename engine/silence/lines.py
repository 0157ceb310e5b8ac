"""The lines around a gap, as the checks of a fill compare them."""

import re
from dataclasses import dataclass

# Text looked at on either side; repetition of what is farther away is none.
_NEAR_CHARS = 6_000
# A line that occurs anywhere says nothing about what it was copied from.
_FEWEST_CHARS = 12
_FEWEST_WORD_CHARS = 8
_COMMON = re.compile(
    r"(?:return|yield|raise|throw)\s*(?:None|True|False|null|nil|true|false|self|this|result|err)?;?"
    r"|@\w+|#\s*\w+|continue;?|default:|finally:|\}?\s*(?:else|try|do|finally)\s*[{:]?"
    r"|raise NotImplementedError(?:\(\))?|</?\w+>"
)
# Of a longer document the parsers see a part: 40,000 characters take them 8 ms as Python,
# 20 ms as C++.
_WHOLE_CHARS = 40_000
_PART_CHARS = 16_000
# A line at the margin most likely starts something of its own; behind a blank line, nearly always.
_MARGINS = (re.compile(r"\n\n(?=[\w@#/<.\[\"'-])"), re.compile(r"\n(?=[\w@<.\[-])"))
# Of Python, a definition does; a long class has none but those of its methods.
OF_PYTHON = (
    re.compile(r"\n\n(?=(?:async |class |def |from |import |@|[A-Za-z_]\w* = ))"),
    re.compile(r"\n\n(?=(?:    |\t)(?:async |class |def |@))"),
)


@dataclass(frozen=True)
class Lines:
    """The lines around a gap.

    Attributes:
        left, right: of the gap's line.
        above, below: the nearest lines that are not blank, in document order, without blanks at
            their ends.
    """

    left: str
    right: str
    above: tuple[str, ...]
    below: tuple[str, ...]

    @classmethod
    def around(cls, prefix: str, suffix: str) -> "Lines":
        """Those of a prefix and a suffix with LF line ends."""
        start = prefix.rfind("\n") + 1
        end = suffix.find("\n")
        end = len(suffix) if end < 0 else end
        first = max(0, start - _NEAR_CHARS)
        above = prefix[first:start].split("\n")
        below = suffix[end + 1 : end + 1 + _NEAR_CHARS].split("\n")
        # Where the text was cut, a line may be the rest of one.
        above = above[1:] if first else above
        below = below[:-1] if end + 1 + _NEAR_CHARS < len(suffix) else below
        return cls(prefix[start:], suffix[:end], solid(above), solid(below))

    @property
    def is_tail(self) -> bool:
        """Whether nothing follows the gap in its line."""
        return not self.right.strip()


def solid(lines: list[str]) -> tuple[str, ...]:
    """The lines that are not blank, without blanks at their ends."""
    return tuple(line.rstrip() for line in lines if line.strip())


def is_telling(line: str) -> bool:
    """Whether two equal such lines are more than chance or custom."""
    line = line.strip()
    if len(line) < _FEWEST_CHARS or sum(map(str.isalpha, line)) < _FEWEST_WORD_CHARS:
        return False
    return _COMMON.fullmatch(line) is None


def parsable_part(prefix: str, suffix: str, language: str | None) -> tuple[str, str] | None:
    """Prefix and suffix, of a long document the part around the gap that may parse by itself.

    None where no such part is seen. A part that starts within a class of Python is given one.
    """
    if len(prefix) + len(suffix) <= _WHOLE_CHARS:
        return prefix, suffix
    margins = (*OF_PYTHON, _MARGINS[1]) if language == "python" else _MARGINS
    if len(prefix) > _PART_CHARS:
        cuts = (margin.search(prefix, len(prefix) - _PART_CHARS) for margin in margins)
        cut = next(filter(None, cuts), None)
        if cut is None:
            return None
        prefix = prefix[cut.end() :]
        if language == "python" and prefix[:1].isspace():
            prefix = f"class A:\n{prefix}"
    if len(suffix) > _PART_CHARS:
        places = (list(margin.finditer(suffix, 0, _PART_CHARS)) for margin in margins)
        last = next(filter(None, places), None)
        if last is None:
            return None
        suffix = suffix[: last[-1].start() + 1]
    return prefix, suffix
