"""A gap whose text must match a grammar.

It is written behind the prompt that any infill has, canvas after canvas, as an answer in a
conversation is; what matches by construction is not weighed, trimmed or objected to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infilld.engine.choices import Choice, GapResult, scored_tokens
from infilld.engine.config import SamplerConfig
from infilld.engine.draft import CanvasDraft
from infilld.engine.matching import GrammarTokens
from infilld.engine.pace import Pace
from infilld.engine.passages import Target, passage_of
from infilld.engine.passes import CanvasModel, Work, together
from infilld.engine.plan import Planner
from infilld.engine.prefixes import PrefixPool
from infilld.engine.prompt import InfillPrompt
from infilld.engine.request import DraftSpan, InfillRequest, Reason, Usage
from infilld.engine.sampler import Step
from infilld.engine.scorer import score
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.transcript import Transcript
from infilld.engine.turns import TurnPrompt
from infilld.engine.writing import Watching, Writer, thinking

if TYPE_CHECKING:
    from infilld.engine.infill import Hooks

OnDraft = Callable[[CanvasDraft, int], None]
_MOST_SEEDS = 2**63


class _Struck(Exception):
    """The deadline struck before there was anything to write behind."""


@dataclass(frozen=True)
class ConstrainedFill:
    """What came out for the only target, what it cost, and seconds of encoding."""

    result: GapResult
    usage: Usage
    encode_s: float


class ConstrainedFiller:
    """Fills gaps under a grammar with one model.

    Args:
        model, tokenizer, sampler, planner, prefixes: as of an `Infiller`.
        filler: token of no text; None: there is none.
        tokens: the vocabulary as grammars see it.
    """

    def __init__(
        self,
        model: CanvasModel,
        tokenizer: Tokenizer,
        sampler: SamplerConfig,
        planner: Planner,
        prefixes: PrefixPool,
        filler: int | None,
        tokens: GrammarTokens,
    ) -> None:
        self._model, self._tokenizer, self._sampler = model, tokenizer, sampler
        self._planner, self._prefixes = planner, prefixes
        self._filler, self._tokens = filler, tokens
        # Its own: nothing is weighed behind these canvases.
        self._pace = Pace()

    def work(
        self,
        request: InfillRequest,
        target: Target,
        hooks: "Hooks",
        seed: int,
        on_draft: OnDraft | None,
    ) -> Work[ConstrainedFill]:
        """Fill the target.

        Args:
            request: with a grammar. target: its only one. hooks: see there. seed: of every draw.
            on_draft: gets the draft of the first answer, and forwards so far; None: nobody watches.

        Raises:
            BadGrammar: see `refuse_bad`. ContextTooLong, Unsupported: see `PromptLayout.write`.
        """
        assert request.grammar is not None
        prompt = self._planner.prompt(request, passage_of(request.text, [target]))
        texts = [self._tokens.start(request.grammar) for _ in range(request.alternatives)]
        ids = prompt.ids

        def check() -> None:
            hooks.check()
            if hooks.is_late():
                raise _Struck

        if prompt.thought_ends:
            try:
                ids = yield from thinking(
                    self._model,
                    self._tokenizer,
                    self._sampler,
                    self._prefixes,
                    prompt,
                    seed,
                    check,
                )
            except _Struck:
                why = "The deadline struck before the thoughts ended."
                nothing = GapResult(choices=(), reason="deadline", why=why, texts=())
                return ConstrainedFill(nothing, Usage(prompt_tokens=len(ids)), 0.0)
        asked = TurnPrompt(ids=ids, ends=self._ends(prompt))
        writers = [
            Writer(
                model=self._model,
                tokenizer=self._tokenizer,
                sampler=self._sampler,
                prefixes=self._prefixes,
                pace=self._pace,
                prompt=asked,
                transcript=Transcript(self._tokenizer, asked),
                seed=(seed + number) % _MOST_SEEDS,
                greedy=True,
                max_tokens=request.max_tokens or self._model.config.canvas_tokens,
                grammar=text,
                watching=Watching(
                    on_step=None if number or on_draft is None else _told(on_draft),
                    check=hooks.check,
                    # To score what was written takes about as long as a pass.
                    is_late=lambda needed_s: hooks.is_late(needed_s + self._pace.pass_s),
                ),
            )
            for number, text in enumerate(texts)
        ]
        yield from together([writer.work() for writer in writers])
        result = yield from self._judged(writers, ids, hooks)
        usage = Usage(
            prompt_tokens=len(ids),
            cached_tokens=writers[0].cached_tokens,
            canvas_tokens=sum(each.canvas_tokens for each in writers),
            # Canvases side by side share their passes.
            passes=max(each.passes for each in writers),
        )
        return ConstrainedFill(result, usage, max(each.encode_s for each in writers))

    def _ends(self, prompt: InfillPrompt) -> frozenset[int]:
        """Tokens that end a text; a fence, which ends other fills, may be part of it."""
        ends = prompt.ends if self._filler is None else (*prompt.ends, self._filler)
        return frozenset(end for end in ends if not self._tokens.spelled[end])

    def _judged(
        self, writers: Sequence[Writer], ids: Sequence[int], hooks: "Hooks"
    ) -> Work[GapResult]:
        """The texts that are whole, the likeliest first, or why there are none."""
        whole = {each.transcript.text: each for each in writers if each.transcript.finish == "stop"}
        tokens = {text: self._tokenizer.encode(text) for text in whole if text}
        if not tokens:
            return _nothing(writers, is_empty=bool(whole))
        prefix, _ = yield from self._prefixes.encoding(ids, hooks.check)
        try:
            logs = score(self._model, prefix, list(tokens.values()))
        finally:
            self._prefixes.give_back(prefix)
        choices = []
        for (text, own), of_tokens in zip(tokens.items(), logs, strict=True):
            mean = float(of_tokens.mean())
            pieces = [self._tokenizer.decode([token]) for token in own]
            scored = scored_tokens(pieces, of_tokens.tolist())
            choices.append(Choice(text, math.exp(mean), mean, scored))
        choices.sort(key=lambda choice: -choice.score)
        texts = tuple(choice.text for choice in choices)
        return GapResult(choices=tuple(choices), reason="ok", why="", texts=texts)


def _nothing(writers: Sequence[Writer], *, is_empty: bool) -> GapResult:
    reason: Reason = "empty"
    if is_empty:
        why = "The model wrote no text for this span, which the grammar allows."
    elif any(each.transcript.finish == "deadline" for each in writers):
        reason, why = "deadline", "The deadline struck before the text matched its grammar."
    else:
        why = (
            f"No text that matches the grammar was whole after {writers[0].max_tokens} tokens; "
            "give a larger max_tokens."
        )
    return GapResult(choices=(), reason=reason, why=why, texts=())


def _told(on_draft: OnDraft) -> Callable[[Step, Transcript, Transcript, int], None]:
    """Steps as drafts of a gap."""

    def told(step: Step, final: Transcript, draft: Transcript, passes: int) -> None:
        on_draft(CanvasDraft((DraftSpan(draft.whole, len(final.text)),)), passes)

    return told
