"""Which fill is best, and how likely is it right? Judged by what is known of every candidate.

Two judges know different things. The encoder reads a few hundred tokens and says how likely a text
is before the suffix. A found text carries evidence: how many characters around the place it stood
at are equal to those here. A calibration, fitted once for a model on files it never saw, weighs
them; a model without one is ranked by likelihood alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from infilld.engine.errors import CheckpointMismatch

CALIBRATION = "calibration.json"
# Equal characters beyond so many tell no more.
_MOST_EVIDENCE = 60.0
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
    """A logistic model of being right.

    Attributes:
        weights: of the features by name. bias: added to their sum.
        show_above: confidence below which a fill is held back.
    """

    weights: dict[str, float]
    bias: float
    show_above: float

    @classmethod
    def from_folder(cls, folder: Path) -> "Calibration | None":
        """The calibration of a model folder; None where it has none.

        Raises:
            CheckpointMismatch: the file is not a calibration.
        """
        path = folder / CALIBRATION
        if not path.exists():
            return None
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            return cls(
                weights={name: float(weight) for name, weight in found.weights.items()},
                bias=float(found.bias),
                show_above=float(found.show_above),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointMismatch(f"{path} is not a calibration: {error}") from error

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

    def confidence(self, features: dict[str, float]) -> float:
        """Probability of being right, in (0, 1)."""
        total = self.bias
        for name, weight in self.weights.items():
            total += weight * features.get(name, 0.0)
        return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, total))))


def features_of(candidate: Candidate, logs: Tensor) -> dict[str, float]:
    """What is known of a candidate, each of about unit size.

    Args:
        candidate: a fill. logs: log-probabilities of its tokens, then of suffix tokens, nats.
    """
    own = len(candidate.tokens)
    evidence = min(candidate.evidence, _MOST_EVIDENCE)
    return {
        "fill_nats": float(logs[:own].sum()) / 10,
        "suffix_nats": float(logs[own:].sum()) / 10,
        "worst_nats": float(logs[:own].min()) / 10 if own else 0.0,
        "tokens": own / 10,
        "is_empty": float(not candidate.text),
        "rows": candidate.rows,
        "is_causal": float(candidate.is_causal),
        "is_found": float(evidence > 0),
        "evidence": evidence / 20,
        "strong_evidence": float(evidence >= 20),
    }


def weigh(
    candidates: Sequence[Candidate],
    logs: Sequence[Tensor],
    calibration: Calibration | None,
) -> list[Weighed]:
    """Candidates, the best first.

    Args:
        candidates: to be ranked.
        logs: for each, log-probabilities of its tokens and of the same suffix tokens behind it,
            nats.
        calibration: of the model; None: the likeliest comes first.
    """
    found = []
    for candidate, each in zip(candidates, logs, strict=True):
        features = features_of(candidate, each)
        mean = float(each.mean()) if len(each) else 0.0
        confidence = math.exp(mean) if calibration is None else calibration.confidence(features)
        found.append(Weighed(candidate, mean, features, confidence))
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
