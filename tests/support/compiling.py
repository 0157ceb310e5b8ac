"""Compile kernels for GPUs that are not here, and read what the compiler made of them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Compute capability: largest dynamic shared memory of one program, bytes.
# Source: CUDA C++ programming guide, table of technical specifications per compute capability.
SHARED_LIMIT_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one architecture.

    Attributes:
        registers: per thread. spill_bytes: local memory per thread, 0 without spills.
        shared_bytes: dynamic shared memory. ptx: its text.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    capability: int,
    warps: int,
    aligned: tuple[str, ...] = (),
) -> Compiled:
    """Compile a `triton.jit` function; `aligned` arguments are divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    done = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    usage = _resource_usage(Path(triton.__file__).parent, done.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        spill_bytes=usage["LOCAL"] + usage["STACK"],
        shared_bytes=done.metadata.shared,
        ptx=done.asm["ptx"],
    )


def _resource_usage(package: Path, cubin: bytes) -> dict[str, int]:
    import tempfile

    tool = package / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}
