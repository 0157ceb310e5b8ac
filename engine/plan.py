"""How a passage is going to be filled: the method, and the layout of its canvas."""

from collections.abc import Sequence
from dataclasses import dataclass

from infilld.engine.canvas import (
    HEAD_TOKENS,
    CanvasLayout,
    Draft,
    Gap,
    GapKind,
    first_gap_tokens,
    gap_kind,
)
from infilld.engine.config import ModelConfig
from infilld.engine.errors import GapTooLong
from infilld.engine.follow import Followed
from infilld.engine.found import found_drafts
from infilld.engine.lines import line_end
from infilld.engine.passages import Passage, Target, passage_of
from infilld.engine.prompt import InfillPrompt, PromptLayout, PromptParts
from infilld.engine.ranking import Candidate
from infilld.engine.request import InfillRequest
from infilld.engine.tokenizer import Tokenizer, healed

# Room behind the longest draft.
_DRAFT_SPARE = 4
# A causal draft costs one pass a token; up to this width a pass is a few milliseconds.
_CHEAP_WIDTH = 512
_FIRST_LINE_TOKENS = 24
# Suffix tokens that must follow a fill: enough to tell where it has to end.
_JUDGED_TOKENS = 8
# Text between two spans that is worth its place on the canvas.
_MOST_BETWEEN_TOKENS = 64
# Positions that stand for text that was contradicted.
_CONTRADICTED_TOKENS = 2
# Steps to look again at what is known of a gap, and at what was contradicted.
_AGREEING_STEPS, _CONTRADICTED_STEPS = 1, 2
# Other texts in which drafts are looked for.
_SEARCHED_CONTEXTS = 6
# Texts that agree and are judged again, beside what is found anew.
_FOLLOWED_TEXTS = 4
# Positions behind each old line that is written anew, for what may have to be inserted.
_INSERTED_TOKENS = 3
# Steps for a gap of so many tokens, at most.
_SMALL_GAP_TOKENS, _SMALL_GAP_STEPS, _MOST_STEPS, _FEWEST_STEPS = 48, 12, 24, 6
# Exact lengths that are tried where a model has no filler token.
_LENGTHS: dict[GapKind, tuple[int, ...]] = {
    "in_line": (1, 2, 3, 4, 6, 8, 12, 16, 24),
    "tail": (2, 4, 8, 16, 24, 32, 48),
    "block": (4, 8, 16, 32, 48, 64, 96),
}
# Share of a canvas that one piece of a long selection may have.
_PIECE_SHARE = 0.5
# A longer answer would take minutes.
_MOST_PIECES = 32


@dataclass(frozen=True, kw_only=True)
class FillMethod:
    """How gaps are filled. The defaults are best; the others are there to be compared.

    Attributes:
        found_drafts: hypotheses that start from found drafts, at most; 0: none is looked for.
        found_texts: found drafts that are judged as they are, beside what became of them.
        causal_draft: another starts from what the encoder writes by itself, where a pass costs
            little.
        pins_suffix: the canvas holds the first tokens of the suffix, pinned.
        several: spans near to each other are filled on one canvas.
        heals: a gap within a word begins with the token of the word's start.
        tells_given: the first pass is told which positions are given or drafted.
        holds_drafts: where the model agrees with a draft, it is not re-noised.
        plateau: a canvas is done when its argmax stays the same for three passes, sure or not.
        samples: accepted positions take a sample instead of the argmax.
        searches_length: exact lengths are tried, as where there is no filler token.
        follows: what was computed for a document is used again after typing.
        trims: what repeats the suffix is cut off, and shorter answers are judged too.
        checks: what repeats, unbalances or breaks the text around it is not shown.
        reads_context: the prompt, and the search for drafts, take in text from elsewhere.
        holds_back: what is probably wrong is not shown; without it no check holds either.
    """

    found_drafts: int = 1
    found_texts: int = 6
    causal_draft: bool = False
    pins_suffix: bool = True
    several: bool = True
    heals: bool = True
    tells_given: bool = True
    holds_drafts: bool = True
    plateau: bool = True
    samples: bool = False
    searches_length: bool = False
    follows: bool = True
    trims: bool = True
    checks: bool = True
    reads_context: bool = True
    holds_back: bool = True


@dataclass(frozen=True, kw_only=True)
class GapPlan:
    """How one target is going to be filled.

    Attributes:
        target: what is filled. kind: of gap. newline: of the document there.
        found: texts that are judged as they are, the likeliest first.
        drafts: what hypotheses start from, before those that start from noise.
        judged: tokens behind the gap by which fills are scored.
        refused: texts that are no answer: what a rewrite is to replace.
    """

    target: Target
    kind: GapKind
    newline: str
    found: tuple[Candidate, ...]
    drafts: tuple[Draft, ...]
    judged: tuple[int, ...]
    refused: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class CanvasPlan:
    """How a passage is going to be filled.

    Attributes:
        passage: the text. prompt: what the model reads. prompt_ids: of it, without a stem.
        layout: of the canvas. gaps: in the order of the document.
        noise_rows: hypotheses that start from noise. alternatives: answers that are wanted.
        causal_tokens: most that the encoder writes as a draft; 0: it writes none.
        lengths: exact lengths to try where there is no filler; empty: the gap finds its own.
        most_steps: of denoising. is_settled: nothing is left to refine.
        shown: what was shown for this gap before the last keystroke, as far as it is left.
    """

    passage: Passage
    prompt: InfillPrompt
    prompt_ids: tuple[int, ...]
    layout: CanvasLayout
    gaps: tuple[GapPlan, ...]
    noise_rows: int
    alternatives: int
    causal_tokens: int
    lengths: tuple[int, ...]
    most_steps: int
    is_settled: bool
    shown: str | None


class Planner:
    """Plans passages for one model.

    Args:
        tokenizer: vocabulary. layout: of its prompts. config: shapes.
        prompt_tokens: longest prompt. method: how gaps are filled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        layout: PromptLayout,
        config: ModelConfig,
        prompt_tokens: int,
        method: FillMethod,
    ) -> None:
        self._tokenizer, self._layout, self._config = tokenizer, layout, config
        self._prompt_tokens, self._method = prompt_tokens, method
        self._searches = method.searches_length or layout.filler is None

    def passages(self, request: InfillRequest, targets: Sequence[Target]) -> list[Passage]:
        """Targets in as few passages as their canvases hold."""
        groups: list[list[Target]] = []
        used = 0
        for target in targets:
            own = self._expected(request, target)
            if groups and self._method.several and not self._searches:
                last = groups[-1][-1]
                text = last.end + request.text[last.span.end : target.span.start] + target.start
                between = self._tokens_of(text, _MOST_BETWEEN_TOKENS + 1)
                room = self._config.canvas_tokens - HEAD_TOKENS
                if between <= _MOST_BETWEEN_TOKENS and used + between + own <= room:
                    groups[-1].append(target)
                    used += between + own
                    continue
            groups.append([target])
            used = own
        return [passage_of(request.text, group) for group in groups]

    def pieces(self, lines: Sequence[str]) -> list[int]:
        """Lengths, in characters, of pieces of whole lines that fit a canvas each.

        Raises:
            GapTooLong: a line alone does not.
        """
        whole = self._config.canvas_tokens - HEAD_TOKENS
        least = -(-sum(map(len, lines)) // self._tokenizer.longest_bytes)
        refused = GapTooLong(f"the selection needs more than {_MOST_PIECES} canvases")
        room = int(_PIECE_SHARE * self._config.canvas_tokens)
        if least > _MOST_PIECES * room:
            raise refused
        if self._tokens_of("".join(lines), whole) * 5 // 4 + 16 <= whole:
            return [sum(map(len, lines))]
        pieces, used = [0], 0
        for line in lines:
            tokens = self._tokens_of(line, room + 1)
            if tokens > room:
                raise GapTooLong(
                    f"a line of the selection has {tokens} tokens or more, a canvas takes {room}",
                    remedy="Select a part of the line.",
                )
            if pieces[-1] and used + tokens > room:
                pieces.append(0)
                used = 0
            pieces[-1] += len(line)
            used += tokens
            if len(pieces) > _MOST_PIECES:
                raise refused
        return pieces

    def plan(
        self, request: InfillRequest, passage: Passage, followed: Followed | None = None
    ) -> CanvasPlan:
        """Lay out the canvas of a passage.

        Args:
            request: it belongs to. passage: its text.
            followed: what is known of its gap from before.

        Raises:
            GapTooLong: a bound, or the selection, does not fit a canvas.
            ContextTooLong, Unsupported: see `PromptLayout.write`.
        """
        prompt = self.prompt(request, passage)
        ids, stem = prompt.ids, ""
        if self._method.heals and request.instruction is None:
            kept, stem = healed(prompt.ids, passage.before, self._tokenizer)
            ids = tuple(kept)
        head = self._head(passage, prompt)
        # A piece of a long selection is followed by the next one, whatever the answer's end is.
        is_pinned = prompt.suffix_follows or passage.head is not None
        pinned = head if self._method.pins_suffix and is_pinned else ()
        given = [tuple(self._tokenizer.encode(text)) for text in passage.between]
        behind = [*given, head]
        gaps: list[GapPlan] = []
        layouts: list[Gap] = []
        room = self._config.canvas_tokens - len(pinned) - sum(map(len, given))
        for number in range(len(passage.targets)):
            plan = self._gap(request, passage, number, behind[number], stem, followed)
            others = sum(self._expected(request, t) for t in passage.targets[number + 1 :])
            gap = self._sized(request, plan, max(1, room - others), stem)
            room -= gap.tokens
            gaps.append(plan)
            layouts.append(gap)
            stem = ""
        layout = CanvasLayout(tuple(layouts), (*given, pinned))
        drafted = any(gap.drafts for gap in gaps)
        is_alone = len(gaps) == 1
        noise_rows = request.alternatives
        if request.alternatives == 1 and followed is not None and drafted:
            # What is known, or found, takes the place of noise.
            noise_rows = 0
        shown = followed.shown if followed is not None and noise_rows == 0 else None
        agrees = followed is not None and (shown is not None or followed.is_best)
        return CanvasPlan(
            passage=passage,
            prompt=prompt,
            prompt_ids=ids,
            layout=layout,
            gaps=tuple(gaps),
            noise_rows=noise_rows,
            alternatives=request.alternatives,
            causal_tokens=self._causal_tokens(gaps[0], layouts[0]) if is_alone else 0,
            lengths=self._lengths(gaps[0], layouts[0]) if is_alone and is_pinned else (),
            most_steps=_MOST_STEPS if noise_rows else _most_steps(followed),
            # What was shown, or was the best text, and goes on to agree needs no second look.
            is_settled=agrees and followed is not None and followed.is_settled and not noise_rows,
            shown=shown,
        )

    def prompt(self, request: InfillRequest, passage: Passage) -> InfillPrompt:
        """The prompt of a passage.

        Raises:
            ContextTooLong, Unsupported: see `PromptLayout.write`.
        """
        selection = passage.targets[0].selection if len(passage.targets) == 1 else ""
        parts = PromptParts(
            prefix=passage.before,
            suffix=passage.after,
            selection=selection,
            instruction=request.instruction,
            context=request.context if self._method.reads_context else (),
            language=request.language,
            path=request.path,
            think=request.think,
        )
        return self._layout.write(parts, self._prompt_tokens)

    def _head(self, passage: Passage, prompt: InfillPrompt) -> tuple[int, ...]:
        """Tokens that follow the last gap; the end of the text is one of them."""
        if passage.head:
            return tuple(self._tokenizer.encode(passage.head[: 8 * HEAD_TOKENS])[:HEAD_TOKENS])
        ends = () if prompt.suffix_is_cut else prompt.suffix_end
        return (*prompt.suffix, *ends)[:HEAD_TOKENS]

    def _gap(
        self,
        request: InfillRequest,
        passage: Passage,
        number: int,
        behind: tuple[int, ...],
        stem: str,
        followed: Followed | None,
    ) -> GapPlan:
        target = passage.targets[number]
        before, after = passage.around(number, [t.selection for t in passage.targets])
        kind = gap_kind(before, after)
        texts: dict[str, float] = {}
        drafts: list[Draft] = []
        if target.draft is not None:
            needed = self._tokens_of(target.draft, self._config.canvas_tokens)
            if needed > self._config.canvas_tokens:
                raise GapTooLong(
                    f"the draft has {needed} tokens or more, "
                    f"a canvas holds {self._config.canvas_tokens}",
                    remedy="Give a shorter draft.",
                )
            texts[target.draft] = 0.0
            drafts.append(self._draft(target.draft, stem))
        if followed is not None:
            texts |= dict.fromkeys(followed.texts[:_FOLLOWED_TEXTS], 0.0)
            if followed.texts:
                drafts.append(self._draft(followed.texts[0], stem))
            elif followed.mended is not None:
                texts[followed.mended] = 0.0
                drafts.append(self._mended(followed.mended))
        if target.may_stay:
            texts[target.selection] = 0.0
        if target.selection and not target.is_suspect:
            drafts += self._old_text(target.selection, stem)
        elif self._method.found_drafts:
            others = [each.text for each in request.context[:_SEARCHED_CONTEXTS]]
            others = others if self._method.reads_context else []
            found = found_drafts(
                before, after, kind, most=self._method.found_texts, elsewhere=others
            )
            texts |= {draft.text: draft.evidence for draft in found}
            if not (followed is not None and followed.texts):
                wanted = found[: self._method.found_drafts]
                drafts += [self._draft(draft.text, stem) for draft in wanted]
        is_old = bool(target.selection)
        low, high = request.min_tokens or 0, request.max_tokens or self._config.canvas_tokens
        candidates = [
            Candidate(text, tuple(self._tokenizer.encode(stem + text)), evidence=evidence)
            for text, evidence in texts.items()
            if low <= len(self._tokenizer.encode(text)) <= high
        ]
        high += bool(stem)
        return GapPlan(
            target=target,
            kind=kind,
            newline=line_end(request.text, target.span.start),
            found=tuple(candidates),
            drafts=tuple(draft for draft in drafts if low <= len(draft.tokens) <= high),
            judged=behind[:_JUDGED_TOKENS],
            refused=frozenset() if target.may_stay else frozenset([target.selection] * is_old),
        )

    def _sized(self, request: InfillRequest, plan: GapPlan, room: int, stem: str) -> Gap:
        """The gap, long enough for what is expected and for every draft."""
        selection = plan.target.selection
        selected = self._tokens_of(selection, room + 1) if selection else None
        if plan.target.is_suspect and selected is not None:
            # A few tokens among others that stay: room for a few more.
            first = min(room, selected + _DRAFT_SPARE)
        else:
            low, high = request.min_tokens, request.max_tokens
            first = first_gap_tokens(plan.kind, selected, room, low, high)
        # The stem is written again, which may take a token more than the fill by itself.
        limit = room if request.max_tokens is None else request.max_tokens + bool(stem)
        # A filler behind the longest draft leaves room to lengthen it.
        longest = max((len(draft.tokens) + _DRAFT_SPARE for draft in plan.drafts), default=0)
        return Gap(
            tokens=min(limit, room, max(first + bool(stem), longest)),
            limit_tokens=min(limit, room),
            min_tokens=request.min_tokens or 0,
            # Rewriting several lines may need several lines, whatever follows on the last one.
            one_line=plan.kind == "in_line" and "\n" not in selection,
            stem=stem,
        )

    def _draft(self, text: str, stem: str) -> Draft:
        return Draft(tuple(self._tokenizer.encode(stem + text)))

    def _mended(self, rest: str) -> Draft:
        """Noise, then the rest of a text whose start was contradicted."""
        tokens = self._tokenizer.encode(rest)
        noise = _CONTRADICTED_TOKENS
        return Draft((*[0] * noise, *tokens), (*[False] * noise, *[True] * len(tokens)))

    def _old_text(self, selection: str, stem: str) -> list[Draft]:
        """The old text as it is; and with every other line, or token, open to be written anew.

        A line that is open has room behind it for insertions; where nothing is inserted the model
        writes fillers.
        """
        whole = self._draft(selection, stem)
        lines = selection.splitlines(keepends=True)
        if len(lines) < 2:
            known = tuple(place % 2 == 0 for place in range(len(whole.tokens)))
            return [whole, Draft(whole.tokens, known)]
        tokens: list[int] = []
        is_known: list[bool] = []
        room = _INSERTED_TOKENS if self._layout.filler is not None else 0
        for number, line in enumerate([stem + lines[0], *lines[1:]]):
            own = self._tokenizer.encode(line)
            is_kept = number % 2 == 0
            tokens += own if is_kept else [*own, *[0] * room]
            is_known += [is_kept] * (len(own) if is_kept else len(own) + room)
        return [whole, Draft(tuple(tokens), tuple(is_known))]

    def _causal_tokens(self, plan: GapPlan, gap: Gap) -> int:
        """How many tokens a causal draft may have: a line's, where a line is wanted and it pays."""
        is_dear = self._config.width > _CHEAP_WIDTH or plan.kind == "in_line"
        if not self._method.causal_draft or plan.target.selection or is_dear:
            return 0
        return min(gap.limit_tokens, _FIRST_LINE_TOKENS)

    def _lengths(self, plan: GapPlan, gap: Gap) -> tuple[int, ...]:
        if not self._searches:
            return ()
        if gap.min_tokens == gap.limit_tokens or plan.target.selection:
            return (gap.tokens,)
        wanted = {min(length, gap.limit_tokens) for length in _LENGTHS[plan.kind]}
        wanted = {max(length, gap.min_tokens, 1) for length in wanted}
        return tuple(sorted(wanted))

    def _expected(self, request: InfillRequest, target: Target) -> int:
        """Tokens that a target is expected to take on a canvas."""
        most = self._config.canvas_tokens
        if request.max_tokens is not None:
            return min(most, request.max_tokens)
        if target.is_suspect:
            return min(most, self._tokens_of(target.selection, most) + _DRAFT_SPARE)
        if target.selection:
            return min(most, self._tokens_of(target.selection, most) * 5 // 4 + 16)
        text = request.text
        kind = gap_kind(text[: target.span.start][-1000:], text[target.span.end :][:1000])
        expected = first_gap_tokens(kind, None, most, None, None)
        drafted = self._tokens_of(target.draft, most) + _DRAFT_SPARE if target.draft else 0
        return min(most, max(expected, request.min_tokens or 0, drafted))

    def _tokens_of(self, text: str, most: int) -> int:
        """Tokens of a text, or a number above `most` where it has more.

        A text that cannot have fewer, whatever its tokens are, is not tokenized: that would hold
        up every other thread for as long as it takes.
        """
        least = -(-len(text.encode()) // self._tokenizer.longest_bytes)
        return least if least > most else len(self._tokenizer.encode(text))


def _most_steps(followed: Followed | None) -> int:
    if followed is None:
        return _MOST_STEPS
    return _AGREEING_STEPS if followed.texts else _CONTRADICTED_STEPS


def steps_for(layout: CanvasLayout, most: int) -> int:
    """Steps for a canvas; few for a short gap, since the temperature falls over all of them."""
    tokens = sum(gap.tokens for gap in layout.gaps)
    wanted = _FEWEST_STEPS - 2 + -(-tokens // 6)
    if tokens <= _SMALL_GAP_TOKENS:
        wanted = min(wanted, _SMALL_GAP_STEPS)
    return min(most, max(_FEWEST_STEPS, wanted))
