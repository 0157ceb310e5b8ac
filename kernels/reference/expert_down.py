"""The experts' second product: the definition."""

import torch
from torch import Tensor

from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.reference._experts import expert_rows
from infilld.kernels.reference.dequantize import expert_matrix


def expert_down(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    ids: Tensor,
    order: Tensor,
    route_weights: Tensor,
) -> Tensor:
    """Rows [T * k, D] in hidden's type; see `infilld.kernels.expert_down`."""
    wide = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
    out = hidden.new_empty(len(order), weight.shape[-2])
    share = route_weights.flatten()[order.long()].to(wide.dtype)
    for expert, rows in expert_rows(ids, order):
        product = wide[rows] @ expert_matrix(weight, expert, wide.dtype).T
        out[rows] = (product * share[rows, None]).to(out.dtype)
    return out
