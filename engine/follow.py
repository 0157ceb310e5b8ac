"""What was computed for a document, for the next keystroke.

typed text agrees      what is left of every text that starts with it
typed text disagrees   the old text with noise where it was contradicted
text was deleted       the old text with what was deleted before it
"""

import re
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

_DOCUMENTS = 16
# What was asked last, and what was prepared in case it is accepted.
_STATES = 3
# Larger documents are not kept: there may be as many of them as states.
_MOST_DOCUMENT_CHARS = 1_000_000
# More typed or deleted text than this is another place.
_MOST_CHARS = 200
# Signs an editor closes by itself when the opening one is typed.
_CLOSERS = re.compile(r"[)\]}>\"'`]{1,3}")
_PIECE = re.compile(r"\w+|[^\w\s]+|\s+")


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a gap.

    Attributes:
        before, after: text around it, with LF line ends.
        texts: for it, the best first. shown: the one that was shown, if any was.
        is_settled: the canvas was finished: there is nothing more to find out by refining it.
        asked: what else the texts depend on, such as bounds and language.
    """

    before: str
    after: str
    texts: tuple[str, ...]
    shown: str | None
    is_settled: bool
    asked: tuple[object, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What is left of a state after typing.

    Attributes:
        texts: that agree, the best first; may be empty texts.
        shown: what is left of the text that was shown, if it agrees.
        is_best: the best of the texts is one of those that agree.
        mended: where nothing agrees, the rest of the best text, behind what was contradicted.
        is_settled: see `State`; nothing was contradicted.
    """

    texts: tuple[str, ...] = ()
    shown: str | None = None
    is_best: bool = False
    mended: str | None = None
    is_settled: bool = False


class Memory:
    """The last states of the last documents."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, deque[State]] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._states.clear()

    def keep(self, document: str, state: State) -> None:
        """Remember a state of a document."""
        if len(state.before) + len(state.after) > _MOST_DOCUMENT_CHARS:
            return
        states = self._states.setdefault(document, deque(maxlen=_STATES))
        self._states.move_to_end(document)
        kept = [one for one in states if (one.before, one.after) != (state.before, state.after)]
        states.clear()
        states.extend([*kept, state])
        while len(self._states) > _DOCUMENTS:
            self._states.popitem(last=False)

    def follow(
        self, document: str, before: str, after: str, asked: tuple[object, ...] = ()
    ) -> Followed | None:
        """What is left for a gap between `before` and `after`; None: nothing is known of it."""
        known = reversed(self._states.get(document, ()))
        states = [state for state in known if state.asked == asked]
        # What is typed further along says more than what was deleted again.
        states.sort(key=lambda state: -len(state.before) * before.startswith(state.before))
        best: Followed | None = None
        for state in states:
            found = _followed(state, before, after)
            if found is None:
                continue
            if found.texts:
                return found
            best = best or found
        return best


def _followed(state: State, before: str, after: str) -> Followed | None:
    closer = after[: len(after) - len(state.after)]
    if not after.endswith(state.after) or (closer and not _CLOSERS.fullmatch(closer)):
        return None
    if before.startswith(state.before):
        typed = before[len(state.before) :]
        return _typed(state, typed, closer) if len(typed) <= _MOST_CHARS else None
    if state.before.startswith(before) and not closer:
        deleted = state.before[len(before) :]
        if len(deleted) > _MOST_CHARS or not state.texts:
            return None
        shown = None if state.shown is None else deleted + state.shown
        return Followed(
            texts=tuple(deleted + text for text in state.texts),
            shown=shown,
            # What was deleted may be just what was wrong.
            is_settled=False,
        )
    return None


def _typed(state: State, typed: str, closer: str) -> Followed | None:
    texts = _rests(state.texts, typed, closer)
    if texts and not any(texts):
        # Typed to its end: what follows is another question.
        return None
    texts = [text for text in texts if text]
    if texts:
        shown = _rests([] if state.shown is None else [state.shown], typed, closer)
        return Followed(
            texts=tuple(dict.fromkeys(texts)),
            shown=shown[0] if shown and shown[0] else None,
            is_best=any(_rests(state.texts[:1], typed, closer)),
            is_settled=state.is_settled,
        )
    if not state.texts or closer or "\n" in typed:
        return None
    rest = _mended(state.texts[0], typed)
    return Followed(mended=rest) if rest else None


def _rests(texts: Sequence[str], typed: str, closer: str) -> list[str]:
    found = []
    for text in texts:
        if text.startswith(typed) and text.endswith(closer):
            rest = text[len(typed) :]
            if len(rest) >= len(closer):
                found.append(rest[: len(rest) - len(closer)])
    return found


def _mended(text: str, typed: str) -> str:
    """The rest of a text behind the piece that `typed` contradicts."""
    same = 0
    while same < min(len(text), len(typed)) and text[same] == typed[same]:
        same += 1
    piece = _PIECE.match(text, same)
    return text[piece.end() :] if piece else ""
