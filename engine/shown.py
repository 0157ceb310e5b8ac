"""What whoever watches a request is shown: the drafts of its spans, canvas after canvas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from infilld.engine.choices import GapResult
from infilld.engine.draft import CanvasDraft
from infilld.engine.passages import Target, composed
from infilld.engine.request import CanvasToken, CanvasUpdate, DraftSpan, InfillRequest


@dataclass
class Shown:
    """The drafts of a request, as they were shown last.

    Attributes:
        request: whose spans they are of. on_canvas: gets every update; None: nobody watches.
        drafts: of every span. canvases: finished before this one. passes: forwards of those.
    """

    request: InfillRequest
    on_canvas: Callable[[CanvasUpdate], None] | None
    drafts: list[DraftSpan] = field(init=False)
    canvases: int = field(default=0, init=False)
    passes: int = field(default=0, init=False)
    _updates: int = field(default=0, init=False)
    _texts: dict[Target, str | None] = field(default_factory=dict, init=False)
    _tokens: dict[Target, tuple[CanvasToken, ...]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Nothing is shown yet."""
        spans = self.request.spans
        self.drafts = [DraftSpan(self.request.text[s.start : s.end], 0) for s in spans]

    def begin(self, targets: Sequence[Target]) -> None:
        """These are going to be filled; each stays as it is until it is shown."""
        self._texts = dict.fromkeys(targets)

    def finish(self, target: Target, text: str | None, passes: int) -> None:
        """The canvas of a piece is finished, with this text; None: it stays as it is."""
        self._texts[target] = text
        self._tokens.pop(target, None)
        self.canvases += 1
        self.passes += passes

    def show(self, targets: Sequence[Target], draft: CanvasDraft, passes: int) -> None:
        """Tell who watches what a canvas holds now; canvases side by side follow each other."""
        if self.on_canvas is None:
            return
        for target, span in zip(targets, draft.spans, strict=True):
            self._texts[target] = span.text
            self.drafts[target.number] = self._composed(target, span)
        if draft.tokens:
            numbers = [target.number for target in targets]
            self._tokens[targets[0]] = tuple(
                each if each.span is None else replace(each, span=numbers[each.span])
                for each in draft.tokens
            )
        ordered = sorted(self._tokens.items(), key=lambda each: each[0].span.start)
        update = CanvasUpdate(
            seq=self._updates,
            canvas=self.canvases,
            passes=self.passes + passes,
            spans=tuple(self.drafts),
            revised=draft.is_revised,
            tokens=tuple(token for _, tokens in ordered for token in tokens),
        )
        self._updates += 1
        self.on_canvas(update)

    def settle(self, targets: Sequence[Target], results: Sequence[GapResult], passes: int) -> None:
        """Take back what was called settled and was not chosen."""
        drafts, is_revised = [], False
        for target, result in zip(targets, results, strict=True):
            shown = self.drafts[target.number]
            text = result.choices[0].text if result.choices else target.selection
            settled = shown.text[: shown.settled]
            is_kept = composed(self.request, target.number, [(target, text)]).startswith(settled)
            is_revised = is_revised or not is_kept
            drafts.append(DraftSpan(text, 0))
        if is_revised:
            self.show(targets, CanvasDraft(tuple(drafts), is_revised=True), passes)

    def _composed(self, target: Target, draft: DraftSpan) -> DraftSpan:
        own = {each: text for each, text in self._texts.items() if each.number == target.number}
        pieces = sorted(own.items(), key=lambda piece: piece[0].span.start)
        text = composed(self.request, target.number, pieces)
        # Of a span in several pieces nothing is settled: they are shown one after another.
        settled = draft.settled + len(target.start) if draft.settled and len(own) == 1 else 0
        return DraftSpan(text, min(settled, len(text)))
