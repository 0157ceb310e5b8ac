"""How a span is going to be filled: the method, and the layout of its gap."""

from collections.abc import Sequence
from dataclasses import dataclass

from infilld.engine.canvas import GapCanvas, GapKind, first_gap_tokens, head_of
from infilld.engine.config import ModelConfig
from infilld.engine.errors import GapTooLong
from infilld.engine.found import Found
from infilld.engine.lines import line_end, unix
from infilld.engine.prompt import Controls, InfillPrompt
from infilld.engine.ranking import Candidate
from infilld.engine.request import InfillRequest, Span
from infilld.engine.tokenizer import Tokenizer

# Room behind the longest draft.
_DRAFT_SPARE = 4
# A causal draft costs one pass a token; up to this width a pass is a few milliseconds.
_CHEAP_WIDTH = 512
_FIRST_LINE_TOKENS = 24
# Suffix tokens that must follow a fill: enough to tell where it has to end.
_JUDGED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class FillMethod:
    """How gaps are filled. The defaults are best; the others are there to be compared.

    Attributes:
        found_drafts: hypotheses that start from found drafts, at most; 0: none is looked for.
        found_texts: found drafts that are judged as they are, beside what became of them.
        causal_draft: another starts from what the encoder writes by itself, where a pass costs
            little.
        pins_suffix: the canvas holds the first tokens of the suffix, pinned.
        holds_back: what is probably wrong, or breaks the document, is not shown.
    """

    found_drafts: int = 1
    found_texts: int = 6
    causal_draft: bool = False
    pins_suffix: bool = True
    holds_back: bool = True


@dataclass(frozen=True, kw_only=True)
class GapPlan:
    """How a span is going to be filled.

    Attributes:
        span: what is replaced. canvas: the gap it starts with, and the pinned head.
        limit_tokens: longest the gap may grow. min_tokens: fewest tokens of text.
        found: drafts that fit, the likeliest first. drafted: hypotheses that start from them.
        causal_tokens: most that the encoder writes as a draft; 0: it writes none.
        alternatives: hypotheses that start from noise, and fills that are wanted.
        judged: suffix tokens by which fills are scored.
        one_line: no line end may be written. newline: of the document there.
    """

    span: Span
    canvas: GapCanvas
    limit_tokens: int
    min_tokens: int
    found: tuple[Candidate, ...]
    drafted: int
    causal_tokens: int
    alternatives: int
    judged: tuple[int, ...]
    one_line: bool
    newline: str


def plan_gap(
    request: InfillRequest,
    span: Span,
    kind: GapKind,
    prompt: InfillPrompt,
    tokenizer: Tokenizer,
    controls: Controls,
    config: ModelConfig,
    *,
    found: Sequence[Found] = (),
    method: FillMethod | None = None,
) -> GapPlan:
    """Lay out the gap of a span, with hypotheses for the first drafts that were found.

    Raises:
        GapTooLong: a bound, or the selection, does not fit a canvas.
    """
    selection = request.text[span.start : span.end]
    head = head_of(prompt, controls)
    method = method or FillMethod()
    pinned = head if method.pins_suffix else ()
    room = max(1, config.canvas_tokens - len(pinned))
    selected = _selected_tokens(selection, room, tokenizer)
    first = first_gap_tokens(kind, selected, room, request.min_tokens, request.max_tokens)
    limit = request.max_tokens or room
    least = request.min_tokens or 0
    drafts = [
        Candidate(draft.text, tokens, evidence=draft.evidence)
        for draft in found
        if least <= len(tokens := tuple(tokenizer.encode(draft.text))) <= limit
    ]
    drafted = drafts[: method.found_drafts]
    # A filler behind the longest draft leaves room to lengthen it.
    longest = max((len(draft.tokens) + _DRAFT_SPARE for draft in drafted), default=0)
    return GapPlan(
        span=span,
        canvas=GapCanvas(min(limit, max(first, longest)), pinned),
        limit_tokens=limit,
        min_tokens=least,
        found=tuple(drafts),
        drafted=len(drafted),
        causal_tokens=_causal_tokens(kind, selection, limit, config) * method.causal_draft,
        alternatives=request.alternatives,
        judged=head[:_JUDGED_TOKENS],
        # Rewriting several lines may need several lines, whatever follows on the last one.
        one_line=kind == "in_line" and "\n" not in unix(selection),
        newline=line_end(request.text, span.start),
    )


def _causal_tokens(kind: GapKind, selection: str, limit: int, config: ModelConfig) -> int:
    """How many tokens a causal draft may have: a line's, where a line is wanted and it pays."""
    if selection or kind == "in_line" or config.width > _CHEAP_WIDTH:
        return 0
    return min(limit, _FIRST_LINE_TOKENS)


def _selected_tokens(selection: str, room: int, tokenizer: Tokenizer) -> int | None:
    """Tokens of a selection; None for a gap.

    A selection that cannot fit whatever its tokens are is refused before it is tokenized: that
    would hold up every other thread for as long as it takes.
    """
    if not selection:
        return None
    least = -(-len(selection.encode()) // tokenizer.longest_bytes)
    if least > room:
        raise GapTooLong(f"the selection needs at least {least} tokens, the canvas holds {room}")
    return len(tokenizer.encode(unix(selection)))
