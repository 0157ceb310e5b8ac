"""Text to token ids and back to bytes, for byte-level and for byte-fallback vocabularies."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from infilld.engine.errors import CheckpointMismatch, CheckpointMissing

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# SentencePiece writes a space as this sign.
_SPACE_SIGN = "\u2581"


class Tokenizer:
    """The vocabulary of one checkpoint.

    Text is always text: a document that contains `<eos>` gets ordinary tokens for it, never the
    control token. Control tokens are asked for by name.

    Args:
        tokenizer: as loaded from `tokenizer.json`.
        byte_level: each character of a token stands for one byte; else tokens are UTF-8 text
            with `<0xNN>` for single bytes.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, byte_level: bool) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        # A file saved after a truncating call carries that, and would cut prompts in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = byte_level

    @classmethod
    def from_folder(cls, folder: Path, model_vocab_tokens: int | None = None) -> "Tokenizer":
        """Read `tokenizer.json`.

        Args:
            folder: checkpoint.
            model_vocab_tokens: V of the model that is to read its ids; None: not checked.

        Raises:
            CheckpointMissing: no such file.
            CheckpointMismatch: not a tokenizer of a known kind, or one that has ids beyond V.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointMissing(f"{folder} holds no tokenizer.json")
        try:
            content = path.read_text(encoding="utf-8")
            decoder = json.dumps(json.loads(content).get("decoder"))
            loaded = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception on malformed files
            raise CheckpointMismatch(f"{path} is not a tokenizer: {error}") from None
        made = cls(loaded, byte_level='"ByteLevel"' in decoder)
        if model_vocab_tokens is not None and made.vocab_tokens > model_vocab_tokens:
            raise CheckpointMismatch(
                f"{path} has {made.vocab_tokens} tokens, the model {model_vocab_tokens}"
            )
        return made

    @property
    def vocab_tokens(self) -> int:
        """How many ids there are, control tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of text; no control token is added or recognised."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Token ids of what a chat template wrote: names of control tokens stand for them.

        Text of a user does not belong in here: it could name them too.
        """
        if not self._controls:
            return self.encode(text)
        names = sorted(self._controls, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        # Every second piece is a name; what is between two of them is encoded by itself.
        return [
            token
            for number, piece in enumerate(pieces)
            for token in ([self._controls[piece]] if number % 2 else self.encode(piece))
        ]

    def control(self, name: str) -> int | None:
        """Id of a control token such as `<bos>`; None where this vocabulary has none."""
        found = self._tokenizer.token_to_id(name)
        return int(found) if found is not None and found in self.control_ids else None

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that never stand for text."""
        return frozenset(self._controls.values())

    @cached_property
    def _controls(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: int(i) for i, token in added.items() if token.special}

    def decode(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of the ids, control tokens left out; may end within a character."""
        return b"".join(self._bytes[i] for i in ids)

    def text(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that form no character are left out."""
        return self.decode(ids).decode("utf-8", errors="ignore")

    @cached_property
    def longest_bytes(self) -> int:
        """Bytes of the longest token: a text of n bytes has at least n / longest_bytes tokens."""
        return max(map(len, self._bytes))

    @cached_property
    def carriage_return_ids(self) -> Sequence[int]:
        """Ids whose text contains a carriage return."""
        return [i for i, piece in enumerate(self._bytes) if b"\r" in piece]

    @cached_property
    def newline_ids(self) -> Sequence[int]:
        """Ids whose text contains a line end."""
        return [i for i, piece in enumerate(self._bytes) if b"\n" in piece or b"\r" in piece]

    def tokens_extending(self, stem: str) -> Sequence[int]:
        """Ids whose bytes begin with those of a stem, the stem itself included.

        Control tokens have no bytes: they extend nothing, not even an empty stem.
        """
        spelled, ids = self._sorted
        start = stem.encode()
        first = bisect_left(spelled, start)
        # No byte of UTF-8 is 0xff, so the last one has a successor: where it would stand, what
        # begins with the stem has ended.
        last = bisect_left(spelled, start[:-1] + bytes([start[-1] + 1])) if start else len(ids)
        return ids[first:last]

    @cached_property
    def _sorted(self) -> tuple[list[bytes], tuple[int, ...]]:
        """Bytes of all tokens that have some, in order, and their ids."""
        pairs = sorted((piece, i) for i, piece in enumerate(self._bytes) if piece)
        return [piece for piece, _ in pairs], tuple(i for _, i in pairs)

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_tokens
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in self.control_ids:
                table[index] = self._token_bytes(token)
        return table

    def _token_bytes(self, token: str) -> bytes:
        if self._byte_level:
            return bytes(_BYTE_OF[c] for c in token) if _BYTE_OF.keys() >= set(token) else b""
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE_SIGN, " ").encode()


def healed(
    prefix_ids: Sequence[int], prefix_text: str, tokenizer: Tokenizer
) -> tuple[list[int], str]:
    """Ids without the last token of an unfinished word, and the text that they lack by it.

    The model knows a word by whole tokens: behind `ret` it would not write `urn`. Without that
    token, and held to those that extend its text, it can write `return`. Where the prefix ends
    otherwise, or no token alone could write the text again, nothing is dropped.

    Args:
        prefix_ids: of a prompt that ends with the prefix, or with a window of it.
        prefix_text: the prefix.
        tokenizer: theirs.
    """
    kept = list(prefix_ids)
    if not (prefix_text[-1:].isalnum() or prefix_text.endswith("_")):
        return kept, ""
    stem = b""
    while kept and kept[-1] not in tokenizer.control_ids:
        stem = tokenizer.decode([kept.pop()]) + stem
        try:
            text = stem.decode()
        except UnicodeDecodeError:  # it begins within a character
            continue
        if prefix_text.endswith(text) and tokenizer.tokens_extending(text):
            return kept, text
        break
    return list(prefix_ids), ""


def _byte_alphabet() -> dict[str, int]:
    """Byte that each character of a byte-level token stands for.

    Printable Latin-1 bytes stand for themselves, the others are numbered from U+0100 on.
    Source: the byte-level BPE of GPT-2, as the tokenizers library implements it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
