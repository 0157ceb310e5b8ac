"""Acceptance within an entropy budget: one program per row, the whole row in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable, require_gpu

LARGEST_CANVAS_TOKENS = 256


@triton.jit
def accept_kernel(
    entropy_ptr,
    proposal_ptr,
    noise_ptr,
    pinned_ptr,
    pins_ptr,
    canvas_ptr,
    accepted_ptr,
    budget_nats,
    L,
    PINS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    valid = o_l < L
    start = i_row * L

    b_entropy = tl.load(entropy_ptr + start + o_l, mask=valid, other=0.0)  # [BLOCK_L]
    # Also turns -0.0 into 0.0: their bits differ, their rank must not.
    b_entropy = tl.where(b_entropy > 0.0, b_entropy, tl.where(b_entropy <= 0.0, 0.0, float("inf")))
    # The bits of floats that are not negative are ordered as the floats are. Pinned positions
    # and padding get bits above those of +inf and so rank behind everything.
    b_bits = b_entropy.to(tl.int32, bitcast=True)
    last = valid == 0
    if PINS:
        last = last | (tl.load(pinned_ptr + start + o_l, mask=valid, other=0) != 0)
    b_bits = tl.where(last, 0x7FFFFFFF, b_bits)
    b_key = (b_bits.to(tl.int64) << 32) | o_l.to(tl.int64)
    b_key = tl.sort(b_key)

    # From here on index i is a rank, o_at its position.
    o_at = (b_key & 0xFFFFFFFF).to(tl.int32)
    b_bits = (b_key >> 32).to(tl.int32)
    free = b_bits != 0x7FFFFFFF
    finite = b_bits < 0x7F800000
    b_nats = tl.where(finite, b_bits, 0).to(tl.float32, bitcast=True)
    # 2^-40 nats; int64 sums are exact in any order.
    b_units = (tl.minimum(b_nats, 1024.0) * 1099511627776.0).to(tl.int64)
    b_before = tl.cumsum(b_units, 0) - b_units
    budget = (tl.minimum(budget_nats, 4194304.0) * 1099511627776.0).to(tl.int64)
    accepted = free & ((o_l == 0) | (finite & (b_before <= budget)))

    o_to = start + o_at
    valid = o_at < L
    b_proposal = tl.load(proposal_ptr + o_to, mask=valid, other=0)
    b_noise = tl.load(noise_ptr + o_to, mask=valid, other=0)
    b_canvas = tl.where(accepted, b_proposal, b_noise)
    if PINS:
        b_pins = tl.load(pins_ptr + o_to, mask=valid, other=0)
        b_canvas = tl.where(free, b_canvas, b_pins)
    tl.store(canvas_ptr + o_to, b_canvas, mask=valid)
    tl.store(accepted_ptr + o_to, accepted, mask=valid)


def accept(
    entropy_nats: Tensor,
    proposal: Tensor,
    noise: Tensor,
    pinned: Tensor | None,
    pins: Tensor | None,
    *,
    budget_nats: float,
) -> tuple[Tensor, Tensor]:
    """Next canvas [R, L] int64 and accepted positions [R, L] bool; see `infilld.kernels.accept`.

    Raises:
        KernelUnavailable: no CUDA device, or a row does not fit one program.
    """
    require_gpu("accept", entropy_nats, proposal, noise)
    rows, tokens = entropy_nats.shape
    if tokens > LARGEST_CANVAS_TOKENS:
        raise KernelUnavailable(
            f"accept: the canvas has {tokens} positions, this kernel takes {LARGEST_CANVAS_TOKENS}"
        )
    canvas = torch.empty(rows, tokens, dtype=torch.int64, device=proposal.device)
    accepted = torch.empty(rows, tokens, dtype=torch.bool, device=proposal.device)
    if canvas.numel() == 0:
        return canvas, accepted
    if pinned is not None and pins is not None:
        pinned, pins = pinned.contiguous(), pins.contiguous()
    accept_kernel[(rows,)](
        entropy_nats.contiguous(),
        proposal.contiguous(),
        noise.contiguous(),
        accepted if pinned is None else pinned,
        canvas if pins is None else pins,
        canvas,
        accepted,
        float(budget_nats),
        tokens,
        PINS=pinned is not None,
        BLOCK_L=max(16, triton.next_power_of_2(tokens)),
        num_warps=4,
    )
    return canvas, accepted
