"""`transformers` on the same checkpoint, for the bench to compare with.

It is the one place of the engine that imports it, and only when a comparison is asked for. Which
type of numbers, attention and experts it is fastest with depends on the machine, so they are
tried.
"""

import importlib.util
import math
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infilld.engine.errors import Unsupported

# A threshold that no canvas falls below, so that all steps are taken.
_NEVER_NATS = 1e-30
_TRIALS = 2


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How `transformers` computes: names as it takes them."""

    dtype: str = "float32"
    attention: str = "sdpa"
    experts: str = "grouped_mm"


# The first is where the search begins; then one thing is changed at a time.
_CHANGES = ({"dtype": "bfloat16"}, {"attention": "eager"}, {"experts": "eager"})


class Baseline:
    """A checkpoint as `transformers` runs it, with an encoded prefix.

    Args:
        folder: checkpoint. variant: how it computes. device: where.
        prefix: token ids [N] int64.

    Attributes:
        variant: as given.
    """

    def __init__(
        self, folder: Path, variant: Variant, device: torch.device, prefix: Tensor
    ) -> None:
        from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.variant, self._prefix = variant, prefix[None]
        loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder,
            dtype=getattr(torch, variant.dtype),
            attn_implementation=variant.attention,
            experts_implementation=variant.experts,
        )
        self._model = loaded.eval().to(device)
        # The cache of the encoder's keys is only read by passes.
        self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        with torch.inference_mode():
            self._model.model.encoder(input_ids=self._prefix, past_key_values=self._cache)

    @torch.inference_mode()
    def run(self, canvas: Tensor, belief: Tensor | None) -> Tensor:
        """One pass over canvases [R, L] behind the prefix: logits [R, L, V]."""
        logits: Tensor = self._model(
            decoder_input_ids=canvas,
            past_key_values=self._cache,
            self_conditioning_logits=belief,
        ).logits
        return logits

    def generate(self, tokens: int, steps: int) -> Tensor:
        """Continue the prefix, which is encoded anew, by canvases of `tokens` in all."""
        with warnings.catch_warnings():
            # It imports parts of torch that warn of their own end.
            warnings.simplefilter("ignore", DeprecationWarning)
            found: Tensor = self._model.generate(
                self._prefix,
                max_new_tokens=tokens,
                max_denoising_steps=steps,
                confidence_threshold=_NEVER_NATS,
            ).sequences
        return found

    def facts(self) -> dict[str, str]:
        """What it is, for a report."""
        return {"transformers": version("transformers"), **asdict(self.variant)}


def best_baseline(folder: Path, device: torch.device, prefix: Tensor, canvas: Tensor) -> Baseline:
    """The fastest variant in passes over a canvas [R, L] behind a prefix [N].

    Raises:
        Unsupported: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Unsupported(
            "transformers is not installed: there is nothing to compare with",
            remedy="pip install transformers==5.23.0, or leave the comparison out.",
        )
    best = Baseline(folder, Variant(), device, prefix)
    best_s = _pass_s(best, canvas)
    for change in _CHANGES:
        other = Baseline(folder, replace(best.variant, **change), device, prefix)
        if (other_s := _pass_s(other, canvas)) < best_s:
            best, best_s = other, other_s
        del other
    return best


def _pass_s(baseline: Baseline, canvas: Tensor) -> float:
    baseline.run(canvas, None)
    best = math.inf
    for _ in range(_TRIALS):
        started = time.perf_counter()
        # Moved to the host, so that a GPU's work is done.
        baseline.run(canvas, None).cpu()
        best = min(best, time.perf_counter() - started)
    return best
