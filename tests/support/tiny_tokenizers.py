"""Vocabularies of bytes and a few words, and a template in the manner of this model's turns.

The template puts the turns as the released one does: a system turn where there is thinking, and
an empty thought where there is none.
"""

import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from infilld.engine import prompt
from infilld.engine.chat import ChatTemplate
from infilld.engine.tokenizer import Tokenizer

FIM_PIECES = (
    prompt.PAD,
    prompt.EOS,
    prompt.BOS,
    prompt.SUFFIX_MARK,
    prompt.PREFIX_MARK,
    prompt.FILLER,
)
PIECES = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
)
PAD, EOS, BOS, THINK, CHANNEL, CHANNEL_END, TURN, TURN_END = range(len(PIECES))

TEMPLATE = """{{- bos_token -}}
{%- if enable_thinking is defined and enable_thinking -%}
    {{- '<|turn>system\\n<|think|>\\n<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
    {{- message.content | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not (enable_thinking is defined and enable_thinking) -%}
        {{- '<|channel>thought\\n<channel|>' -}}
    {%- endif -%}
{%- endif -%}
"""


def bare_tokenizer(
    controls: tuple[str, ...] = PIECES, words: tuple[str, ...] = ()
) -> tokenizers.Tokenizer:
    """Tokens for single bytes, and for every beginning of two or more bytes of the words."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {piece: i for i, piece in enumerate((*controls, *sorted(level.alphabet())))}
    merges = []
    for word in words:
        spelled = "".join(piece for piece, _ in level.pre_tokenize_str(word))
        for end in range(1, len(spelled)):
            if spelled[: end + 1] not in vocab:
                merges.append((spelled[:end], spelled[end]))
                vocab[spelled[: end + 1]] = len(vocab)
    bare = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges))
    bare.pre_tokenizer = level
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(list(controls))
    return bare


def fim_tokenizer(controls: tuple[str, ...] = FIM_PIECES, words: tuple[str, ...] = ()) -> Tokenizer:
    """Control tokens of an infill, bytes, and words."""
    return Tokenizer(bare_tokenizer(controls, words), byte_level=True)


def chat_tokenizer(words: tuple[str, ...] = ()) -> Tokenizer:
    """Control tokens of turns and thoughts, bytes, and words."""
    return Tokenizer(bare_tokenizer(words=words), byte_level=True)


def chat_template(source: str = TEMPLATE) -> ChatTemplate:
    """The template above."""
    return ChatTemplate(source, {"bos_token": "<bos>"})


def pieces(tokenizer: Tokenizer, ids: tuple[int, ...]) -> list[int | str]:
    """A token stream to read: control tokens as ids, all text between two of them as one piece."""
    found: list[int | str] = []
    text: list[int] = []
    for token in (*ids, None):
        if token is not None and token not in tokenizer.control_ids:
            text.append(token)
            continue
        if text:
            # A small budget may cut within a character; no expected text holds what stands for it.
            found.append(tokenizer.decode(text).decode(errors="replace"))
            text = []
        if token is not None:
            found.append(token)
    return found
