"""Brackets around a gap: which ones are open, and which ones a fill leaves without a partner.

A scanner of a page a language: it knows strings and comments, and nothing else of the grammar.
"""

import functools
import re
from dataclasses import dataclass

from infilld.engine.silence.lines import OF_PYTHON

# Scanned before a gap, once, and behind it, for every way in which fills leave brackets open:
# 24,000 characters take 2.3 ms as Python, 5.7 ms as C++.
_BEFORE_CHARS = 48_000
_BEHIND_CHARS = 16_000
# A longer line is no line that somebody reads, and a longer fill none that is shown.
_MOST_MIDDLE_CHARS = 20_000

# Lines that most likely stand outside of strings and comments.
_MARGINS = (re.compile(r"\n\n(?=[\w@#])"),)
_ANY_LINE = (re.compile(r"\n"),)

_CLOSERS = {")": "(", "]": "[", "}": "{"}
# Stands on the stack for the braces of an expression in a template string.
_TEMPLATE = "${"
# Words and characters behind which JavaScript reads a slash as the start of a pattern.
_BEFORE_PATTERN = re.compile(
    r"(?:^|[(\[{,;=:!&|?+\-*%<>~^]|\b(?:return|typeof|case|in|of|do|else))$"
)
_PATTERN = re.compile(r"/(?![/*])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/[a-z]*")


@dataclass(frozen=True, kw_only=True)
class _Lexis:
    """Where a language's brackets are none.

    Attributes:
        line_comment, block_comment: patterns that match the whole, and the start. is_nested: of the
            latter.
        quotes: of strings that end with their line. long: of strings that may go on.
        raw: pattern of the start of a raw string with its group `raw_mark`, and what stands around
            that mark at the end.
        skipped: pattern of anything else that is no bracket and no quote.
        has_patterns: `/` may start a regular expression. counts_quotes: a quote without a partner
            is a fault.
    """

    line_comment: str | None = None
    block_comment: tuple[str, str] | None = None
    is_nested: bool = False
    quotes: str = ""
    long: tuple[str, ...] = ()
    raw: tuple[str, str, str] | None = None
    skipped: str | None = None
    has_patterns: bool = False
    counts_quotes: bool = True

    @functools.cached_property
    def tokens(self) -> re.Pattern[str]:
        """Everything in code that the scanner stops at."""
        parts = []
        if self.line_comment:
            parts.append(f"(?P<comment>{self.line_comment}[^\n]*)")
        if self.block_comment:
            parts.append(f"(?P<block>{re.escape(self.block_comment[0])})")
        if self.raw:
            parts.append(f"(?P<raw>{self.raw[0]})")
        if self.long:
            parts.append(f"(?P<long>{'|'.join(map(re.escape, self.long))})")
        if self.skipped:
            parts.append(f"(?P<skipped>{self.skipped})")
        for index, quote in enumerate(self.quotes):
            parts.append(rf"(?P<short{index}>{quote}(?:\\[\s\S]|[^{quote}\\\n])*{quote})")
        if self.quotes:
            parts.append(f"(?P<broken>[{self.quotes}])")
        if self.has_patterns:
            parts.append("(?P<slash>/)")
        parts.append(r"(?P<bracket>[()\[\]{}])")
        return re.compile("|".join(parts))


_JAVASCRIPT = _Lexis(
    line_comment="//",
    block_comment=("/*", "*/"),
    quotes="\"'",
    long=("`",),
    has_patterns=True,
    # An apostrophe in the text of an element is none.
    counts_quotes=False,
)
# Of the branches of a condition the first counts: the others close the same brackets again.
_OTHER_BRANCH = r"(?m:^[ \t]*#[ \t]*el(?:se|if)\b[\s\S]*?^[ \t]*#[ \t]*endif)"
_LEXES = {
    "python": _Lexis(line_comment="#", quotes="\"'", long=('"""', "'''")),
    "javascript": _JAVASCRIPT,
    "typescript": _JAVASCRIPT,
    "tsx": _JAVASCRIPT,
    "rust": _Lexis(
        line_comment="//",
        block_comment=("/*", "*/"),
        is_nested=True,
        raw=(r'\bb?r(?P<raw_mark>#*)"', '"', ""),
        long=('"',),
        # A character, or the name of a lifetime.
        skipped=r"'(?:\\(?:u\{[^}\n]*\}|[^\n])[0-9a-fA-F]{0,2}|[^'\\\n])'|'\w*",
    ),
    "go": _Lexis(line_comment="//", block_comment=("/*", "*/"), quotes="\"'", long=("`",)),
    "c": _Lexis(line_comment="//", block_comment=("/*", "*/"), quotes="\"'", skipped=_OTHER_BRANCH),
    "cpp": _Lexis(
        line_comment="//",
        block_comment=("/*", "*/"),
        quotes="\"'",
        raw=(r'\b(?:u8|[uUL])?R"(?P<raw_mark>[^()\\\s]{0,16})\(', ")", '"'),
        # Quotes within numbers.
        skipped=rf"(?<=[0-9a-fA-F])'(?=[0-9a-fA-F])|{_OTHER_BRANCH}",
    ),
    "java": _Lexis(line_comment="//", block_comment=("/*", "*/"), quotes="\"'", long=('"""',)),
    "json": _Lexis(line_comment="//", block_comment=("/*", "*/"), quotes='"'),
    "css": _Lexis(block_comment=("/*", "*/"), quotes="\"'"),
    "toml": _Lexis(line_comment="#", quotes='"', long=('"""', "'''"), skipped="'[^'\n]*'"),
}
_LEXES["jsonc"] = _LEXES["json"]


@dataclass(frozen=True)
class State:
    """Where a scan is.

    Attributes:
        mode: end of the string or comment it is in, "" in code. depth: of nested comments.
        stack: brackets that are open.
        openers, closers, quotes: those known to have no partner.
    """

    mode: str = ""
    depth: int = 0
    stack: tuple[str, ...] = ()
    openers: int = 0
    closers: int = 0
    quotes: int = 0


@dataclass(frozen=True)
class Faults:
    """Brackets and quotes without a partner."""

    openers: int
    closers: int
    quotes: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.openers + self.closers + self.quotes

    def is_within(self, other: "Faults") -> bool:
        """Whether there are no more of any kind than others."""
        return (
            self.openers <= other.openers
            and self.closers <= other.closers
            and self.quotes <= other.quotes
        )


class _Scan:
    """A state that moves on over a text."""

    def __init__(self, lexis: _Lexis, state: State, *, is_inner: bool = False) -> None:
        # Brackets that were opened before the text that is scanned may be closed in it.
        self._lexis, self._is_inner = lexis, is_inner
        self._mode, self._depth, self._stack = state.mode, state.depth, list(state.stack)
        self._openers, self._closers, self._quotes = state.openers, state.closers, state.quotes

    def over(self, text: str) -> State:
        at = 0
        while at < len(text):
            at = self._leave(text, at) if self._mode else self._code(text, at)
        return State(
            self._mode, self._depth, tuple(self._stack), self._openers, self._closers, self._quotes
        )

    def _code(self, text: str, at: int) -> int:
        """Where the scan goes on: in a string, in a comment, or at the end."""
        lexis = self._lexis
        while (found := lexis.tokens.search(text, at)) is not None:
            kind, word, at = found.lastgroup, found[0], found.end()
            if kind == "bracket":
                if self._bracket(word):
                    return at
            elif kind == "block" and lexis.block_comment:
                self._mode, self._depth = lexis.block_comment[1], 1
                return at
            elif kind == "raw" and lexis.raw:
                _, left, right = lexis.raw
                self._mode = f"{left}{found['raw_mark']}{right}"
                return at
            elif kind == "long":
                self._mode = word
                return at
            elif kind == "broken":
                self._quotes += lexis.counts_quotes
            elif kind == "slash":
                start = max(0, text.rfind("\n", 0, at - 1) + 1, at - 80)
                line = text[start : at - 1].rstrip()
                if _BEFORE_PATTERN.search(line) and (pattern := _PATTERN.match(text, at - 1)):
                    at = pattern.end()
        return len(text)

    def _bracket(self, word: str) -> bool:
        """Count a bracket; whether it led back into a template string."""
        if word not in _CLOSERS:
            self._stack.append(word)
            return False
        partner = _CLOSERS[word]
        if word == "}" and self._stack and self._stack[-1] == _TEMPLATE:
            self._stack.pop()
            self._mode = "`"
            return True
        if partner not in self._stack:
            self._closers += bool(self._stack) or not self._is_inner
            return False
        while self._stack.pop() != partner:
            self._openers += 1
        return False

    def _leave(self, text: str, at: int) -> int:
        """Behind the end of a string or comment, or the end of the text."""
        lexis, end = self._lexis, self._mode
        if lexis.block_comment and end == lexis.block_comment[1]:
            return self._leave_comment(text, at, *lexis.block_comment)
        escapes = end in lexis.long and not (end == "`" and not lexis.has_patterns)
        template = end == "`" and lexis.has_patterns
        signs = [
            re.escape(end),
            *([r"\\[\s\S]"] if escapes else []),
            *([r"\$\{"] if template else []),
        ]
        pattern = re.compile("|".join(signs))
        while (found := pattern.search(text, at)) is not None:
            at = found.end()
            if found[0] == end:
                self._mode = ""
                return at
            if found[0] == _TEMPLATE:
                self._mode = ""
                self._stack.append(_TEMPLATE)
                return at
        return len(text)

    def _leave_comment(self, text: str, at: int, start: str, end: str) -> int:
        pattern = re.compile(f"{re.escape(start)}|{re.escape(end)}")
        while (found := pattern.search(text, at)) is not None:
            at = found.end()
            if found[0] == end:
                self._depth -= 1
            elif self._lexis.is_nested:
                self._depth += 1
            if self._depth == 0:
                self._mode = ""
                return at
        return len(text)


class Brackets:
    """The brackets around a gap.

    Args:
        prefix, suffix: of the document, with LF line ends. language: as `language_of` names it;
            of some languages nothing is known.
    """

    def __init__(self, prefix: str, suffix: str, language: str | None) -> None:
        self._lexis = _LEXES.get(language or "")
        start, end = prefix.rfind("\n") + 1, suffix.find("\n") + 1 or len(suffix)
        self._line, self._following = prefix[start:], suffix[:end]
        self._before = self._behind = ""
        self._is_cut = self._is_inner = self._is_outer = False
        if self._lexis is None or len(self._line) + len(self._following) > _MOST_MIDDLE_CHARS:
            self._lexis = None
            return
        margins = OF_PYTHON if language == "python" else _MARGINS
        if not self._lexis.long:
            # A cut cannot fall into a string.
            margins = _ANY_LINE
        first = 0
        if start > _BEFORE_CHARS:
            places = (margin.search(prefix, start - _BEFORE_CHARS, start) for margin in margins)
            found = next(filter(None, places), None)
            if found is None:
                self._lexis = None
                return
            first = found.end()
            # In a namespace, say. No definition of Python stands within brackets.
            self._is_inner = language != "python"
        self._before = prefix[first:start]
        last = len(suffix)
        if last - end > _BEHIND_CHARS:
            self._is_cut, self._is_outer = True, language != "python"
            stop = end + _BEHIND_CHARS
            ends = ([cut.end() for cut in margin.finditer(suffix, end, stop)] for margin in margins)
            last = next(filter(None, ends), [stop])[-1]
        self._behind = suffix[end:last]
        self._ends: dict[tuple[str, int, tuple[str, ...]], State] = {}

    def faults(self, fill: str) -> Faults | None:
        """What has no partner with a fill in the gap; None where that cannot be said."""
        middle_chars = len(self._line) + len(fill) + len(self._following)
        if self._lexis is None or middle_chars > _MOST_MIDDLE_CHARS:
            return None
        middle = f"{self._line}{fill}{self._following}"
        state = _Scan(self._lexis, self._start, is_inner=self._is_inner).over(middle)
        key = (state.mode, state.depth, state.stack)
        if key not in self._ends:
            started = State(*key)
            self._ends[key] = _Scan(self._lexis, started, is_inner=self._is_inner).over(
                self._behind
            )
        end = self._ends[key]
        if end.mode and self._is_cut:
            return None
        return Faults(
            state.openers + end.openers + (0 if self._is_outer else len(end.stack)),
            state.closers + end.closers,
            state.quotes + end.quotes + bool(end.mode),
        )

    @functools.cached_property
    def line_closers(self) -> str:
        """What would close the brackets opened in the gap's line and left open there."""
        if self._lexis is None:
            return ""
        start = State(mode=self._start.mode, depth=self._start.depth)
        stack = _Scan(self._lexis, start).over(self._line).stack
        partners = {opener: closer for closer, opener in _CLOSERS.items()} | {_TEMPLATE: "}"}
        return "".join(partners[opener] for opener in reversed(stack))

    @functools.cached_property
    def _start(self) -> State:
        assert self._lexis is not None
        return _Scan(self._lexis, State()).over(self._before)
