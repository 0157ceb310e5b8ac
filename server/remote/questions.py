r"""An infill as a question to a model that answers in chat, and how its answer is read.

    question  task, context, the file with a mark in it    (what is typed changes only its end)
    answer    ```lang \n the line or lines of the mark, whole \n ```

Whole lines are asked for because a gap within a line has no form of its own: its blanks at either
end are lost in nearly every answer. What the lines hold around the gap is known, and cut off.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from infilld.engine.errors import ContextTooLong
from infilld.engine.fences import TITLES, fence_for, marks_for, tag_of
from infilld.engine.lines import unix
from infilld.engine.packing import one_line, ranked, window_start
from infilld.engine.request import Context

# As in the engine's own prompts: shares of what there is room for.
_SUFFIX_SHARE, _SUFFIX_CHARS = 0.25, 4096
_PREFIX_SHARE = 2 / 3
# Below this much room for the document nothing useful could be written.
_LEAST_ROOM_CHARS = 64
# Lines around a gap that an answer may repeat.
_REPEATED_LINES = 200

# Full sentences: DiffusionGemma without thoughts answers terse tasks with nothing at all.
_GAP = (
    "A file is shown below. Code is missing in it at {open}. Please write the missing code. "
    "Reply with one code block. It holds the line or lines in which {open} stands, from their "
    "beginning to their end, with the missing code in the place of {open}, and no other lines of "
    "the file.\n"
)
_REWRITE = (
    "A file is shown below. Please rewrite the part of it between {open} and {close} as the "
    "instruction says. Reply with one code block. It holds the line or lines of that part, from "
    "their beginning to their end, with the new code in its place, and no other lines of the "
    "file.\n"
)
_IN_A_SHAPE = (
    "A file is shown below. Text is missing in it at {open}. Please write the missing text. Reply "
    "with that text alone, without a code block around it.\n"
)
_REPAIR = "This part is probably wrong. Put it right; what is right already stays as it is."


@dataclass(frozen=True, kw_only=True)
class Place:
    """What is asked about one target, as text with LF line ends.

    Attributes:
        before, after: the document around it. selection: its text now.
        instruction: what to do with the selection; None: an infill.
        draft: text to start from. context: material from elsewhere.
        path, language: of the document.
        has_shape: the answer has to match a grammar, so nothing may stand around it.
    """

    before: str
    after: str
    selection: str = ""
    instruction: str | None = None
    draft: str | None = None
    context: Sequence[Context] = ()
    path: str | None = None
    language: str | None = None
    has_shape: bool = False

    @property
    def lead(self) -> str:
        """What stands before the target in its first line."""
        return self.before.rpartition("\n")[2]

    @property
    def tail(self) -> str:
        """What stands behind the target in its last line."""
        return "" if self.selection.endswith("\n") else self.after.partition("\n")[0]


def repair_instruction() -> str:
    """What is asked about text that is suspected to be wrong."""
    return _REPAIR


def question(place: Place, budget_chars: int) -> str:
    """The text of the user's turn, of at most so many characters.

    Raises:
        ContextTooLong: what has to be shown does not fit.
    """
    name = "gap" if place.instruction is None else "selection"
    document = place.before + place.selection + place.after
    opening, closing = marks_for(name, document)
    fence = fence_for(place.before, place.selection, place.after)
    shown, asked = opening, ""
    if place.instruction is not None:
        shown = f"{opening}{place.selection}{closing}"
        asked = f"\nThe instruction:\n{unix(place.instruction).strip()}\n"
    elif place.draft:
        own = fence_for(place.draft)
        asked = f"\nA first attempt at it, which may be wrong:\n{own}\n{place.draft}\n{own}\n"
    task = _task(place).format(open=opening, close=closing)
    if len(fence) > 3:
        task += f"The code block begins and ends with {len(fence)} backticks.\n"
    named = f" {one_line(place.path)}" if place.path else ""
    header = f"\nThe file{named}:\n{fence}{tag_of(place.path, place.language)}\n"
    footer = f"\n{fence}"
    room = budget_chars - sum(map(len, (task, asked, header, shown, footer)))
    if room < _LEAST_ROOM_CHARS:
        raise ContextTooLong(
            f"the question needs {budget_chars - room} characters, {budget_chars} fit",
            remedy="Select less, or serve the model with a longer context.",
        )
    suffix = place.after[: min(_SUFFIX_CHARS, int(room * _SUFFIX_SHARE))]
    prefix, context = _packed(place, room - len(suffix))
    return "".join((task, context, asked, header, prefix, shown, suffix, footer))


def _task(place: Place) -> str:
    if place.has_shape:
        return _IN_A_SHAPE
    return _GAP if place.instruction is None else _REWRITE


def _packed(place: Place, room: int) -> tuple[str, str]:
    """The end of the text before a target, and as much context as it leaves room for."""
    chunks = []
    for _, context in ranked(place.context, diagnostics=place.instruction is not None):
        text = unix(context.text).strip("\n") + "\n"
        fence = fence_for(text)
        title = TITLES[context.kind].format(one_line(context.path) or "elsewhere")
        chunks.append((f"\n{title}:\n{fence}\n", text, f"{fence}\n"))
    wanted = sum(len(part) for chunk in chunks for part in chunk)
    share = max(int(room * _PREFIX_SHARE), room - wanted)
    prefix = place.before[window_start(place.before, share) :]
    left, shown = room - len(prefix), ""
    for head, text, foot in chunks:
        most = left - len(shown) - len(head) - len(foot)
        kept = text if len(text) <= most else text[: text.rfind("\n", 0, max(0, most)) + 1]
        if kept:
            shown += head + kept + foot
    return prefix, shown


# The answer.

_THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_OPENING = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n`]*(?:\n|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """Code of an answer: where it begins in the answer, and whether it ends as it should."""

    code: str
    start: int
    is_whole: bool


def code_in(answer: str, place: Place) -> Found | None:
    """The code of an answer; None where it has none.

    An answer without a fence counts where it begins as the line does: whatever else a model says
    is not meant for the file.
    """
    if place.has_shape:
        return Found(answer, 0, True)
    thoughts = _THOUGHTS.match(answer)
    at = thoughts.end() if thoughts else 0
    opening = _OPENING.search(answer, at)
    if opening is not None:
        fence = opening["fence"]
        start = opening.end()
        closing = re.compile(rf"^[ \t]*{fence[0]}{{{len(fence)},}}[ \t]*$", re.MULTILINE)
        end = closing.search(answer, start)
        code = answer[start:] if end is None else answer[start : end.start()]
        return Found(code.removesuffix("\n"), start, end is not None)
    lead = place.lead.strip()
    if lead and answer[at:].lstrip().startswith(lead):
        return Found(answer[at:].rstrip("\n"), at, True)
    return None


def fill_in(code: str, place: Place) -> str:
    """The new text of a target in whole lines that hold it, with LF line ends.

    Lines around the target that an answer repeats are cut off; where it repeats less than the
    target's own line, what there is counts as the new text.
    """
    if place.has_shape:
        return code
    fill = _without_end(_without_start(unix(code), place), place)
    if place.selection.endswith("\n") and fill.strip():
        fill = fill.rstrip("\n") + "\n"
    return fill


def _without_start(code: str, place: Place) -> str:
    before = place.before
    starts = [len(before) - len(place.lead)]
    while starts[-1] > 0 and len(starts) < _REPEATED_LINES:
        starts.append(before.rfind("\n", 0, starts[-1] - 1) + 1)
    for start in reversed(starts):
        # Blank lines are repeated by chance; a line's own indentation is not.
        if code.startswith(before[start:]) and (before[start:].strip() or start == starts[0]):
            return code[len(before) - start :]
    lead = place.lead
    if lead.strip() and code.lstrip().startswith(lead.strip()):
        rest = code.lstrip()[len(lead.strip()) :]
        return rest.removeprefix(lead[len(lead.rstrip()) :])
    return code if lead.strip() else _indented(code, lead)


def _indented(code: str, indent: str) -> str:
    """Code that begins further left than its line does, moved to the line's indentation."""
    first, *others = code.split("\n")
    own = first[: len(first) - len(first.lstrip(" \t"))]
    if not indent.startswith(own):
        return code.lstrip(" \t")
    missing = indent[len(own) :]
    depths = [len(line) - len(line.lstrip(" \t")) for line in others if line.strip()]
    # Where only the first line lost its blanks, all others are as deep as they should be.
    opens_block = first.rstrip().endswith((":", "{", "(", "["))
    if (
        missing
        and depths
        and min(depths) < len(indent) + (opens_block and depths[0] <= len(indent))
    ):
        others = [missing + line if line.strip() else line for line in others]
    return "\n".join([first.lstrip(" \t"), *others])


def _without_end(code: str, place: Place) -> str:
    after = place.after if place.tail or not place.selection.endswith("\n") else f"\n{place.after}"
    code = code.rstrip("\n")
    ends: list[int] = []
    at = -1
    while len(ends) < _REPEATED_LINES:
        at = after.find("\n", at + 1)
        ends.append(len(after) if at < 0 else at)
        if at < 0:
            break
    # What begins its line may consist of nothing but the lines that follow.
    whole = code if place.lead.strip() else f"\n{code}"
    for end in reversed(ends[1:]):
        repeated = after[:end].rstrip("\n")
        # A closing bracket may be meant: what is cut here says something.
        if whole.endswith(repeated) and re.search(r"\w", after[len(place.tail) : end]):
            return whole[: len(whole) - len(repeated)].removeprefix("\n" * (whole != code))
    tail = place.tail.rstrip()
    if tail.strip() and code.rstrip().endswith(tail):
        return code.rstrip()[: -len(tail)]
    if tail.strip() and code.rstrip().endswith(tail.strip()):
        return code.rstrip()[: -len(tail.strip())]
    return code


def draft_in(answer: str, place: Place) -> str | None:
    """The new text of a target as far as an unfinished answer has it; None: not begun."""
    found = code_in(answer, place)
    if found is None:
        return None
    is_begun = not place.lead.startswith(found.code) or found.is_whole
    return fill_in(found.code, place) if is_begun else ""
