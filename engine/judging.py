"""What came out of a canvas, judged: every text once, weighed, checked, the best chosen.

The encoder scores what the canvas wrote: the canvas's own last probabilities are near 1 whatever
it settled on, the causal likelihood of the finished text is not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from torch import Tensor

from infilld.engine.choices import Choice, GapResult, scored_tokens
from infilld.engine.draft import CanvasDraft
from infilld.engine.passes import CanvasModel, Work
from infilld.engine.plan import CanvasPlan, FillMethod, GapPlan
from infilld.engine.prefixes import Prefix
from infilld.engine.ranking import Calibration, Candidate, Weighed, place_of, weigh
from infilld.engine.request import Reason
from infilld.engine.scorer import score
from infilld.engine.silence.surroundings import Surroundings
from infilld.engine.tokenizer import Tokenizer

# Above this chance that nothing is missing, nothing is shown.
COMPLETE = 0.5
# Shorter answers that are judged beside a text of several lines.
_SHORTER = 2
# What was shown stays while it is about as good as the best: text must not flicker while one types.
_STAYS = 0.8

_UNCALIBRATED = Calibration(weights={}, bias=0.0, show_above=0.0)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a passage's owner gets to see, and how it ends the work early.

    Attributes:
        on_drafts: gets the drafts of all targets and forwards so far. shows_tokens: and the
            tokens. on_weighed: gets every candidate of each gap. check: raises to end it.
        is_late: whether the deadline leaves no time for another pass.
        until: `time.monotonic()` reading of the deadline; None: there is none.
    """

    on_drafts: Callable[[CanvasDraft, int], None] | None
    shows_tokens: bool
    on_weighed: Callable[[list[Weighed]], None]
    check: Callable[[], None]
    is_late: Callable[[], bool]
    until: float | None


@dataclass
class Row:
    """What a hypothesis wrote into each gap: text, and whether the gap was full."""

    texts: list[str]
    is_open: list[bool]


@dataclass(kw_only=True)
class Judge:
    """Judges the rows of one passage.

    Attributes:
        model, tokenizer, method, calibration: what fills it, and how. plan: its layout.
        prefix: the encoded prompt. boldness: of the request. language: of the document.
        watch: see there. causal: what the encoder wrote by itself.
    """

    model: CanvasModel
    tokenizer: Tokenizer
    method: FillMethod
    calibration: Calibration | None
    plan: CanvasPlan
    prefix: Prefix
    boldness: float | None
    language: str | None
    watch: Watch
    causal: list[Candidate]
    _only_repeats: bool = field(default=False, init=False)

    def work(self, rows: list[Row]) -> Work[list[GapResult]]:
        """Choices for each target in turn, with those before it in place.

        Others get their turn before what takes as long as a pass: scores, and checks.
        """
        results: list[GapResult] = []
        spoken: list[int] = []
        fills: list[str] = []
        for number, gap in enumerate(self.plan.gaps):
            before, after = self.plan.passage.around(number, fills)
            surroundings = Surroundings(
                before, after, language=self.language, replaced=gap.target.selection
            )
            stem = self.plan.layout.gaps[number].stem
            candidates = self._candidates(number, gap, rows, surroundings, stem)
            yield []
            self.watch.check()
            continuations = [[*spoken, *each.tokens, *gap.judged] for each in candidates]
            logs = [each[len(spoken) :] for each in score(self.model, self.prefix, continuations)]
            weighed = weigh(candidates, logs, self.calibration, place_of(before, after))
            self.watch.on_weighed(weighed)
            yield []
            self.watch.check()
            result = self._chosen(gap, weighed, surroundings)
            result = self._with_tokens(result, candidates, logs, stem)
            results.append(result)
            fills.append(result.choices[0].text if result.choices else gap.target.selection)
            if number + 1 < len(self.plan.gaps):
                given = self.plan.layout.given[number]
                spoken += [*self.tokenizer.encode(stem + fills[-1]), *given]
        return results

    def _candidates(
        self,
        number: int,
        gap: GapPlan,
        rows: list[Row],
        surroundings: Surroundings,
        stem: str,
    ) -> list[Candidate]:
        """Every text once: what the hypotheses wrote, what was found, what was expected."""
        trimmed: Callable[[str], str] = surroundings.trimmed if self.method.trims else str
        written = Counter(trimmed(row.texts[number]) for row in rows)
        known = (*self.causal, *gap.found)
        texts = [*written, *(trimmed(each.text) for each in known)]
        raw = [*(row.texts[number] for row in rows), *(each.text for each in known)]
        self._only_repeats = any(raw) and not any(texts)
        if self.method.trims and not gap.target.selection and gap.kind != "in_line":
            texts += [shorter for text in tuple(texts) for shorter in _shorter(text)]
        evidence: dict[str, float] = {}
        for each in known:
            text = trimmed(each.text)
            evidence[text] = max(evidence.get(text, 0.0), each.evidence)
        causal = {trimmed(each.text) for each in self.causal}
        # A canvas may write a text in other tokens than its own; those of its own are judged.
        tokens = {text: tuple(self.tokenizer.encode(stem + text)) for text in dict.fromkeys(texts)}
        least = self.plan.layout.gaps[number].min_tokens
        if self._judges_nothing and not least and not gap.target.selection:
            tokens.setdefault("", tuple(self.tokenizer.encode(stem)))
        else:
            tokens.pop("", None)
        return [
            Candidate(
                text,
                ids,
                rows=written[text] / max(1, len(rows)),
                evidence=evidence.get(text, 0.0),
                is_causal=text in causal,
            )
            for text, ids in tokens.items()
            if len(ids) >= least and text not in gap.refused and (text.strip() or not text)
        ]

    @property
    def _judges_nothing(self) -> bool:
        """Whether it can be told how likely it is that nothing is missing."""
        return self.calibration is None or "is_empty" in self.calibration.weights

    def _chosen(
        self, gap: GapPlan, weighed: list[Weighed], surroundings: Surroundings
    ) -> GapResult:
        """The best candidates, as many as are wanted, or why there are none."""
        texts = tuple(each.candidate.text for each in weighed)

        def nothing(reason: Reason, why: str) -> GapResult:
            return GapResult(choices=(), reason=reason, why=why, texts=texts)

        if not any(texts):
            if self._only_repeats:
                why = "All that was written stands behind the cursor already."
                return nothing("repeats_suffix", why)
            if self.watch.is_late():
                return nothing("deadline", "The deadline struck before any text was certain.")
            return nothing("empty", "The model wrote no text for this span.")
        is_complete = not texts[0] and weighed[0].confidence >= COMPLETE and self.boldness != 1
        if self.calibration is not None and is_complete and self.method.holds_back:
            chance = weighed[0].confidence
            return nothing("empty", f"Nothing is missing here, with a chance of {chance:.0%}.")
        weighed = [each for each in weighed if each.candidate.text]
        least = 0.0
        if self.method.holds_back:
            # Without a calibration all is shown, unless somebody asks to be shy.
            calibration = self.calibration or _UNCALIBRATED
            least = calibration.least_confidence(self.boldness)
        likely = [each for each in weighed if each.confidence >= least]
        if not likely:
            best = weighed[0].confidence
            why = f"The best text is right with a chance of {best:.0%}."
            return nothing("low_confidence", why)
        if self.method.checks and self.method.holds_back:
            kept, objection = self._unobjected(likely, surroundings)
            if not kept and objection is not None:
                return nothing(*objection)
        else:
            kept = likely[: self.plan.alternatives]
        choices = tuple(Choice(each.candidate.text, each.confidence, each.score) for each in kept)
        return GapResult(choices=choices, reason="ok", why="", texts=texts)

    def _with_tokens(
        self,
        result: GapResult,
        candidates: Sequence[Candidate],
        logs: Sequence[Tensor],
        stem: str,
    ) -> GapResult:
        """The result with the tokens of its choices, as they were scored."""
        if not result.choices:
            return result
        scored = {c.text: (c.tokens, own) for c, own in zip(candidates, logs, strict=True)}
        choices = []
        for choice in result.choices:
            ids, own = scored[choice.text]
            pieces = [self.tokenizer.decode([token]) for token in ids]
            tokens = scored_tokens(pieces, own.tolist(), stem)
            choices.append(replace(choice, tokens=tokens))
        return replace(result, choices=tuple(choices))

    def _unobjected(
        self, likely: list[Weighed], surroundings: Surroundings
    ) -> tuple[list[Weighed], tuple[Reason, str] | None]:
        """As many as are wanted to which nothing is objected, and the first objection.

        Only so many are asked about.
        """
        first: tuple[Reason, str] | None = None

        def passing(each: Weighed) -> bool:
            nonlocal first
            found = surroundings.objection(each.candidate.text, until=self.watch.until)
            if found is not None:
                first = first or (found.reason, found.why)
            return found is None

        ordered = sorted(likely, key=lambda each: not self._stays(each, likely[0]))
        return list(islice(filter(passing, ordered), self.plan.alternatives)), first

    def _stays(self, each: Weighed, best: Weighed) -> bool:
        is_shown = each.candidate.text == self.plan.shown
        return is_shown and each.confidence >= _STAYS * best.confidence


def _shorter(text: str) -> list[str]:
    """The first line, and the first two, of a longer text."""
    lines = text.split("\n")
    return ["\n".join(lines[:count]) for count in range(1, min(_SHORTER + 1, len(lines)))]
