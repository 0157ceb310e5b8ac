"""Weights in few bits, from rows to the tiles that a GPU's matmuls read."""

from dataclasses import replace
from typing import Literal

import torch

from infilld.kernels._launch import require_triton
from infilld.kernels._tiles import LARGEST_BF16_SCALE, TiledWeight, tile_layout
from infilld.kernels._weights import QuantizedWeight


def quant_pack(
    weight: QuantizedWeight,
    *,
    gated: bool = False,
    capability: int | None = None,
    impl: Literal["gpu", "reference"],
) -> TiledWeight:
    """The same weight in tiles; every code and every scale keeps its value.

    Only codes of nvfp4 whose scale is 0 become 0, which changes no value. Rows and columns that
    fill up the last tiles repeat others: a matmul does not read what they give. Scales are stored
    times powers of two, as `_tiles` says. It waits for the device, to look at the scales: pack
    when loading.

    Args:
        weight: [N, K], or [E, N, K] for experts.
        gated: the rows are a gated MLP's gates and then as many ups: for `expert_gate_up`.
        capability: compute capability of the GPU that will read it, 10 * major + minor; None: of
            the device on which the weight is, or 80 where that is no GPU.
        impl: implementation; nothing falls back to another one.

    Raises:
        ValueError: groups that are no multiple of 16, scales that are not finite, in bfloat16
            256 and more or with nvfp4 negative, codes that are NaN.
        KernelUnavailable: this implementation cannot run here.
    """
    if len(weight.shape) not in (2, 3):
        raise ValueError(f"the weight is {list(weight.shape)}, expected [N, K] or [E, N, K]")
    if weight.kind == "fp8" and weight.group != weight.shape[-1]:
        raise ValueError(f"fp8 in groups of {weight.group}: expected one scale a row")
    if capability is None:
        capability = _capability(weight.device)
    _check_values(weight)
    if weight.kind == "nvfp4":
        is_zero = (weight.scales.view(torch.uint8) == 0).repeat_interleave(weight.group // 2, -1)
        weight = replace(weight, codes=weight.codes.masked_fill(is_zero, 0))
    layout = tile_layout(weight, capability=capability, gated=gated)
    if impl == "gpu":
        require_triton("quant_pack")
        from infilld.kernels.gpu.quant_pack import quant_pack as run
    elif impl == "reference":
        from infilld.kernels.reference.quant_pack import quant_pack as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return run(weight, layout)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _check_values(weight: QuantizedWeight) -> None:
    scales = weight.scales
    if weight.kind == "nvfp4":
        is_bad = (scales.view(torch.uint8) > 126).any()
    else:
        limit = LARGEST_BF16_SCALE if scales.dtype == torch.bfloat16 else torch.inf
        is_bad = ~(scales.abs() < limit).all()
    if bool(is_bad):
        raise ValueError("a scale is NaN, too large or negative where it may not be")
    if weight.kind == "fp8" and bool(((weight.codes.view(torch.uint8) & 127) == 127).any()):
        raise ValueError("a code is NaN")
