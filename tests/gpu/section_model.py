"""The random model in the engine's own runner: memory, passes, fills, experts, kernels by name."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from notes import Notes, is_device_lost, told
from peaks import peak_of
from plan import Machine, Plan
from random_model import Form, RandomWeights, weight_bytes
from timing import finish, is_cuda, steady, walls
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import LayerKind, SamplerConfig
from infilld.engine.device_runner import DeviceRunner
from infilld.engine.draws import SeededDraws
from infilld.engine.memory import plan_memory
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask
from infilld.engine.sampler import Denoised, denoise
from infilld.engine.stopping import AllOf

_KERNELS_SHOWN = 25
# What the engine reads at once, and what it reads while somebody types.
_PIECE_TOKENS, _SMALLER_PIECE_TOKENS = 512, 128


def measure(notes: Notes, plan: Plan, machine: Machine, form: Form, *, brief: bool = False) -> None:
    """All of it; `brief`: memory and the two passes that have aims."""
    bench = _Bench.built(notes, plan, machine, form)
    bench.reach(plan.home)
    first, second = plan.canvases[:2]
    for length in (first, second):
        bench.step_pass(length, plan.home)
    if not brief:
        notes.run("forced passes", bench.forced)
        notes.run("fills", bench.fills)
        for length in (first, second):
            name = f"experts, a canvas of {length}"
            notes.run(name, partial(bench.experts, length, plan.home))
        for length in (first, second):
            notes.run(f"kernels of a pass over {length}", partial(bench.kernels, length))
        for length in plan.canvases[2:]:
            bench.step_pass(length, plan.home)
        for rows in plan.side_by_side:
            bench.step_pass(second, plan.home, rows=rows)
    longer = [tokens for tokens in plan.prefixes if tokens > plan.home]
    for tokens in longer if not brief else longer[-1:]:
        if notes.left_s < 5:
            break
        bench.reach(tokens)
        for length in plan.canvases[:2] if brief else plan.canvases:
            bench.step_pass(length, tokens)
    # Before anything is cut back: the whole context is held now, or as much as there was time for.
    notes.run("memory in the end", bench.memory_in_the_end, needs_s=0.0)
    if brief:
        return
    for tokens in (tokens for tokens in plan.prefixes if tokens < plan.home):
        if notes.left_s < 5:
            break
        bench.anew(tokens)
        for length in plan.canvases:
            bench.step_pass(length, tokens)
    notes.run("pieces of a prompt", bench.pieces)


@dataclass
class _Bench:
    """A runner over random weights, and one prefix in it."""

    notes: Notes
    plan: Plan
    machine: Machine
    runner: DeviceRunner
    cache: PrefixCache
    form: Form

    @classmethod
    def built(cls, notes: Notes, plan: Plan, machine: Machine, form: Form) -> "_Bench":
        """Make the weights and the runner; note what was planned and what they took."""
        config, device = plan.config, machine.device
        planned = plan_memory(
            config,
            weight_bytes(config, form),
            on_gpu=is_cuda(device),
            context_tokens=plan.prefixes[-1],
            slots=1,
        )
        for name, count, remark in planned.rows:
            notes.row("memory planned", what=name, bytes=count, remark=remark)
        notes.row("memory planned", what="total", bytes=planned.total_bytes, remark="")
        started = time.perf_counter()
        weights = RandomWeights(config, form, device)
        runner = DeviceRunner(
            config,
            weights,
            device=device,
            dtype=machine.dtype,
            impl=machine.impl,
            slots=1,
            context_tokens=plan.prefixes[-1],
        )
        finish(device)
        notes.row(
            "built",
            form=form,
            parameters=runner.parameter_count,
            seconds=round(time.perf_counter() - started, 2),
            weights_bytes=runner.nbytes,
            planned_weights_bytes=planned.weights.total,
            key_value_bytes=runner.slab.nbytes,
            planned_key_value_bytes=planned.key_value_bytes,
            **_device_memory(device, "loading"),
        )
        assert not len(weights), f"weights that nobody took: {list(weights)}"
        return cls(notes, plan, machine, runner, runner.new_cache(), form)

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.machine.device

    def few(self, repeats: int) -> int:
        """So many, or as many as are wanted of anything."""
        return min(repeats, self.plan.repeats)

    # Prefixes.

    def reach(self, tokens: int) -> None:
        """Encode up to so many tokens, piece by piece, and note how long each took.

        What fails is noted: the passes are then measured behind the prefix that there is.
        """
        for most in (_PIECE_TOKENS, _SMALLER_PIECE_TOKENS):
            try:
                self._encode_to(tokens, most)
            except Exception as error:
                traceback.print_exc()
                if is_device_lost():
                    raise
                self.notes.row(
                    "prefixes that failed", tokens=tokens, pieces_of=most, error=told(error)
                )
            else:
                return

    def _encode_to(self, tokens: int, most: int) -> None:
        while self.cache.tokens < tokens:
            start = self.cache.tokens
            count = min(most, tokens - start)
            ids = self.ids(1, count, seed=start)[0].cpu()
            finish(self.device)
            began = time.perf_counter()
            self.runner.encode(ids, self.cache)
            finish(self.device)
            took = time.perf_counter() - began
            self.notes.row(
                "prefill",
                behind=start,
                tokens=count,
                ms=round(1e3 * took, 3),
                tokens_per_s=round(count / took, 1),
            )

    def anew(self, tokens: int) -> None:
        """A shorter prefix than there is."""
        self.cache.trim(0)
        self.reach(tokens)

    def settle(self, tokens: int) -> None:
        """Take back what a step that failed may have left behind the prefix."""
        if self.cache.tokens > tokens and self.cache.trim(tokens) != tokens:
            self.anew(tokens)

    def ids(self, rows: int, tokens: int, seed: int) -> Tensor:
        """Token ids [R, L] int64 on the device."""
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.plan.config.vocab_tokens, (rows, tokens), generator=draw)
        return drawn.to(self.device)

    # Passes.

    def told(self, canvas: Tensor) -> CanvasPass:
        """A pass that is told what one before it believed, as all but the first are."""
        ask = Ask(
            temperature=torch.tensor(0.8),
            top=self.runner.belief_tokens,
            draws=SeededDraws(0, self.device),
        )
        (first,) = self.runner.run([CanvasPass(canvas, self.cache, None, ask)])
        return CanvasPass(canvas, self.cache, first.belief, ask)

    def step_pass(self, length: int, prefix: int, rows: int = 1) -> None:
        """Time a pass, as a step."""
        beside = f" x {rows}" if rows > 1 else ""
        name = f"pass over {length}{beside} behind {prefix}"
        self.notes.run(name, partial(self.time_pass, length, prefix, rows))

    def time_pass(self, length: int, prefix: int, rows: int) -> None:
        """The engine's call, the device's part of it, and the host's; against its floor."""
        self.settle(prefix)
        prefix = self.cache.tokens
        each = self.told(self.ids(rows, length, seed=length))
        run = partial(self.runner.run, [each])
        called = steady(run, self.device, repeats=self.plan.repeats)
        issued = walls(run, self.device, repeats=self.few(8), waits=False)
        replayed = steady(self._bucket(length, rows), self.device, repeats=self.plan.repeats)
        touched = self.runner.experts_touched(each)
        floor = self.floor(rows, length, prefix, touched)
        self.notes.row(
            "passes",
            rows=rows,
            canvas=length,
            prefix=prefix,
            ms=called.ms,
            p20_ms=called.p20_ms,
            p80_ms=called.p80_ms,
            device_ms=replayed.ms,
            host_ms=issued.ms,
            experts=round(sum(touched) / len(touched), 2),
            **floor,
            of_floor=round(floor["floor_ms"] / called.ms, 3) if floor["floor_ms"] else None,
        )

    def _bucket(self, length: int, rows: int) -> Callable[[], object]:
        """The device's part of a pass alone: of the smallest bucket that it fits."""
        found = self.runner._captured
        sizes = {
            (key[1], key[2]): key
            for key in found
            if key[0] == "canvas" and _whole(key[1]) >= rows and _whole(key[2]) >= length
        }
        return found[sizes[min(sizes)]].run

    def floor(self, rows: int, length: int, prefix: int, touched: list[int]) -> dict[str, Any]:
        """Bytes a pass must read, operations it must do, and the longer of both at the peak."""
        config, stack = self.plan.config, self.runner.stack
        of_experts = [
            layer.experts_gate_up.nbytes + layer.experts_down.nbytes for layer in stack.layers
        ]
        read = self.runner.nbytes - sum(of_experts)
        read += sum(
            size * count // config.experts for size, count in zip(of_experts, touched, strict=True)
        )
        sees: dict[LayerKind, int] = {
            "full": prefix,
            "sliding": min(prefix, config.sliding_window - 1),
        }
        held = self.runner.slab.keys[0].element_size()
        tokens = rows * length
        operations = 0
        for kind in config.layer_kinds:
            heads, size = config.heads, config.head_sizes[kind]
            read += 2 * rows * sees[kind] * config.key_heads[kind] * size * held
            operations += 4 * tokens * (sees[kind] + length) * heads * size
        expert = 3 * config.width * config.expert_width
        all_experts = config.layers * config.experts * expert
        chosen = config.layers * config.experts_per_token * expert
        operations += 2 * tokens * (self.runner.parameter_count - all_experts + chosen)
        peak = peak_of(self.device)
        floor_s = max(read / peak.bytes_per_s, operations / peak.operations_per_s) if peak else None
        return {
            "read_bytes": read,
            "operations": operations,
            "floor_ms": round(1e3 * floor_s, 3) if floor_s else None,
        }

    # Whole canvases.

    def forced(self) -> None:
        """Canvases that never stop early, each committed, as other engines are measured."""
        passes = self.plan.forced_passes
        self.settle(self.plan.home)
        for length in self.plan.canvases[:2]:
            denoised = walls(
                partial(self.denoised, length, passes), self.device, repeats=self.few(5)
            )
            tokens = self.denoised(length, passes).tokens[0]
            home = self.cache.tokens
            committed = walls(partial(self._commit, tokens), self.device, repeats=self.few(5))
            total = denoised.ms + committed.ms
            self.notes.row(
                "forced passes",
                canvas=length,
                prefix=home,
                passes=passes,
                denoise_ms=denoised.ms,
                ms_a_pass=round(denoised.ms / passes, 3),
                commit_ms=committed.ms,
                tokens_per_s=round(1e3 * length / total, 1),
            )

    def _commit(self, tokens: Tensor) -> None:
        before = self.cache.tokens
        self.runner.encode(tokens, self.cache)
        if self.cache.trim(before) != before:
            raise RuntimeError("the prefix could not be cut back")

    def denoised(self, length: int, passes: int) -> Denoised:
        """A canvas of so many passes, from noise, by the engine's own loop."""
        draws = SeededDraws(0, self.device)
        config = SamplerConfig(max_steps=passes)
        canvas = draws.first_canvas(1, length, self.plan.config.vocab_tokens)
        return denoise(self.runner, self.cache, canvas, config, draws, stop=AllOf(()))

    def fills(self) -> None:
        """From a few typed tokens to a fill's tokens on the host, the prefix being warm."""
        self.settle(self.plan.home)
        length = self.plan.canvases[1]
        home, typed = self.cache.tokens, self.plan.typed_tokens
        for passes in self.plan.fill_passes:
            for is_weighed in (False, True):
                weighed = partial(self._fill, length, passes, home - typed, is_weighed)
                times = walls(weighed, self.device, repeats=self.few(6))
                self.notes.row(
                    "fills",
                    canvas=length,
                    prefix=home,
                    typed_tokens=typed,
                    passes=passes,
                    weighed=is_weighed,
                    ms=times.ms,
                    p20_ms=times.p20_ms,
                    p80_ms=times.p80_ms,
                )

    def _fill(self, length: int, passes: int, kept: int, is_weighed: bool) -> None:
        typed = self.ids(1, self.plan.typed_tokens, seed=self.cache.tokens)[0].cpu()
        if self.cache.trim(kept) != kept:
            raise RuntimeError("the prefix could not be cut back")
        self.runner.encode(typed, self.cache)
        tokens = self.denoised(length, passes).tokens[0].cpu()
        if is_weighed:
            (hidden,) = self.runner.read([tokens], self.cache)
            self.runner.log_probabilities(hidden[:-1], tokens[1:]).tolist()

    # What a pass is made of.

    def experts(self, length: int, prefix: int) -> None:
        """Experts of each layer that a pass reads: noise, and a canvas of one token."""
        self.settle(prefix)
        noise = self.told(self.ids(1, length, seed=length))
        alike = replace(noise, canvas=torch.full_like(noise.canvas, 7), belief=None)
        for what, each in (("noise", noise), ("one token", alike)):
            touched = self.runner.experts_touched(each)
            run = partial(self.runner.run, [each])
            self.notes.row(
                "experts",
                canvas=length,
                prefix=prefix,
                of=what,
                fewest=min(touched),
                mean=round(sum(touched) / len(touched), 2),
                most=max(touched),
                ms=steady(run, self.device, repeats=self.plan.repeats).ms,
                by_layer=touched,
            )

    def kernels(self, length: int) -> None:
        """Time by kernel of one pass, launched one by one."""
        each = self.told(self.ids(1, length, seed=length))
        runner = self.runner
        captured, pool = runner._captured, runner._pool
        runner._captured, runner._pool = {}, None
        try:
            self.runner.run([each])
            finish(self.device)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if is_cuda(self.device):
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profiler:
                self.runner.run([each])
                finish(self.device)
        finally:
            runner._captured, runner._pool = captured, pool
        rows = _profiled(profiler, self.device)
        total = sum(row["us"] for row in rows)
        for row in rows[:_KERNELS_SHOWN]:
            share = round(row["us"] / total, 4) if total else None
            self.notes.row(f"kernels of a pass over {length}", **row, share=share)
        self.notes.row(
            f"kernels of a pass over {length}",
            kernel="all",
            calls=sum(row["calls"] for row in rows),
            us=round(total, 1),
            share=1.0,
        )

    # Prompts and memory.

    def pieces(self) -> None:
        """Tokens typed behind a warm prefix: how long a piece takes to read."""
        self.anew(self.plan.home)
        for tokens in self.plan.pieces:
            # On the host, where the engine keeps the tokens of texts.
            ids = self.ids(1, tokens, seed=tokens)[0].cpu()
            times = walls(partial(self._commit, ids), self.device, repeats=self.few(8))
            read = walls(
                partial(self.runner.read, [ids], self.cache), self.device, repeats=self.few(8)
            )
            self.notes.row(
                "pieces",
                tokens=tokens,
                prefix=self.plan.home,
                encode_ms=times.ms,
                p20_ms=times.p20_ms,
                p80_ms=times.p80_ms,
                read_ms=read.ms,
            )

    def memory_in_the_end(self) -> None:
        """Peaks over everything above."""
        self.notes.row(
            "memory measured",
            context_tokens=self.cache.tokens,
            **_device_memory(self.device, "all"),
        )


def _device_memory(device: torch.device, what: str) -> dict[str, Any]:
    """Bytes: the most that tensors took, the most taken for them, and the whole device's peak."""
    if not is_cuda(device):
        return {"of": what, "allocated_peak": None, "reserved_peak": None, "device_peak": None}
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    reserved_peak = torch.cuda.max_memory_reserved(device)
    # What is in use and not reserved for tensors is the context, code and whoever else is there.
    return {
        "of": what,
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "reserved_peak": reserved_peak,
        "device_peak": reserved_peak + (total - free - reserved),
    }


def _profiled(profiler: Any, device: torch.device) -> list[dict[str, Any]]:
    """Kernels by time, the longest first; on a CPU torch's own operations."""
    on_device = is_cuda(device)
    rows = []
    for event in profiler.key_averages():
        is_kernel = "cuda" in str(event.device_type).lower()
        took = event.self_device_time_total if on_device else event.self_cpu_time_total
        if is_kernel == on_device and took > 0:
            rows.append({"kernel": event.key[:90], "calls": event.count, "us": round(took, 1)})
    return sorted(rows, key=lambda row: -row["us"])


def _whole(number: object) -> int:
    assert isinstance(number, int)
    return number
