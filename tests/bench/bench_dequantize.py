import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))
from few_bits import random_weight
from harness import Case, main

from infilld.kernels.dequantize import dequantize

FORMS = {
    "int4-g64": {"kind": "int4", "group": 64},
    "int8-row": {"kind": "int8", "group": 2816},
    "fp8": {"kind": "fp8", "group": 2816},
    "nvfp4": {"kind": "nvfp4", "group": 16},
}


def cases(device: str, impl: str) -> Iterator[Case]:
    """The 26B model's widest projection, to bfloat16."""
    for name, form in FORMS.items():
        weight = random_weight((8192, 2816), **form).to(device)  # type: ignore[arg-type]
        moved = weight.nbytes + 8192 * 2816 * 2

        def run(weight=weight) -> Tensor:  # type: ignore[no-untyped-def]
            return dequantize(weight, dtype=torch.bfloat16, impl=impl)  # type: ignore[arg-type]

        yield Case(name=name, moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
