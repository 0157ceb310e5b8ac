"""What the output head says, read without keeping its logits."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infilld.kernels._launch import require_triton


class HeadReading(NamedTuple):
    """One distribution over V tokens for each of T positions, summed up.

    Attributes:
        argmax: [T] int64, the first of `top_ids`.
        log_probability: of the argmax [T] float32, nats.
        entropy_nats: [T] float32; 0 or more, or NaN.
        top_ids: [T, k] int64, the k best tokens by falling score.
        top_probabilities: [T, k] float32.
        sample: [T] int64, drawn with `uniforms`; None without.
        target_log_probability: of `targets`, nothing banned [T] float32, nats; None without.
    """

    argmax: Tensor
    log_probability: Tensor
    entropy_nats: Tensor
    top_ids: Tensor
    top_probabilities: Tensor
    sample: Tensor | None
    target_log_probability: Tensor | None


def head(
    hidden: Tensor,
    embedding: Tensor,
    *,
    softcap: float,
    temperature: Tensor,
    top: int,
    banned: Tensor | None,
    ban_row: Tensor | None,
    targets: Tensor | None,
    uniforms: Tensor | None,
    impl: Literal["gpu", "reference"],
) -> HeadReading:
    """Read the head's distribution at T positions.

    The score of a token is `hidden . embedding[token]` in float32, its logit
    `softcap * tanh(score / softcap) / temperature`. A banned token has probability 0 and the
    score -inf for everything but a target's log-probability.

    Tokens are ranked by score, equal scores by lower id. Ranking scores, not logits, tells apart
    what tanh rounds to the same number. The implementations add products in different orders, so
    scores that differ by no more than that rounding may be ranked either way. The GPU computes
    float32 scores of the 2k tokens (16 at least) that are best by 16 bits of tanh, equals by lower
    id: only where more than 8 that are not equal share the 16 bits of the k-th, it may miss one.

    A NaN score of a token that is not banned makes entropy, probabilities and log-probabilities of
    its position NaN, and so does a ban of all tokens. Ids are some tokens nevertheless, and the
    sample is the argmax: read the entropy before the tokens.

    The sample inverts the cumulative distribution in two draws: with u = uniforms[t, 0] the tile
    of 128 tokens in which the mass so far reaches (1 - u) of all, with uniforms[t, 1] likewise the
    token within it. Masses are summed exactly, in units of 2^-40 of the most probable token (of
    the tile's most probable one). The GPU weighs the tokens of a tile by logits rounded to
    softcap / 32767 / temperature.

    Args:
        hidden: normed hidden states [T, D] float32, bfloat16 or float16; T may be 0.
        embedding: tied head [V, D] in the same dtype; D is contiguous.
        softcap: above 0.
        temperature: [T] float32, above 0, which is not checked.
        top: k, 1 to V.
        banned: [B, V] bool: sets of tokens that may not be taken; None: nothing is banned.
        ban_row: [T] int64, each position's row of `banned`; None exactly when `banned` is.
        targets: [T] int64, tokens whose log-probability is asked.
        uniforms: [T, 2] float32 in [0, 1).
        impl: implementation; nothing falls back to another one.

    Raises:
        ValueError: shapes, dtypes, devices, strides or numbers are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, DiffusionGemma's head and sampler. Differs: no logits are kept,
        and one position takes two random numbers, not V.
    """
    _check(hidden, embedding, softcap, temperature, top, banned, ban_row, targets, uniforms)
    if impl == "gpu":
        require_triton("head")
        from infilld.kernels.gpu.head import head as run
    elif impl == "reference":
        from infilld.kernels.reference.head import head as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return HeadReading(
        *run(
            hidden,
            embedding,
            softcap=softcap,
            temperature=temperature,
            top=top,
            banned=banned,
            ban_row=ban_row,
            targets=targets,
            uniforms=uniforms,
        )
    )


def _check(
    hidden: Tensor,
    embedding: Tensor,
    softcap: float,
    temperature: Tensor,
    top: int,
    banned: Tensor | None,
    ban_row: Tensor | None,
    targets: Tensor | None,
    uniforms: Tensor | None,
) -> None:
    if hidden.ndim != 2 or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}, "
            "expected float32, bfloat16 or float16 [T, D]"
        )
    if embedding.ndim != 2 or embedding.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"embedding is {list(embedding.shape)}, expected [V, D] with D = {hidden.shape[1]}"
        )
    if embedding.stride(1) != 1 and embedding.shape[1] > 1:
        raise ValueError(f"embedding has strides {embedding.stride()}, expected D contiguous")
    if not 0 < softcap < math.inf:
        raise ValueError(f"{softcap=}: expected above 0")
    tokens, vocab = len(hidden), len(embedding)
    if not 1 <= top <= vocab:
        raise ValueError(f"{top=}: expected 1 to {vocab} tokens")
    if (banned is None) != (ban_row is None):
        raise ValueError("banned and ban_row belong together: give both or neither")
    if banned is not None and banned.ndim != 2:
        raise ValueError(f"banned is {list(banned.shape)}, expected [B, V]")
    rows = 0 if banned is None else len(banned)
    expected: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "embedding": (embedding, hidden.dtype, tuple(embedding.shape)),
        "temperature": (temperature, torch.float32, (tokens,)),
        "banned": (banned, torch.bool, (rows, vocab)),
        "ban_row": (ban_row, torch.int64, (tokens,)),
        "targets": (targets, torch.int64, (tokens,)),
        "uniforms": (uniforms, torch.float32, (tokens, 2)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} on {hidden.device}"
            )
