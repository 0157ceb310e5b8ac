"""Codes of few bits to bfloat16, four bytes at a time.

A bfloat16 whose exponent bits are 0 or 1 is an integer 0..255 times 2^-133. So a code is a number
as soon as everything else is masked away, and one fused multiply-add gives scale * code + bias,
rounded once. The scale has to carry the missing power of two: `_tiles` stores it that way.

A word of four codes (eight, with those of four bits) gives registers of two bfloat16: bytes 0
and 2, then bytes 1 and 3, because a mask picks both halves of a word at once. `_tiles` stores
bytes so that the results come out in order.
"""

import functools
from typing import Literal

import triton
import triton.language as tl

from infilld.kernels._weights import Kind

# How codes become weights. "row": not in the loop; "bf16": by one multiply-add in bfloat16, less a
# power of two; "split": by a scale in two parts of bfloat16; "f32": in float32.
Scaling = Literal["row", "bf16", "split", "f32"]
_MINUS_ZERO = "0x80008000"
# lop3 truth table of (a & b) | c.
_AND_OR = "0xEA"
# Pairs of bfloat16 that decode without a scale: code / 64 for integers, the value for floats.
_TWO_POW_127, _TWO_POW_126 = "0x7F007F00", "0x7E807E80"
_TWO_POW_123, _TWO_POW_120 = "0x7D007D00", "0x7B807B80"
_MINUS_2, _MINUS_8_64THS = "0xC000C000", "0xBE00BE00"


@functools.cache
def decoder(kind: Kind, *, affine: bool, scaling: Scaling) -> str:
    """PTX that decodes one word of codes.

    Its operands are the results (four codes of the first plane, then four of the second where
    codes have four bits; 16 bits each), the word, and where it scales: for each plane the pair of
    scales and, for integers, the pair of biases, or of what scales lack in bfloat16 ("split").

    Without a scale, integers come out divided by 64, floats as they are; all of it exact.
    """
    is_nibble = kind in ("int4", "nvfp4")
    results = 8 if is_nibble else 4
    lines = [".reg .b32 r, t, u, m0, m1, c0, c1, h0, h1, l0, l1, z;"]
    if scaling == "split":
        names = ("h0", "l0", "h1", "l1") if is_nibble else ("h0", "l0")
        lines += [f"mov.b32 {name}, ${results + 1 + i};" for i, name in enumerate(names)]
        lines.append(f"mov.b32 z, {_MINUS_ZERO};")
    if scaling == "bf16":
        names = ("m0", "m1") if kind == "nvfp4" else ("m0", "c0", "m1", "c1")
        for i, name in enumerate(names if is_nibble else names[: len(names) // 2]):
            lines.append(f"mov.b32 {name}, ${results + 1 + i};")
    else:
        for name, value in _unscaled(kind, affine=affine).items():
            lines.append(f"mov.b32 {name}, {value};")
    if kind == "nvfp4" or kind == "fp8":
        lines += [f"mov.b32 c0, {_MINUS_ZERO};", f"mov.b32 c1, {_MINUS_ZERO};"]
    for i, bits in enumerate(_bits(kind, f"${results}")):
        plane = i // 2
        lines += [bits, f"fma.rn.bf16x2 r, r, m{plane}, c{plane};"]
        if scaling == "split":
            lines.append(f"fma.rn.bf16x2 t, r, l{plane}, z;")
            lines.append(f"fma.rn.bf16x2 r, r, h{plane}, t;")
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r;")
    return "\n".join(("{", *lines, "}"))


@functools.cache
def constraints(kind: Kind, *, scaling: Scaling) -> str:
    """Operands of the PTX above; results are written before the last argument is read."""
    results = 8 if kind in ("int4", "nvfp4") else 4
    scales = (
        {"int4": 4, "nvfp4": 2, "int8": 2, "fp8": 0}[kind] if scaling in ("bf16", "split") else 0
    )
    return ",".join(["=&h"] * results + ["r"] * (1 + scales))


def _unscaled(kind: Kind, *, affine: bool) -> dict[str, str]:
    if kind == "int4":
        bias = "0x80008000" if affine else _MINUS_8_64THS
        return {"m0": _TWO_POW_127, "m1": _TWO_POW_123, "c0": bias, "c1": bias}
    if kind == "int8":
        return {"m0": _TWO_POW_127, "c0": _MINUS_2}
    return {"m0": _TWO_POW_120} if kind == "fp8" else {"m0": _TWO_POW_126, "m1": _TWO_POW_126}


def _bits(kind: Kind, word: str) -> list[str]:
    """What puts the bits of each result where their value is the code by a power of two."""
    if kind == "int4":
        # By 2^-133 from the low nibbles, by 2^-129 from the high ones.
        return [
            f"and.b32 r, {word}, 0x000F000F;",
            f"shr.u32 t, {word}, 8; and.b32 r, t, 0x000F000F;",
            f"and.b32 r, {word}, 0x00F000F0;",
            f"shr.u32 t, {word}, 8; and.b32 r, t, 0x00F000F0;",
        ]
    if kind == "int8":
        # Stored plus 128. By 2^-133.
        return [
            f"and.b32 r, {word}, 0x00FF00FF;",
            f"shr.u32 t, {word}, 8; and.b32 r, t, 0x00FF00FF;",
        ]
    if kind == "fp8":
        # Sign, four bits of exponent, three of mantissa. By 2^-120.
        moves: tuple[tuple[int, int], ...] = ((8, 4), (0, -4))
        mask = "0x07F007F0"
    else:
        # Sign, two bits of exponent, one of mantissa. By 2^-126.
        moves = ((12, 6), (4, -2), (8, 2), (0, -6))
        mask = "0x01C001C0"
    return [
        f"{_shift('t', word, sign)} {_shift('u', word, rest)} and.b32 u, u, {mask}; "
        f"lop3.b32 r, t, 0x80008000, u, {_AND_OR};"
        for sign, rest in moves
    ]


def _shift(target: str, word: str, left: int) -> str:
    name = "shl.b32" if left >= 0 else "shr.u32"
    return f"{name} {target}, {word}, {abs(left)};"


# From a word of two scales to pairs of each, with the pairs of biases that take 8 or 128 away.
_PAIRS = "prmt.b32 $0, $4, $4, 0x1010; prmt.b32 $2, $4, $4, 0x3232;"
_BIASES = (
    "{{ .reg .b32 a, b, z; mov.b32 a, {first}; mov.b32 b, {second}; mov.b32 z, 0x80008000; "
    + _PAIRS
    + " fma.rn.bf16x2 $1, $0, a, z; fma.rn.bf16x2 $3, $2, b, z; }}"
)
# -8 * 2^-133 and -8 * 2^-129; -128 * 2^-133.
NIBBLE_PAIRS: tl.constexpr = tl.constexpr(_BIASES.format(first="0x80088008", second="0x80808080"))
BYTE_PAIRS: tl.constexpr = tl.constexpr(_BIASES.format(first="0x80808080", second="0x80808080"))
DOUBLE: tl.constexpr = tl.constexpr("prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;")


@triton.jit
def round_to_bf16(x):
    """Float32 rounded to the nearest bfloat16, ties to even; the interpreter's cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(q):
    """float32 of E4M3 bits 0..255; its NaN reads as 480."""
    bits = ((q & 128) << 24) | ((q & 127) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def code_value(q, KIND: tl.constexpr, AFFINE: tl.constexpr):
    """float32 of codes as they are stored: 0..15, or 0..255 with an int8 raised by 128."""
    if KIND == "nvfp4":
        bits = ((q & 8) << 28) | ((q & 7) << 22)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == "fp8":
        value = e4m3_value(q)
    elif KIND == "int8":
        value = (q - 128).to(tl.float32)
    elif AFFINE:
        value = q.to(tl.float32)
    else:
        value = (q - 8).to(tl.float32)
    return value


@triton.jit
def _columns(j0, j1, j2, j3, PERMUTED: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """[N, H] from the four codes of each word [N, H / 4]; see `TileLayout.permuted`."""
    fours = tl.join(tl.join(j0, j2), tl.join(j1, j3))
    if PERMUTED:
        fours = fours.reshape(N, 4, H // 16, 2, 2).trans(0, 2, 3, 1, 4)
    return fours.reshape(N, H)


@triton.jit
def _bf16_columns(j0, j1, j2, j3, PERMUTED: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    return _columns(j0, j1, j2, j3, PERMUTED, N, H).to(tl.bfloat16, bitcast=True)


@triton.jit
def _plane(
    word,
    SHIFT: tl.constexpr,
    MASK: tl.constexpr,
    KIND: tl.constexpr,
    AFFINE: tl.constexpr,
    PERMUTED: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
):
    """float32 [N, H] without PTX: what the interpreter computes."""
    j0, j1 = (word >> SHIFT) & MASK, (word >> (SHIFT + 16)) & MASK
    j2, j3 = (word >> (SHIFT + 8)) & MASK, (word >> (SHIFT + 24)) & MASK
    return code_value(_columns(j0, j1, j2, j3, PERMUTED, N, H), KIND, AFFINE)


@triton.jit
def code_columns(
    word0,
    word1,
    KIND: tl.constexpr,
    AFFINE: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    INTERPRET: tl.constexpr,
    PERMUTED: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
):
    """The codes of both halves of a tile, exact [N, H]; integers divided by 64.

    bfloat16, in the interpreter float32.

    Args:
        word0: words [N, H / 4] of int32: both halves' nibbles, or the first half's bytes.
        word1: the second half's bytes; with nibbles not read.
    """
    if INTERPRET:
        UNIT: tl.constexpr = 0.015625 if (KIND == "int4" or KIND == "int8") else 1.0
        if KIND == "int4" or KIND == "nvfp4":
            v0 = _plane(word0, 0, 15, KIND, AFFINE, PERMUTED, N, H) * UNIT
            v1 = _plane(word0, 4, 15, KIND, AFFINE, PERMUTED, N, H) * UNIT
        else:
            v0 = _plane(word0, 0, 255, KIND, AFFINE, PERMUTED, N, H) * UNIT
            v1 = _plane(word1, 0, 255, KIND, AFFINE, PERMUTED, N, H) * UNIT
    elif KIND == "int4" or KIND == "nvfp4":
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [word0], (tl.int16,) * 8, True, 1
        )
        v0 = _bf16_columns(a0, a1, a2, a3, PERMUTED, N, H)
        v1 = _bf16_columns(b0, b1, b2, b3, PERMUTED, N, H)
    else:
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [word0], (tl.int16,) * 4, True, 1
        )
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [word1], (tl.int16,) * 4, True, 1
        )
        v0 = _bf16_columns(a0, a1, a2, a3, PERMUTED, N, H)
        v1 = _bf16_columns(b0, b1, b2, b3, PERMUTED, N, H)
    return v0, v1


@triton.jit
def scaled_columns(
    word0,
    word1,
    scale,
    bias,
    KIND: tl.constexpr,
    SCALING: tl.constexpr,
    AFFINE: tl.constexpr,
    GROUPS: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PERMUTED: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
):
    """The weights of both halves of a tile, bfloat16 [N, H]; with "bf16" less a power of two.

    Args:
        word0: words [N, H / 4] of int32: both halves' nibbles, or the first half's bytes.
        word1: the second half's bytes; with nibbles not read.
        scale: words [N, GROUPS] of both halves' scales; with nvfp4 a word [N] for each half; with
            "split" float32 [N, GROUPS] for each half.
        bias: words [N, GROUPS] where there are biases.
    """
    if KIND == "nvfp4":
        m0 = _spread_pairs(_e5m3_pairs(scale[0], GROUPS), GROUPS, PERMUTED, N, H)
        m1 = _spread_pairs(_e5m3_pairs(scale[1], GROUPS), GROUPS, PERMUTED, N, H)
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [word0, m0, m1], (tl.int16,) * 8, True, 1
        )
    else:
        if SCALING == "split":
            m0, c0 = _split_pairs(scale[0])
            m1, c1 = _split_pairs(scale[1])
        elif AFFINE:
            m0, m1 = tl.inline_asm_elementwise(
                DOUBLE, "=&r,=&r,r", [scale], (tl.int32, tl.int32), True, 1
            )
            c0, c1 = tl.inline_asm_elementwise(
                DOUBLE, "=&r,=&r,r", [bias], (tl.int32, tl.int32), True, 1
            )
        else:
            m0, c0, m1, c1 = tl.inline_asm_elementwise(
                NIBBLE_PAIRS if KIND == "int4" else BYTE_PAIRS,
                "=&r,=&r,=&r,=&r,r",
                [scale],
                (tl.int32,) * 4,
                True,
                1,
            )
        m0, c0 = (
            _spread_pairs(m0, GROUPS, PERMUTED, N, H),
            _spread_pairs(c0, GROUPS, PERMUTED, N, H),
        )
        m1, c1 = (
            _spread_pairs(m1, GROUPS, PERMUTED, N, H),
            _spread_pairs(c1, GROUPS, PERMUTED, N, H),
        )
        if KIND == "int4":
            a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [word0, m0, c0, m1, c1], (tl.int16,) * 8, True, 1
            )
        else:
            a0, a1, a2, a3 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [word0, m0, c0], (tl.int16,) * 4, True, 1
            )
            b0, b1, b2, b3 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS, [word1, m1, c1], (tl.int16,) * 4, True, 1
            )
    return _bf16_columns(a0, a1, a2, a3, PERMUTED, N, H), _bf16_columns(
        b0, b1, b2, b3, PERMUTED, N, H
    )


@triton.jit
def _split_pairs(s):
    """Pairs of the first eight bits of 64 * s, where s is a float16, and of its other three."""
    s *= 64.0
    bits = s.to(tl.int32, bitcast=True)
    high = bits & -65536
    rest = (s - high.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return high | ((bits >> 16) & 0xFFFF), rest | ((rest >> 16) & 0xFFFF)


@triton.jit
def _e5m3_pair(word, SHIFT: tl.constexpr):
    """Pairs of scales times 2^118: 2^8 less than the codes lack, to fit a bfloat16."""
    # To bits 4 to 11 of both halves, and 223 = 118 + 127 - 22 to the exponents.
    return ((word >> SHIFT) & 255) * 0x100010 + 0x6F806F80


@triton.jit
def _e5m3_pairs(word, GROUPS: tl.constexpr):
    """Pairs [N, GROUPS] from the words of four scales [N].

    Joined, not shifted by a range: a range would keep Triton from loading words of codes where
    they are multiplied, and send all weights through shared memory.
    """
    pairs = _e5m3_pair(word, 0)[:, None]
    if GROUPS == 2:
        pairs = tl.join(_e5m3_pair(word, 0), _e5m3_pair(word, 8))
    elif GROUPS == 4:
        even = tl.join(_e5m3_pair(word, 0), _e5m3_pair(word, 16))
        odd = tl.join(_e5m3_pair(word, 8), _e5m3_pair(word, 24))
        pairs = tl.join(even, odd).reshape(word.shape[0], GROUPS)
    return pairs


@triton.jit
def e5m3_value(word, GROUPS: tl.constexpr):
    """float32 [N, GROUPS] of words of four scales [N]."""
    byte = (word[:, None] >> (tl.arange(0, GROUPS) * 8)[None, :]) & 255
    bits = (byte << 20) + (105 << 23)
    return tl.where(byte == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _spread_pairs(
    s, GROUPS: tl.constexpr, PERMUTED: tl.constexpr, N: tl.constexpr, H: tl.constexpr
):
    """[N, GROUPS] to the words that they scale, [N, H / 4]."""
    if GROUPS == 1:
        wide = tl.broadcast_to(s, (N, H // 4))
    elif PERMUTED:
        wide = tl.broadcast_to(s.reshape(N, 1, GROUPS, 1), (N, 4, GROUPS, H // 16 // GROUPS))
    else:
        wide = tl.broadcast_to(s.reshape(N, GROUPS, 1), (N, GROUPS, H // 4 // GROUPS))
    return wide.reshape(N, H // 4)


@triton.jit
def spread(s, GROUPS: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """[N, GROUPS] to the columns that they scale, [N, H]."""
    if GROUPS == 1:
        wide = tl.broadcast_to(s, (N, H))
    else:
        wide = tl.broadcast_to(s.reshape(N, GROUPS, 1), (N, GROUPS, H // GROUPS))
    return wide.reshape(N, H)
