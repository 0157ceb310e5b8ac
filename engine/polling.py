"""What the host gets to see of a step that the device may still be computing.

On a CPU a step is done when its call returns. A GPU is behind: asking it for a number makes the
host wait, and the GPU then waits for the host. So numbers are copied behind the step, and looked
at while the next step runs. A stop is seen one step late; that step changes no result.
"""

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Polled(Generic[T]):
    """Copies of small tensors, each with what belongs to it.

    Args:
        device: where the tensors are.
        lag: how many of the newest are not looked at yet; None: 1 on a GPU, 0 on a CPU.
    """

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        self._is_behind = device.type == "cuda"
        self._lag = int(self._is_behind) if lag is None else lag
        self._waiting: deque[tuple[T, tuple[Tensor, ...], torch.cuda.Event | None]] = deque()

    def push(self, what: T, *tensors: Tensor) -> None:
        """Begin to copy tensors to the host."""
        if not self._is_behind:
            self._waiting.append((what, tensors, None))
            return
        copies = tuple(
            torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(
                each, non_blocking=True
            )
            for each in tensors
        )
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._waiting.append((what, copies, copied))

    def seen(self, *, is_last: bool = False) -> list[tuple[T, tuple[Tensor, ...]]]:
        """What can be looked at now, oldest first: all but the newest, where there is a lag.

        Args:
            is_last: no step follows: the newest too.
        """
        kept = 0 if is_last else self._lag
        found = []
        while len(self._waiting) > kept:
            what, tensors, copied = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            found.append((what, tensors))
        return found
