"""Work that needs the model pass by pass, so that several pieces of it can share a pass.

A piece of work is a generator: it yields the passes it needs next and is sent their logits. What it
yields may be empty: then it only lets others have their turn.

    work ──passes──▶ driver ──▶ model.denoise_together ──logits──▶ work … ──▶ result
"""

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

from infilld.engine.model import CanvasPass, DiffusionGemma

T = TypeVar("T")

Work: TypeAlias = Generator[Sequence[CanvasPass], Sequence[Tensor], T]


def drive(model: DiffusionGemma, work: Work[T]) -> T:
    """Run a piece of work to its end, alone."""
    try:
        passes = next(work)
        while True:
            passes = work.send(model.denoise_together(passes) if passes else [])
    except StopIteration as end:
        result: T = end.value
        return result


def together(works: Sequence[Work[T]]) -> Work[list[T]]:
    """Several pieces of work side by side, their passes in one; results in the same order.

    When one of them raises, the others are closed.
    """
    results: dict[int, T] = {}
    wanted: dict[int, Sequence[CanvasPass]] = {}
    sent: dict[int, Sequence[Tensor] | None] = dict.fromkeys(range(len(works)))
    try:
        while sent:
            for number, logits in sent.items():
                try:
                    work = works[number]
                    wanted[number] = next(work) if logits is None else work.send(logits)
                except StopIteration as end:
                    wanted.pop(number, None)
                    results[number] = end.value
            if not wanted:
                break
            logits_of_all = iter((yield [each for passes in wanted.values() for each in passes]))
            sent = {
                number: [next(logits_of_all) for _ in passes] for number, passes in wanted.items()
            }
    finally:
        for work in works:
            work.close()
    return [results[number] for number in range(len(works))]
