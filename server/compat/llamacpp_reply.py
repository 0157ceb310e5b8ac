"""The shapes of llama.cpp's answers."""

from collections.abc import Sequence
from typing import Any

from infilld.engine.request import InfillResult
from infilld.server.compat.asking import Answered, Asked, Shaped

Json = dict[str, Any]


def full(
    asked: Asked, answered: Answered, choice: Shaped, *, index: int, model: str, settings: Json
) -> Json:
    """One finished answer, every field of it.

    Args:
        asked, answered: of the job. choice: the text. index: its rank.
        model: its name. settings: `generation_settings`.
    """
    result = answered.result
    used = result.usage
    return {
        "index": index,
        "content": choice.text,
        # The daemon tells no numbers of tokens: they mean nothing outside one checkpoint.
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": model,
        "tokens_predicted": choice.tokens,
        "tokens_evaluated": used.prompt_tokens,
        "generation_settings": settings,
        "prompt": asked.prefix,
        "has_new_line": "\n" in choice.text,
        "truncated": False,
        "stop_type": _stop_type(result, choice),
        "stopping_word": choice.stopped_by or "",
        "tokens_cached": used.cached_tokens,
        "timings": timings(result, choice.tokens),
        "infilld": answered.extension,
    }


def _stop_type(result: InfillResult, choice: Shaped) -> str:
    if choice.stopped_by is not None:
        return "word"
    return "limit" if choice.finish == "length" or result.reason == "deadline" else "eos"


def timings(result: InfillResult, predicted_tokens: int) -> Json:
    """Times of a job; what was cached was not evaluated."""
    used, spent = result.usage, result.timings
    return {
        "cache_n": used.cached_tokens,
        **_phase("prompt", used.prompt_tokens - used.cached_tokens, spent.encode_ms),
        **_phase("predicted", predicted_tokens, spent.denoise_ms),
    }


def _phase(name: str, tokens: int, spent_ms: float) -> Json:
    return {
        f"{name}_n": tokens,
        f"{name}_ms": spent_ms,
        f"{name}_per_token_ms": spent_ms / tokens if tokens else 0.0,
        f"{name}_per_second": 1000 * tokens / spent_ms if spent_ms else 0.0,
    }


def chosen(reply: Json, fields: Sequence[object] | None) -> Json:
    """The fields a client wants, by paths with slashes, which stay the names of their keys.

    What is not there is left out, whatever is asked for. No fields: all of them.
    """
    if not fields:
        return reply
    found = {}
    for path in fields:
        value: object = reply
        for key in str(path).split("/"):
            if not isinstance(value, dict) or key not in value:
                break
            value = value[key]
        else:
            found[str(path)] = value
    return found
