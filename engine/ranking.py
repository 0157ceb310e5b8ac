"""Which fill is best, and how likely is it right? Judged by what is known of every candidate.

Two judges know different things. The encoder reads a few hundred tokens and says how likely a text
is before the suffix. A found text carries evidence: how many characters around the place it stood
at are equal to those here. A calibration, fitted once for a model on files it never saw, weighs
them; a model without one is ranked by likelihood alone.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from infilld.engine.errors import CheckpointMismatch

CALIBRATION = "calibration.json"
_SCHEMA = 2
# Equal characters beyond so many tell no more.
_MOST_EVIDENCE = 60.0
# Larger differences of log-probability tell no more.
_MOST_NATS = 20.0
# Signs and words behind which something has to follow.
_OPEN_END = re.compile(
    r"([=([{,.+\-*/%&|^<>~@]|\b(return|in|and|or|not|is|if|elif|while|for|import|from|as|with|raise"
    r"|yield|await|del|assert|lambda|def|class|async|global|nonlocal|except))\s*$"
)
# What the shyest setting asks for.
_SHY = 0.9


@dataclass(frozen=True)
class Candidate:
    """A text for a gap.

    Attributes:
        text: with LF line ends. tokens: of it.
        rows: share of the hypotheses that ended with it, in [0, 1].
        evidence: of a found draft with this text, in characters; else 0.
        is_causal: the encoder by itself would have written it.
    """

    text: str
    tokens: tuple[int, ...]
    rows: float = 0.0
    evidence: float = 0.0
    is_causal: bool = False


@dataclass(frozen=True)
class Weighed:
    """A candidate with the encoder's judgement.

    Attributes:
        candidate: what was judged. score: mean log-probability of its tokens and of the suffix
            tokens behind it, nats. features: by name, what a calibration weighs.
        confidence: estimated probability that it is right, in [0, 1].
    """

    candidate: Candidate
    score: float
    features: dict[str, float]
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How likely each candidate of a gap is right, or none of them: a softmax over all.

    Attributes:
        weights: of the features by name. bias: added to their sum; none of them has 0.
        show_above: confidence below which a fill is held back.
    """

    weights: dict[str, float]
    bias: float
    show_above: float

    @classmethod
    def from_folder(cls, folder: Path) -> "Calibration | None":
        """The calibration of a model folder; None where it has none.

        Raises:
            CheckpointMismatch: the file is not a calibration, or one of another kind.
        """
        path = folder / CALIBRATION
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != _SCHEMA:
                raise ValueError("it was fitted by another version")
            found = cls(**content)
            return cls(
                weights={name: float(weight) for name, weight in found.weights.items()},
                bias=float(found.bias),
                show_above=float(found.show_above),
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointMismatch(
                f"{path} is not a calibration of this version: {error}",
                remedy="Fit it anew: python -m infilld.engine.evaluation.calibrate MODEL_DIR",
            ) from error

    def save(self, folder: Path) -> None:
        """Write it into a model folder."""
        text = json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=2) + "\n"
        (folder / CALIBRATION).write_text(text, encoding="utf-8")

    def least_confidence(self, boldness: float | None) -> float:
        """Confidence below which a fill is held back.

        Args:
            boldness: 0 shows what is nearly certain, 1 everything, 0.5 or None as calibrated.
        """
        if boldness is None or boldness == 0.5:
            return self.show_above
        if boldness > 0.5:
            return self.show_above * 2 * (1 - boldness)
        return self.show_above + (_SHY - self.show_above) * (1 - 2 * boldness)

    def confidences(self, candidates: Sequence[Mapping[str, float]]) -> list[float]:
        """Probability that each candidate of one gap is right, by its features: in (0, 1)."""
        scores = [
            self.bias
            + sum(weight * features.get(name, 0.0) for name, weight in self.weights.items())
            for features in candidates
        ]
        most = max(0.0, *scores) if scores else 0.0
        none = math.exp(-most)
        shares = [math.exp(score - most) for score in scores]
        return [share / (none + sum(shares)) for share in shares]


def features_of(
    candidates: Sequence[Candidate], logs: Sequence[Tensor], place: Mapping[str, float]
) -> list[dict[str, float]]:
    """What is known of candidates, by itself and beside each other, each of about unit size.

    That no text is missing is another question than which text is: its features have names of
    their own, so that their weights are fitted for themselves.

    Args:
        candidates: for one gap.
        logs: for each, log-probabilities of its tokens, then of suffix tokens, nats.
        place: what is known of the gap, see `place_of`.

    Returns:
        For each the same names.
    """
    totals = [float(each.sum()) for each in logs]
    most = max(totals, default=0.0)
    whole = most + math.log(sum(math.exp(total - most) for total in totals)) if totals else 0.0
    suffixes = [
        float(each[len(candidate.tokens) :].sum())
        for candidate, each in zip(candidates, logs, strict=True)
    ]
    pairs = list(zip(candidates, suffixes, strict=True))
    bare = next((suffix for candidate, suffix in pairs if not candidate.text), None)
    found = []
    for candidate, each, total, suffix in zip(candidates, logs, totals, suffixes, strict=True):
        own = len(candidate.tokens)
        evidence = min(candidate.evidence, _MOST_EVIDENCE)
        # Of the probability that all of them have together, before the same suffix.
        share = max(-_MOST_NATS, total - whole) / 10
        gain = 0.0 if bare is None else max(-_MOST_NATS, min(_MOST_NATS, suffix - bare)) / 10
        text = {
            "fill_nats": float(each[:own].sum()) / 10,
            "suffix_nats": suffix / 10,
            "worst_nats": float(each[:own].min()) / 10 if own else 0.0,
            "tokens": own / 10,
            "rows": candidate.rows,
            "is_causal": float(candidate.is_causal),
            "is_found": float(evidence > 0),
            "evidence": evidence / 20,
            "strong_evidence": float(evidence >= 20),
            "share_nats": share,
            "suffix_gain": gain,
            "lines": candidate.text.count("\n") / 3,
            **place,
        }
        nothing = {
            "is_empty": 1.0,
            "empty_suffix_nats": suffix / 10,
            "empty_share_nats": share,
            **{f"empty_{name}": value for name, value in place.items()},
        }
        if candidate.text:
            found.append(text | dict.fromkeys(nothing, 0.0))
        else:
            found.append(dict.fromkeys(text, 0.0) | nothing)
    return found


def place_of(prefix: str, suffix: str) -> dict[str, float]:
    """What the text around a gap says of it: its kind, and whether something must follow.

    Args:
        prefix, suffix: with LF line ends.
    """
    line = prefix.rpartition("\n")[2]
    follows = suffix.partition("\n")[0]
    return {
        "in_line": float(bool(follows.strip())),
        "block": float(not line.strip() and not follows.strip()),
        "is_open": float(bool(_OPEN_END.search(line))),
        "in_word": float(bool(line) and (line[-1].isalnum() or line[-1] == "_")),
        "before_word": float(bool(follows) and (follows[0].isalnum() or follows[0] == "_")),
    }


def weigh(
    candidates: Sequence[Candidate],
    logs: Sequence[Tensor],
    calibration: Calibration | None,
    place: Mapping[str, float],
) -> list[Weighed]:
    """Candidates, the best first.

    Args:
        candidates: to be ranked.
        logs: for each, log-probabilities of its tokens and of the same suffix tokens behind it,
            nats.
        calibration: of the model; None: the likeliest comes first.
        place: what is known of the gap, see `place_of`.
    """
    known = features_of(candidates, logs, place)
    means = [float(each.mean()) if len(each) else 0.0 for each in logs]
    if calibration is None:
        confidences = [math.exp(mean) for mean in means]
    else:
        confidences = calibration.confidences(known)
    found = [Weighed(*each) for each in zip(candidates, means, known, confidences, strict=True)]
    if calibration is None:
        # No text at all is always the likeliest: only a calibration can say how likely.
        return sorted(
            found,
            key=lambda w: (
                not w.candidate.text,
                -(w.features["fill_nats"] + w.features["suffix_nats"]),
            ),
        )
    return sorted(found, key=lambda weighed: -weighed.confidence)
