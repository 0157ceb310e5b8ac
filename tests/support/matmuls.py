"""What the compiler makes of the matmul of weights in few bits, without a GPU."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from compiling import Compiled, compile_kernel, loops
from few_bits import random_weight

from infilld.kernels.quant_pack import quant_pack

THREADS = 128


@dataclass(frozen=True)
class Loop:
    """A compiled matmul and the loop over its tiles.

    Attributes:
        compiled: the whole kernel.
        opcodes: how often each stands in the loop.
        per_weight: instructions of one lane for each weight.
    """

    compiled: Compiled
    opcodes: Counter[str]
    per_weight: float

    def count(self, beginning: str) -> int:
        """Instructions whose opcode begins so."""
        return sum(n for code, n in self.opcodes.items() if code.startswith(beginning))


def compile_matmul(
    operation: str, capability: int, *, block_t: int, columns: int = 2816, **form: Any
) -> Loop:
    """Compile for 128 rows of weights; `form` as for `random_weight`, nothing: plain bfloat16."""
    from infilld.kernels.gpu._grouped import WARPS, constants, grouped_kernel, stages

    if form:
        group = form.pop("group") or columns
        weight = quant_pack(
            random_weight((1, 128, columns), group=group, **form),
            gated=operation == "gate_up",
            capability=capability,
            impl="gpu",
        )
        pointers = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32"}
        types = ("*i32", pointers[weight.scales.dtype])
        fixed = constants(operation, weight, 128)  # type: ignore[arg-type]
    else:
        plain = torch.empty(1, 128, columns, dtype=torch.bfloat16)
        types = ("*bf16", "*bf16")
        fixed = constants(operation, plain, 128)  # type: ignore[arg-type]
    fixed |= {"SPLITS": 1, "FEWEST_ROWS": 1, "BLOCK_T": block_t, "INTERPRET": False}
    arguments = {
        "x_ptr": "*bf16",
        "codes_ptr": types[0],
        "scales_ptr": types[1],
        "biases_ptr": types[1],
        "factor_ptr": "*fp32",
        "route_weights_ptr": "*fp32",
        "order_ptr": "*i32",
        "tiles_ptr": "*i32",
        "out_ptr": "*bf16",
    } | dict.fromkeys(("T", "N", "K", "x_stride", "CHOSEN", "K_TILES"), "i32")
    aligned = [name for name in arguments if name.endswith("_ptr")]
    compiled = compile_kernel(
        grouped_kernel,
        arguments | dict.fromkeys(fixed, "constexpr"),
        fixed,
        capability=capability,
        warps=WARPS,
        aligned=(*aligned, "N", "K", "x_stride"),
        stages=stages(capability),
    )
    loop = min((body for body in loops(compiled.sass) if any("MMA" in o for o in body)), key=len)
    weights = fixed["BLOCK_N"] * 2 * fixed["HALF"]
    return Loop(compiled, Counter(loop), len(loop) * THREADS / weights)
