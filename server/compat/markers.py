"""Gaps that are written into one prompt, between the control tokens of a model family.

    Qwen, CodeGemma  <|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>
    StarCoder        <fim_prefix>P<fim_suffix>S<fim_middle>
    Code Llama       <PRE> P <SUF>S <MID>
    DeepSeek         <｜fim▁begin｜>P<｜fim▁hole｜>S<｜fim▁end｜>
    GLM              <|code_prefix|>P<|code_suffix|>S<|code_middle|>
    Codestral        [SUFFIX]S[PREFIX]P

Text behind the last marker goes on with P, which is how these models write the suffix first; some
clients send `<|fim_suffix|>S<|fim_prefix|>P<|fim_middle|>` for it. Before the first marker other
files may stand: `<|repo_name|>R`, then `<|file_sep|>path` and lines of text for each. Codestral's
stand at the start of P, behind `+++++ path`.

Code that is about such markers is left alone: a prompt is divided where the whole pattern stands in
it in order, from its beginning on.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from infilld.engine.request import Context

_BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|endoftext|>")
_REPOSITORY = ("<|repo_name|>", "<repo_name>", "<reponame>")
_FILE = ("<|file_sep|>", "<file_sep>", "<filename>")
_FILE_SPLIT = re.compile("|".join(map(re.escape, _FILE)))
_PLUSSES = re.compile(r"^\+{5} (.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Divided:
    """What a prompt says; `path` is that of the file with the gap."""

    prefix: str
    suffix: str
    context: tuple[Context, ...] = ()
    path: str | None = None


@dataclass(frozen=True)
class _Family:
    """Markers of one family.

    Attributes:
        prefix, suffix, middle: before those texts. needs_middle: a prompt ends with it.
        has_blanks: a blank follows the first and the last marker, and stands before the others.
    """

    prefix: str
    suffix: str
    middle: str
    needs_middle: bool = True
    has_blanks: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any of the markers."""
        names = (self.prefix, self.suffix, self.middle)
        return re.compile("|".join(map(re.escape, names)))


_FAMILIES = (
    _Family("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    _Family("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    _Family("<PRE>", "<SUF>", "<MID>", has_blanks=True),
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    _Family("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    _Family("[PREFIX]", "[SUFFIX]", "[MIDDLE]", needs_middle=False),
)


def divided(prompt: str) -> Divided | None:
    """Prefix and suffix of a prompt with markers; None: it has none, and is a prefix as it is."""
    start, files = _beginning(prompt)
    for family in _FAMILIES:
        first = family.pattern.search(prompt, start)
        if first is None or (first.start() != start and not files):
            continue
        found = _gap(family, prompt, first.start())
        if found is not None:
            return _with_files(prompt[start : first.start()], *found)
    return None


def _beginning(prompt: str) -> tuple[int, bool]:
    """Where the prompt begins behind tokens that only say so, and whether with other files."""
    start = 0
    while mark := next((mark for mark in _BEGINNINGS if prompt.startswith(mark, start)), None):
        start += len(mark)
    return start, prompt.startswith((*_REPOSITORY, *_FILE), start)


def _gap(family: _Family, prompt: str, start: int) -> tuple[str, str] | None:
    """Prefix and suffix between the markers from `start` on; None: the pattern is not complete."""
    first, *marks = family.pattern.finditer(prompt, start)
    if first[0] == family.middle:
        return None
    is_prefix_first = first[0] == family.prefix
    second = _outer(family, marks, family.suffix if is_prefix_first else family.prefix)
    if second is None:
        return None
    middles = [m for m in marks if m[0] == family.middle and m.start() >= second.end()]
    # The last one: the text before it may be about such markers.
    last = middles[-1] if middles else None
    if last is None and (family.needs_middle or is_prefix_first):
        return None
    one = prompt[first.end() : second.start()]
    two = prompt[second.end() : last.start() if last else len(prompt)]
    tail = prompt[last.end() :] if last else ""
    if family.has_blanks and one.startswith(" "):
        one, two, tail = one[1:].removesuffix(" "), two.removesuffix(" "), tail.removeprefix(" ")
    return (one + tail, two) if is_prefix_first else (two + tail, one)


def _outer(family: _Family, marks: list[re.Match[str]], wanted: str) -> re.Match[str] | None:
    """The next marker of this name that belongs to no pattern within the text.

    Where the text has part of a pattern only, the last marker of this name.
    """
    ends = family.middle if family.needs_middle else wanted
    is_inner = False
    for mark in marks:
        if mark[0] == wanted and not is_inner:
            return mark
        if mark[0] == ends:
            is_inner = False
        elif mark[0] != wanted:
            is_inner = True
    return next((mark for mark in reversed(marks) if mark[0] == wanted), None)


def _with_files(header: str, prefix: str, suffix: str) -> Divided:
    """The gap, with the files that are told before it."""
    _, *files = _FILE_SPLIT.split(header)
    pieces = [file.partition("\n") for file in files]
    if not pieces:
        pieces = [(path, "", text) for path, text in _plussed(prefix)]
        prefix = "" if pieces else prefix
    if not pieces:
        return Divided(prefix, suffix)
    *others, (path, _, text) = pieces
    context = tuple(Context(name.strip(), body) for name, _, body in others if body.strip())
    return Divided(text + prefix, suffix, context, path.strip() or None)


def _plussed(prefix: str) -> list[tuple[str, str]]:
    """Paths and texts of a prefix that begins with the head of a file."""
    before, *parts = _PLUSSES.split(prefix)
    return [] if before else list(zip(parts[::2], parts[1::2], strict=True))
