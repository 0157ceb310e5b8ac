"""Compile kernels for GPUs that are not here, and read what the compiler made of them."""

import functools
import re
import subprocess
import tempfile
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
# What every kernel is compiled for: sm_86 differs from sm_89 in nothing that these kernels use.
CAPABILITIES = (80, 89, 90, 120)
TOOLS = Path("backends/nvidia/bin")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one architecture.

    Attributes:
        registers: per thread. spill_bytes: local memory per thread, 0 without spills.
        shared_bytes: dynamic shared memory. ptx: its text. cubin: the compiled kernel.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes

    @functools.cached_property
    def sass(self) -> str:
        """The machine code's text, which takes as long to write as the machine code itself."""
        return _read("nvdisasm", "-c", self.cubin)


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    capability: int,
    warps: int,
    aligned: tuple[str, ...] = (),
    stages: int | None = None,
) -> Compiled:
    """Compile a `triton.jit` function; `aligned` arguments are divisible by 16.

    `stages` of a pipelined loop; None: Triton's own number.
    """
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
    options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(_read("cuobjdump", "-res-usage", done.asm["cubin"]))
    return Compiled(
        registers=usage["REG"],
        spill_bytes=usage["LOCAL"] + usage["STACK"],
        shared_bytes=done.metadata.shared,
        ptx=done.asm["ptx"],
        cubin=done.asm["cubin"],
    )


@functools.cache
def is_pinned() -> bool:
    """Whether Triton is the version of constraints.txt, whose figures tests know exactly.

    Others give out registers and cut loops in another way, which is no fault of a kernel.
    """
    import triton

    return f"triton=={triton.__version__}" in CONSTRAINTS.read_text().split()


def check_fits(compiled: Compiled, capability: int, *, registers: int) -> None:
    """Assert that a kernel fits a GPU.

    Args:
        compiled: for a GPU of this `capability`.
        registers: the most of a thread, with the pinned Triton. Others may give as many as there
            are, and may store some of them before a loop and read them behind it.
    """
    assert compiled.shared_bytes <= SHARED_LIMIT_BYTES[capability], compiled.shared_bytes
    if is_pinned():
        assert compiled.spill_bytes == 0, compiled.spill_bytes
        assert compiled.registers <= registers, compiled.registers
    elif compiled.spill_bytes:
        opcodes = {opcode[:3] for loop in loops(compiled.sass) for opcode in loop}
        assert not opcodes & {"STL", "LDL"}, compiled.spill_bytes


def loops(sass: str) -> list[list[str]]:
    """Opcodes of each loop of a kernel: what lies between a label and a branch back to it."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    found: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append(code[1])
            target = re.search(r"\.L_x_\d+", code[2]) if code[1].startswith("BRA") else None
            start = labels.get(target[0]) if target else None
            # A program ends in an endless branch to itself, which is no loop.
            if start is not None and start < len(opcodes) - 1:
                found.append(opcodes[start:])
    return found


def _read(tool: str, option: str, cubin: bytes) -> str:
    """What a tool of CUDA, as Triton brings it, says of a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / TOOLS / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _resource_usage(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
