"""Temperature as a pure function of the step."""

import torch
from torch import Tensor

from infilld.engine.config import SamplerConfig


def temperature(step: int, config: SamplerConfig) -> Tensor:
    """Temperature of a step counted up from 0, a float32 scalar.

    It falls linearly from t_max in the first step towards t_min, and is stretched over max_steps.
    Computed in float32: the same formula in Python floats differs by one ulp of a logit, which
    changes decisions.

    Differs: the reference counts steps down, N...1.
    """
    left = torch.tensor(config.max_steps - step, dtype=torch.int32)
    noise = left / config.max_steps
    return config.t_min + (config.t_max - config.t_min) * noise
