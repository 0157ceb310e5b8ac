"""What will be asked next: after a suggestion was inserted, the gap behind it."""

import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.errors import RequestError, UnknownId, UnknownOption
from infilld.engine.request import InfillRequest, InfillResult, Span

_ANSWERS = 64
# Whoever inserts later than this has gone on meanwhile.
_FRESH_S = 60.0


@dataclass
class _Answer:
    """What an answer showed; `request` only while it is the newest of its document."""

    request: InfillRequest | None
    fills: tuple[str, ...]
    count: int
    at: float


class Answers:
    """The last answers, as far as feedback needs them; of each document only the newest text."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._newest: OrderedDict[str, str] = OrderedDict()

    def begin(self, job_id: str, document: str | None) -> None:
        """A job of a document begins: what was answered before is not prefetched for."""
        if document is None:
            return
        before = self._answers.get(self._newest.pop(document, ""))
        if before is not None:
            before.request = None
        self._newest[document] = job_id
        while len(self._newest) > _ANSWERS:
            self._newest.popitem(last=False)

    def keep(self, request: InfillRequest | ChatRequest, result: InfillResult | ChatResult) -> None:
        """Remember an answer under its id; nothing is prefetched behind one in a conversation."""
        if isinstance(request, InfillRequest) and isinstance(result, InfillResult):
            self._answers[result.id] = self._followable(request, result)
        elif isinstance(result, ChatResult):
            count = len(result.answers)
            self._answers[result.id] = _Answer(None, (), count, time.monotonic())
        while len(self._answers) > _ANSWERS:
            self._answers.popitem(last=False)

    def _followable(self, request: InfillRequest, result: InfillResult) -> _Answer:
        document = request.document
        is_newest = document is not None and self._newest.get(document) == result.id
        return _Answer(
            request=request if is_newest and _has_next(request, result) else None,
            fills=tuple(each.spans[0].text for each in result.alternatives),
            count=len(result.alternatives),
            at=time.monotonic(),
        )

    def know(self, job_id: str, choice: int) -> None:
        """Refuse feedback that belongs to nothing.

        Raises:
            UnknownId: no such answer among the last. UnknownOption: it had no such choice.
        """
        answer = self._answers.get(job_id)
        if answer is None:
            raise UnknownId(f"no answer {job_id!r} among the last {_ANSWERS}")
        if not 0 <= choice < max(1, answer.count):
            raise UnknownOption(f"choice is {choice}, the answer had {answer.count}")

    def follow_up(self, job_id: str, choice: int, chars: int | None) -> InfillRequest | None:
        """The request for the gap behind an inserted text, once.

        Args:
            job_id: of the answer. choice: that was inserted.
            chars: how many code points of it; None: all.

        Returns:
            A background request; None: the answer is unknown, a minute old, or its document has
            a newer job.
        """
        answer = self._answers.get(job_id)
        if answer is None or answer.request is None or not 0 <= choice < answer.count:
            return None
        request, answer.request = answer.request, None
        if time.monotonic() - answer.at > _FRESH_S:
            return None
        (span,) = request.spans
        fill = answer.fills[choice][:chars]
        at = span.start + len(fill)
        text = request.text[: span.start] + fill + request.text[span.end :]
        try:
            return replace(
                request,
                text=text,
                spans=(Span(at, at),),
                pins=(),
                drafts=(),
                min_tokens=None,
                deadline_ms=None,
                seed=None,
                background=True,
            )
        except RequestError:
            # Within a line end, say.
            return None


def _has_next(request: InfillRequest, result: InfillResult) -> bool:
    """Whether something can be prefetched once the answer is inserted."""
    is_plain = request.instruction is None and request.repair is None and not request.think
    return bool(result.alternatives) and is_plain and len(request.spans) == 1
