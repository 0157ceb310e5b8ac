"""What a run of the report measures: at full size, or in small where a test asks for it."""

from dataclasses import dataclass

import torch
from random_model import Form, config_26b, config_small

from infilld.engine.config import ModelConfig
from infilld.engine.stack import Impl


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes.

    Attributes:
        name: of the shapes. config: the shapes.
        canvases: lengths of a canvas, in the order of their worth.
        prefixes: tokens before it, growing; the last is the whole context.
        home: of those, where all that is not a sweep is measured.
        side_by_side: rows of a canvas of the second length.
        forced_passes: of a canvas that never stops. fill_passes: of a fill of the second length.
        typed_tokens: read anew before a fill.
        pieces: tokens of a prompt that are read at once.
        repeats: of each measurement.
        test_files, test_filter: which kernel tests; none: all.
        benches: names of operations; none: all.
    """

    name: str
    config: ModelConfig
    canvases: tuple[int, ...]
    prefixes: tuple[int, ...]
    home: int
    side_by_side: tuple[int, ...]
    forced_passes: int
    fill_passes: tuple[int, ...]
    typed_tokens: int
    pieces: tuple[int, ...]
    repeats: int
    test_files: tuple[str, ...] = ()
    test_filter: str = ""
    benches: tuple[str, ...] = ()


def full_plan() -> Plan:
    """The 26B model."""
    return Plan(
        name="26b",
        config=config_26b(),
        canvases=(256, 64, 16, 32, 128),
        prefixes=(512, 2048, 8192, 32_768),
        home=2048,
        side_by_side=(2, 4, 8),
        forced_passes=16,
        # Published for code: 10.7 passes on average, 12 in the median.
        fill_passes=(11, 8, 12),
        typed_tokens=8,
        pieces=(8, 32, 128, 512),
        repeats=30,
    )


def small_plan() -> Plan:
    """A tiny model, in seconds on a CPU."""
    return Plan(
        name="small",
        config=config_small(),
        canvases=(32, 16),
        prefixes=(16, 48, 96),
        home=48,
        side_by_side=(2,),
        forced_passes=3,
        fill_passes=(2,),
        typed_tokens=8,
        pieces=(8, 20),
        repeats=2,
        test_files=("test_accept.py",),
        test_filter="TestReference",
        benches=("accept",),
    )


@dataclass(frozen=True)
class Machine:
    """Where a section computes, and with which implementation of the operations."""

    device: torch.device
    impl: Impl
    dtype: torch.dtype

    @classmethod
    def found(cls) -> "Machine":
        """The first GPU; without one the CPU and the reference."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda", 0), "gpu", torch.bfloat16)
        return cls(torch.device("cpu"), "reference", torch.float32)


FORM_OF_THE_REPORT: Form = "int4"
