"""The model comes and goes: dropped while idle or when told to, switched to another."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worker_at_work import WAIT_S, Gate, Loads, request, texts_of

from infilld.engine import resident
from infilld.engine.errors import (
    Busy,
    Cancelled,
    CheckpointMissing,
    Loading,
    ModelError,
    NotEnoughMemory,
)
from infilld.engine.loading import refuse_unfit, starter_folder
from infilld.engine.worker import Worker


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


@pytest.fixture
def idler(loads: Loads) -> Iterator[Worker]:
    """A worker whose model was unloaded; the next load is begun only when it is let to."""
    made = Worker(Path("tiny"), idle_unload_minutes=0.05 / 60)
    made.start()
    made.wait_ready(WAIT_S)
    assert loads.freed.wait(WAIT_S)
    loads.begun.clear()
    loads.freed.clear()
    loads.open.clear()
    yield made
    loads.open.set()
    made.close()


def test_an_idle_model_is_dropped_and_loaded_again(loads: Loads) -> None:
    worker = Worker(Path("tiny"), idle_unload_minutes=0.05 / 60)
    worker.start()
    worker.wait_ready(WAIT_S)
    job = worker.submit(request())
    first = job.future.result(WAIT_S)
    engine = worker._resident.engine
    model = None if engine is None else weakref.ref(engine.model)
    del engine
    assert loads.freed.wait(WAIT_S)
    assert model is None or model() is None
    told = worker.describe()
    assert (worker.state, told["state"], told["memory_bytes"]) == ("unloaded", "unloaded", 0)
    assert told["canvas_tokens"] == 128
    again = worker.submit(request()).future.result(WAIT_S)
    assert texts_of(again) == texts_of(first)
    assert worker.stats()["loads"] == len(loads.folders) == 2
    assert again.timings.queue_ms > 0
    worker.close()


def test_a_job_waits_for_the_model_to_be_loaded_again(idler: Worker, loads: Loads) -> None:
    job = idler.submit(request())
    assert loads.begun.wait(WAIT_S)
    assert (idler.state, job.future.done()) == ("unloaded", False)
    loads.open.set()
    assert job.future.result(WAIT_S).reason in ("ok", "empty")


def test_a_deadline_strikes_while_the_model_is_loaded_again(idler: Worker, loads: Loads) -> None:
    job = idler.submit(request(deadline_ms=20))
    assert job.future.result(WAIT_S).reason == "deadline"
    assert not loads.open.is_set()


def test_a_job_is_cancelled_while_the_model_is_loaded_again(idler: Worker, loads: Loads) -> None:
    job = idler.submit(request())
    assert loads.begun.wait(WAIT_S)
    job.cancel()
    with pytest.raises(Cancelled):
        job.future.result(0)


def test_closing_while_the_model_is_loaded_again_answers_at_once(
    idler: Worker, loads: Loads
) -> None:
    job = idler.submit(request())
    assert loads.begun.wait(WAIT_S)
    closing = threading.Thread(target=idler.close)
    closing.start()
    with pytest.raises(Cancelled):
        job.future.result(WAIT_S)
    loads.open.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_a_model_that_cannot_be_loaded_again_is_tried_at_the_next_request(
    idler: Worker, loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loads.failures["tiny"] = NotEnoughMemory("somebody else has it")
    loads.open.set()
    with pytest.raises(NotEnoughMemory):
        idler.submit(request()).future.result(WAIT_S)
    assert f"tiny is not loaded: somebody else has it. {NotEnoughMemory.remedy}" in caplog.messages
    loads.failures.clear()
    assert idler.submit(request()).future.result(WAIT_S).reason in ("ok", "empty")
    assert caplog.messages[-1].startswith("tiny is loaded, ")


def test_only_large_models_of_a_gpu_are_dropped_unless_told() -> None:
    def after_s(device: str, gib: float, wish: Any) -> float:
        model = SimpleNamespace(device=torch.device(device), nbytes=int(gib * 2**30))
        return resident._idle_s(SimpleNamespace(model=model), wish)  # type: ignore[arg-type]

    assert after_s("cpu", 40, "auto") == after_s("cuda", 0.9, "auto") == 0
    assert after_s("cuda", 1, "auto") == 15 * 60
    assert after_s("cpu", 0.1, 2.0) == 120
    assert after_s("cuda", 40, 0.0) == 0


# Another model, without a restart.


@pytest.fixture
def worker(loads: Loads) -> Iterator[Worker]:
    made = Worker(Path("tiny"))
    made.start()
    made.wait_ready(WAIT_S)
    yield made
    loads.open.set()
    made.close()


def switched(worker: Worker) -> dict[str, object]:
    """What the worker says of itself when the switch has ended."""
    with worker._wake:
        assert worker._wake.wait_for(lambda: not worker._resident.is_switching, WAIT_S)
    return worker.describe()


def test_another_model_takes_the_place_of_one_that_is_gone(worker: Worker, loads: Loads) -> None:
    job = worker.submit(request())
    assert job.future.result(WAIT_S).reason in ("ok", "empty")
    worker.switch(Path("other"))
    told = switched(worker)
    assert (told["model"], told["state"], "switch_failure" in told) == ("other", "ready", False)
    assert worker.model_name == "other"
    # The old weights were gone before the new ones came.
    assert (loads.folders, loads.alive) == (["tiny", "other"], [0, 0])
    assert worker.submit(request()).future.result(WAIT_S).reason in ("ok", "empty")


def test_who_is_live_ends_with_the_old_model_and_who_waits_gets_the_new_one(
    worker: Worker, loads: Loads
) -> None:
    gate, old = Gate(), worker._resident.engine
    live = [worker.submit(request(), gate), worker.submit(request(background=True))]
    assert gate.reached.wait(WAIT_S)
    worker.switch(Path("other"))
    waiting = worker.submit(request())
    told = worker.describe()
    assert (told["model"], told["state"], told["switching_to"]) == ("tiny", "switching", "other")
    # Nobody is sent away: neither with an error now, nor by what says whether requests are served.
    assert (worker.state, worker.stats()["switching"]) == ("ready", True)
    with pytest.raises(Busy, match="other is being loaded already"):
        worker.switch(Path("third"))
    assert (loads.folders, worker._resident.engine is old) == (["tiny"], True)
    del old
    loads.open.clear()
    loads.begun.clear()
    gate.open.set()
    assert live[0].future.result(WAIT_S).reason in ("ok", "empty")
    assert loads.begun.wait(WAIT_S)
    assert worker._resident.engine is None
    assert not waiting.future.done()
    loads.open.set()
    assert waiting.future.result(WAIT_S).reason in ("ok", "empty")
    assert live[1].future.result(WAIT_S).reason in ("ok", "empty")
    assert switched(worker)["model"] == "other"


def test_the_background_that_is_live_ends_before_a_switch_though_others_wait(
    worker: Worker,
) -> None:
    gate = Gate()
    behind = worker.submit(request(background=True), gate)
    assert gate.reached.wait(WAIT_S)
    worker.switch(Path("other"))
    real = worker.submit(request())
    gate.open.set()
    for job in (behind, real):
        assert job.future.result(WAIT_S).reason in ("ok", "empty")
    assert switched(worker)["model"] == "other"


def test_a_checkpoint_that_cannot_be_used_costs_nobody_the_model_they_have(
    worker: Worker, loads: Loads
) -> None:
    loads.unfit["typo"] = CheckpointMissing("typo: no such folder", remedy="Look for it.")
    engine = worker._resident.engine
    worker.switch(Path("typo"))
    told = switched(worker)
    assert (told["model"], told["state"]) == ("tiny", "ready")
    assert told["switch_failure"] == "typo: no such folder. Look for it."
    assert worker._resident.engine is engine
    assert loads.folders == ["tiny"]
    # The next switch says nothing of it any more.
    worker.switch(None)
    assert "switch_failure" not in worker.describe()
    assert switched(worker)["model"] == "starter"


def test_a_model_that_does_not_load_gives_way_to_the_one_before(
    worker: Worker, loads: Loads
) -> None:
    loads.failures["large"] = NotEnoughMemory("large needs 80 GB")
    gate = Gate()
    live = worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    worker.switch(Path("large"))
    waiting = worker.submit(request())
    gate.open.set()
    assert live.future.result(WAIT_S).reason in ("ok", "empty")
    assert waiting.future.result(WAIT_S).reason in ("ok", "empty")
    told = switched(worker)
    assert (told["model"], told["state"]) == ("tiny", "ready")
    assert told["switch_failure"] == f"large needs 80 GB. {NotEnoughMemory.remedy}"
    # What failed is no reason to keep anything of it in memory.
    assert loads.failures["large"].__traceback__ is None
    assert loads.alive == [0, 0, 0]


def test_who_waits_is_told_when_neither_model_can_be_loaded(worker: Worker, loads: Loads) -> None:
    loads.failures["large"] = NotEnoughMemory("large needs 80 GB")
    loads.failures["tiny"] = NotEnoughMemory("somebody else has it")
    loads.open.clear()
    worker.switch(Path("large"))
    waiting = worker.submit(request())
    loads.open.set()
    with pytest.raises(NotEnoughMemory, match="somebody else"):
        waiting.future.result(WAIT_S)
    assert switched(worker)["state"] == "unloaded"
    loads.failures.clear()
    assert worker.submit(request()).future.result(WAIT_S).reason in ("ok", "empty")
    assert worker.model_name == "tiny"


def test_the_same_checkpoint_is_read_anew(worker: Worker, loads: Loads) -> None:
    worker.switch(Path("tiny"))
    assert switched(worker)["model"] == "tiny"
    assert loads.folders == ["tiny", "tiny"]


def test_a_switch_mends_a_worker_whose_model_never_came(loads: Loads) -> None:
    loads.failures["gone"] = loads.unfit["worse"] = CheckpointMissing("gone")
    worker = Worker(Path("gone"))
    worker.start()
    with pytest.raises(CheckpointMissing):
        worker.wait_ready(WAIT_S)
    worker.switch(Path("worse"))
    assert switched(worker)["state"] == "failed"
    with pytest.raises(CheckpointMissing):
        worker.submit(request())
    loads.open.clear()
    worker.switch(Path("other"))
    waiting = worker.submit(request())
    loads.open.set()
    assert waiting.future.result(WAIT_S).reason in ("ok", "empty")
    assert (worker.state, worker.failure, worker.model_name) == ("ready", None, "other")
    worker.wait_ready(WAIT_S)
    worker.close()


def test_a_deadline_strikes_and_a_client_goes_during_a_switch(worker: Worker, loads: Loads) -> None:
    loads.open.clear()
    worker.switch(Path("other"))
    late, gone = worker.submit(request(deadline_ms=20)), worker.submit(request())
    assert late.future.result(WAIT_S).reason == "deadline"
    gone.cancel()
    with pytest.raises(Cancelled):
        gone.future.result(0)


def test_a_switch_that_is_asked_for_while_the_first_model_loads_comes_after_it(
    loads: Loads,
) -> None:
    loads.open.clear()
    worker = Worker(Path("tiny"))
    worker.start()
    worker.switch(Path("other"))
    with pytest.raises(Loading):
        worker.submit(request())
    loads.open.set()
    assert switched(worker)["model"] == "other"
    worker.close()
    with pytest.raises(Busy):
        worker.switch(None)


def test_a_worker_that_broke_is_not_switched(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise SystemError("no more")

    monkeypatch.setattr(worker._rounds, "_step", broken)
    with pytest.raises(ModelError, match="broke"):
        worker.submit(request()).future.result(WAIT_S)
    with pytest.raises(ModelError, match="broke"):
        worker.switch(None)


def test_memory_is_given_back_when_told_to_once_no_job_is_open(
    worker: Worker, loads: Loads
) -> None:
    gate = Gate()
    job = worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    loads.freed.clear()
    worker.unload()
    assert not loads.freed.is_set()
    gate.open.set()
    assert job.future.result(WAIT_S).reason in ("ok", "empty")
    assert loads.freed.wait(WAIT_S)
    told = worker.describe()
    assert (told["state"], told["memory_bytes"]) == ("unloaded", 0)
    # Of a model that is gone already nothing is left to give, neither now nor after the next job.
    worker.unload()
    for _ in range(2):
        assert worker.submit(request()).future.result(WAIT_S).reason in ("ok", "empty")
    assert worker.stats()["loads"] == 2


def test_all_but_the_weights_is_looked_at(tmp_path: Path) -> None:
    refuse_unfit(starter_folder(), "cpu")
    with pytest.raises(CheckpointMissing):
        refuse_unfit(tmp_path / "nowhere", "cpu")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_bytes((starter_folder() / name).read_bytes())
    with pytest.raises(CheckpointMissing):
        refuse_unfit(tmp_path, "cpu")
