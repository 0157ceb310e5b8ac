"""How jobs end: what their work came to, or nothing, with the reason."""

import logging
import time
from dataclasses import replace

import torch

from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.errors import InfilldError, NotEnoughMemory
from infilld.engine.request import InfillResult, Reason
from infilld.engine.rounds import Run
from infilld.engine.scheduler import AnyJob, AnyResult, Struck, Superseded

log = logging.getLogger(__name__)


def settled(run: Run, outcome: AnyResult | BaseException) -> AnyResult | BaseException:
    """The answer of a job that has run: its own times, and errors that can be told."""
    job = run.job
    if isinstance(outcome, AnyResult):
        timings = replace(
            outcome.timings,
            queue_ms=1e3 * (run.begun_at - job.arrived_at),
            total_ms=1e3 * (time.monotonic() - job.arrived_at),
        )
        return replace(outcome, id=job.id, timings=timings)
    if isinstance(outcome, Superseded):
        return superseded(job)
    if isinstance(outcome, Struck):
        return outcome
    if isinstance(outcome, torch.OutOfMemoryError):
        return NotEnoughMemory(str(outcome))
    if not isinstance(outcome, InfilldError):
        log.error("job %s failed", job.id, exc_info=outcome, extra={"job": job.id})
    return outcome


def nothing(job: AnyJob, reason: Reason, why: str) -> AnyResult:
    """No text, under the job's own id; of the kind that was asked for."""
    kind: type[InfillResult] | type[ChatResult] = (
        ChatResult if isinstance(job.request, ChatRequest) else InfillResult
    )
    return kind(id=job.id, seed=job.request.seed or 0, reason=reason, why=why)


def superseded(job: AnyJob) -> AnyResult:
    """The answer of a job that had to make way."""
    return nothing(job, "superseded", "A newer request for the same document took over.")
