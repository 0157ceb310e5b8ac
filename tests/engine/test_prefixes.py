"""The pool keeps the documents in use apart, and forgets what broke."""

import pytest
import torch
from tiny_infill import tiny_config, tiny_model

from infilld.engine.prefixes import PrefixPool

MODEL = tiny_model(tiny_config())


def document(number: int, length: int = 40) -> list[int]:
    return [number] * length


def test_a_document_comes_back_to_its_own_prefix() -> None:
    pool = PrefixPool(MODEL)
    for number in (1, 2, 3, 4):
        assert pool.encode(document(number))[1] == 0
    cache, cached = pool.encode(document(2, 45))
    assert cached == 40
    assert cache.ids == tuple(document(2, 45))
    # The least recently used one made room for the fifth.
    pool.encode(document(5))
    assert pool.encode(document(3))[1] == 40
    assert pool.encode(document(1))[1] == 0


def test_what_a_check_interrupts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infilld.engine.model.ENCODE_CHUNK_TOKENS", 16)
    pool = PrefixPool(MODEL)
    calls = iter(range(9))

    def check() -> None:
        if next(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pool.encode(document(1), check)
    assert pool.encode(document(1))[1] == 32


def test_running_out_of_memory_forgets_the_prefix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PrefixPool(MODEL)
    pool.encode(document(1))
    pool.encode(document(2))
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
            pool.encode(document(1, 90))
    assert pool.encode(document(1, 90))[1] == 0
    assert pool.encode(document(2))[1] == 40
