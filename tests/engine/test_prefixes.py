"""The pool keeps the documents in use apart, and forgets what broke."""

from collections.abc import Callable

import pytest
import torch
from tiny_infill import tiny_config, tiny_model

from infilld.engine.passes import drive
from infilld.engine.prefixes import Prefix, PrefixPool

MODEL = tiny_model(tiny_config())


def encode(
    pool: PrefixPool, ids: list[int], check: Callable[[], None] = lambda: None
) -> tuple[Prefix, int]:
    return drive(MODEL, pool.encoding(ids, check))


def visit(pool: PrefixPool, ids: list[int]) -> int:
    """Encode and give back; how many were there already."""
    prefix, cached = encode(pool, ids)
    pool.give_back(prefix)
    return cached


def document(number: int, length: int = 40) -> list[int]:
    return [number] * length


def test_a_document_comes_back_to_its_own_prefix() -> None:
    pool = PrefixPool(MODEL)
    numbers = range(1, MODEL.most_prefixes + 1)
    for number in numbers:
        assert visit(pool, document(number)) == 0
    prefix, cached = encode(pool, document(2, 45))
    assert cached == 40
    assert prefix.cache.ids == tuple(document(2, 45))
    pool.give_back(prefix)
    # The least recently used one made room for one more.
    visit(pool, document(numbers[-1] + 1))
    assert visit(pool, document(3)) == 40
    assert visit(pool, document(1)) == 0


def test_who_finds_all_in_use_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infilld.engine.model.MOST_PREFIXES", 2)
    pool = PrefixPool(MODEL)
    held = [encode(pool, document(number))[0] for number in (1, 2)]
    third = pool.encoding(document(3))
    for _ in range(3):
        assert next(third) == []
        assert [prefix.cache.tokens for prefix in held] == [40, 40]
    pool.give_back(held[0])
    prefix, _ = drive(MODEL, third)
    assert prefix.cache is held[0].cache
    assert prefix.cache.ids == tuple(document(3))


def test_who_waits_longest_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infilld.engine.model.MOST_PREFIXES", 1)
    pool = PrefixPool(MODEL)
    held, _ = encode(pool, document(1))
    assert not pool.is_awaited
    second, third, fourth = (pool.encoding(document(number)) for number in (2, 3, 4))
    for work in (second, third, fourth):
        assert next(work) == []
    assert pool.is_awaited
    # Who gives up loses its place.
    second.close()
    pool.give_back(held)
    assert next(fourth) == []
    prefix, _ = drive(MODEL, third)
    assert prefix.cache.ids == tuple(document(3))
    pool.give_back(prefix)
    assert drive(MODEL, fourth)[0].cache.ids == tuple(document(4))
    assert not pool.is_awaited


def test_what_a_check_interrupts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infilld.engine.prefixes._CPU_PIECE_TOKENS", 16)
    pool = PrefixPool(MODEL)
    calls = iter(range(9))

    def check() -> None:
        if next(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        encode(pool, document(1), check)
    assert visit(pool, document(1)) == 32


def test_running_out_of_memory_forgets_the_prefix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PrefixPool(MODEL)
    visit(pool, document(1))
    visit(pool, document(2))
    asked = iter(range(99))
    allocate = torch.Tensor.new_empty

    def scarce(tensor: torch.Tensor, *size: int) -> torch.Tensor:
        # The second of a layer's two: the keys have grown, the values cannot.
        if next(asked) == 1:
            raise torch.OutOfMemoryError("no more")
        return allocate(tensor, *size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            visit(pool, document(1, 400))
    assert visit(pool, document(1, 400)) == 0
    assert visit(pool, document(2)) == 40


def test_who_uses_a_prefix_has_it_alone() -> None:
    pool = PrefixPool(MODEL)
    mine, _ = encode(pool, document(1))
    yours, cached = encode(pool, document(1))
    assert mine.cache is not yours.cache
    assert cached == 0
    pool.give_back(mine)
    assert visit(pool, document(1, 41)) == 40
    pool.give_back(yours)


def test_work_that_is_given_up_gives_its_prefix_back() -> None:
    pool = PrefixPool(MODEL)
    work = pool.encoding(document(1))
    next(work)
    work.close()
    assert visit(pool, document(1)) == 40


def test_the_last_hidden_state_is_that_of_the_prompts_end() -> None:
    pool = PrefixPool(MODEL)
    for ids in (document(1), document(1), document(1, 30)):
        prefix, _ = encode(pool, ids)
        expected = MODEL.encode(torch.tensor(ids), MODEL.new_cache())[-1]
        torch.testing.assert_close(prefix.last_hidden, expected, atol=1e-5, rtol=1e-4)
        pool.give_back(prefix)
