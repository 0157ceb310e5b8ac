"""First weights: random, but for two layers that can already look up what followed before.

To continue a phrase that came before, one layer must tell every position what stood before it, and
the next must look for positions that stood behind the present token. Either alone is of no use,
so that gradient descent finds them late. Here they are laid out at the start and then trained like
everything else:

    layer 0   two heads see one and two positions back, by their rotary angle alone, and write
              what they see into dimensions that the embedding leaves free
    layer 1   two heads compare the present token with those dimensions and copy the token found

Measured with width 192, 4 layers, repeated random phrases of a vocabulary of 4,096 (2,048 tokens a
step, AVX2 on two cores): without the layout 8.2 nats a token after 475 steps, which is chance; with
it 0.6 nats after 140.
Source: the idea of mimetic initialisation, arXiv 2305.09828; of induction heads, arXiv 2209.11895.
"""

import torch
from torch import Tensor, nn

from infilld.engine.layers import Attention, Layer
from infilld.engine.model import DiffusionGemma

# Root mean square of the first embedding dimension, which is the same for every token.
_CONSTANT = 3.0
# Weights of the query and key norms: how sharply the heads choose.
_SHARP_BEFORE, _SHARP_SAME = 0.8, 0.6
# Rotary pairs by which a head tells one position from the next: the fastest.
_FAST_PAIRS = (1.0, 1.0, 1.0, 1.0, 0.7, 0.5)
# Pairs that turn less than this, radians a position, compare tokens hundreds of positions apart.
_STILL = 3e-3
# What a layer adds is about half as large as the embedding; doubled, it counts alike.
_LIFT = 2.0


def initialise(model: DiffusionGemma, seed: int) -> None:
    """Weights for training: every block starts with outputs of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    depth = len(model.layers)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                # There is no 1/sqrt(A) in the attention; this starts where that would.
                parameter.fill_(parameter.shape[0] ** -0.25)
            elif name.endswith(
                ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
            ):
                parameter.fill_((2 * depth) ** -0.5)
    if _can_be_wired(model):
        _wire(model, generator)


def _can_be_wired(model: DiffusionGemma) -> bool:
    """Whether there are two sliding layers, wide enough, with heads and slow pairs to spare."""
    config = model.config
    if config.layer_kinds[:2] != ("sliding", "sliding"):
        return False
    heads, keys, size = config.heads, config.key_heads["sliding"], config.head_sizes["sliding"]
    slow = int((_frequencies(model) < _STILL).sum())
    return keys >= 2 and heads // keys >= 2 and 3 * size < config.width and slow >= 4


@torch.no_grad()
def _wire(model: DiffusionGemma, generator: torch.Generator) -> None:
    config = model.config
    size = config.head_sizes["sliding"]
    # Dimensions 1 to `own` hold the token, the rest what stood one and two positions before it.
    own = config.width - 2 * size
    table = model.embed_tokens.weight
    table[:, own:] = 0
    table[:, 0] = _CONSTANT / config.width**0.5
    reduce = _orthonormal(size, own - 1, generator)
    _look_back(_attention(model, 0), _frequencies(model), reduce, own)
    shared = config.heads // config.key_heads["sliding"]
    _look_up(_attention(model, 1), _frequencies(model), reduce, own, shared, generator)


def _look_back(attention: Attention, frequencies: Tensor, reduce: Tensor, own: int) -> None:
    """Heads 0 and 1 write the token one and two positions back, reduced to a head's size."""
    size = attention.head_size
    fast = torch.zeros(size)
    fast[: len(_FAST_PAIRS)] = torch.tensor(_FAST_PAIRS)
    # What is the same for every token tells keys apart by their position alone.
    _clear(attention.k_proj, 0, size)[:, 0] = _turned(fast, frequencies, 1.0)
    assert attention.v_proj is not None
    _clear(attention.v_proj, 0, size)[:, 1:own] = reduce
    out = attention.o_proj.weight
    out[own:] = 0
    for head, back in enumerate((1, 2)):
        _clear(attention.q_proj, head, size)[:, 0] = _turned(fast, frequencies, 1.0 - back)
        part = slice(head * size, (head + 1) * size)
        out[:own, part] = 0
        out[own + head * size : own + (head + 1) * size, part] = torch.eye(size)
    attention.q_norm.weight.fill_(_SHARP_BEFORE)
    attention.k_norm.weight.fill_(_SHARP_BEFORE)


def _look_up(
    attention: Attention,
    frequencies: Tensor,
    reduce: Tensor,
    own: int,
    shared: int,
    generator: torch.Generator,
) -> None:
    """The first head of two groups finds where the present token stood before what is copied."""
    size = attention.head_size
    assert attention.v_proj is not None
    slow = (frequencies < _STILL).nonzero()[:, 0]
    still = torch.cat((slow, slow + size // 2))
    # One head compares one token, the other two.
    for group, compared in enumerate((len(still), len(still) // 2)):
        query = _clear(attention.q_proj, group * shared, size)
        key = _clear(attention.k_proj, group, size)
        one = _orthonormal(compared, size, generator)
        query[still[:compared], 1:own] = one @ reduce
        key[still[:compared], own : own + size] = _LIFT * one
        if compared < len(still):
            two = _orthonormal(len(still) - compared, size, generator)
            query[still[compared:], own : own + size] = _LIFT * two
            key[still[compared:], own + size :] = _LIFT * two
        copied = _orthonormal(size, own - 1, generator)
        _clear(attention.v_proj, group, size)[:, 1:own] = copied
        part = slice(group * shared * size, (group * shared + 1) * size)
        attention.o_proj.weight[:, part] = 0
        attention.o_proj.weight[1:own, part] = _LIFT * copied.T
    attention.q_norm.weight.fill_(_SHARP_SAME)
    attention.k_norm.weight.fill_(_SHARP_SAME)


def _attention(model: DiffusionGemma, index: int) -> Attention:
    layer = model.layers[index]
    assert isinstance(layer, Layer)
    return layer.self_attn


def _frequencies(model: DiffusionGemma) -> Tensor:
    return model.rotations["sliding"].get_buffer("frequencies")


def _clear(projection: nn.Linear, head: int, size: int) -> Tensor:
    """The rows of one head, set to 0."""
    rows = projection.weight[head * size : (head + 1) * size]
    return rows.zero_()


def _turned(vector: Tensor, frequencies: Tensor, positions: float) -> Tensor:
    """A vector [A] as rotary embedding turns it by so many positions."""
    left, right = vector.chunk(2)
    cosine, sine = (frequencies * positions).cos(), (frequencies * positions).sin()
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine))


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal rows; there are at most as many as columns."""
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0]
    return basis.T
