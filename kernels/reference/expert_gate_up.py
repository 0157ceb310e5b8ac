"""Gates and ups of the experts: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.reference._experts import expert_rows
from infilld.kernels.reference.dequantize import expert_matrix


def expert_gate_up(
    x: Tensor, weight: Tensor | QuantizedWeight, ids: Tensor, order: Tensor
) -> Tensor:
    """Hidden rows [T * k, F] in x's type; see `infilld.kernels.expert_gate_up`."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    hidden = x.new_empty(len(order), weight.shape[-2] // 2)
    token = order.long() // ids.shape[1]
    for expert, rows in expert_rows(ids, order):
        both = wide[token[rows]] @ expert_matrix(weight, expert, wide.dtype).T
        gate, up = both.chunk(2, dim=-1)
        hidden[rows] = (F.gelu(gate, approximate="tanh") * up).to(x.dtype)
    return hidden
