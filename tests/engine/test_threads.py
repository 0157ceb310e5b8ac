"""One thread where others do not pay, and another try after a while."""

import time
from collections.abc import Iterator

import pytest
import torch

from infilld.engine import threads
from infilld.engine.threads import Threads


class Clocks:
    """A wall clock, and processor time that runs `share` times as fast."""

    def __init__(self) -> None:
        self.now, self.used, self.share = 0.0, 0.0, 2.0

    def work(self) -> int:
        """A second of it; returns how many threads it was given."""
        self.now += 1.0
        self.used += self.share
        return torch.get_num_threads()


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    made, before = Clocks(), torch.get_num_threads()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(time, "process_time", lambda: made.used)
    monkeypatch.setattr(threads, "ALONE_S", 3.0)
    torch.set_num_threads(2)
    yield made
    torch.set_num_threads(before)


def test_all_threads_while_they_pay(clocks: Clocks) -> None:
    chooser = Threads()
    assert [chooser.run(32, clocks.work) for _ in range(5)] == [2] * 5


def test_one_where_they_do_not_and_another_try_later(clocks: Clocks) -> None:
    chooser, clocks.share = Threads(), 1.1
    assert [chooser.run(32, clocks.work) for _ in range(9)] == [2, 2, 1, 1, 1, 2, 1, 1, 1]
    clocks.share = 1.9
    assert [chooser.run(32, clocks.work) for _ in range(4)] == [2] * 4
    assert torch.get_num_threads() == 2


def test_one_slow_pass_decides_nothing(clocks: Clocks) -> None:
    chooser, given = Threads(), []
    for clocks.share in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0):
        given.append(chooser.run(32, clocks.work))
    assert given == [2] * 6


def test_sizes_are_judged_apart(clocks: Clocks) -> None:
    chooser, clocks.share = Threads(), 1.0
    for _ in range(3):
        chooser.run(20, clocks.work)
    assert chooser.run(31, clocks.work) == 1
    assert chooser.run(64, clocks.work) == 2


def test_what_fails_leaves_the_number_of_threads(clocks: Clocks) -> None:
    chooser, clocks.share = Threads(), 1.0
    for _ in range(2):
        chooser.run(1, clocks.work)

    def fail() -> None:
        assert torch.get_num_threads() == 1
        raise MemoryError

    with pytest.raises(MemoryError):
        chooser.run(1, fail)
    assert torch.get_num_threads() == 2


def test_one_core_is_left_alone(clocks: Clocks) -> None:
    torch.set_num_threads(1)
    chooser, clocks.share = Threads(), 1.0
    assert [chooser.run(1, clocks.work) for _ in range(4)] == [1] * 4
