"""Every byte comes back, for both kinds of vocabulary."""

import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import fim_tokenizer
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.engine.prompt import Controls
from infilld.engine.tokenizer import Tokenizer, healed

TOKENIZER = fim_tokenizer()
WORDS = fim_tokenizer(words=("return", "retry", " self", "größe"))


@given(st.text())
def test_round_trip(text: str) -> None:
    try:
        expected = text.encode()
    except UnicodeEncodeError:
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == expected


def test_half_a_character_is_left_out_of_the_text() -> None:
    ids = TOKENIZER.encode("aé")
    assert TOKENIZER.decode(ids[:-1]) == "aé".encode()[:-1]
    assert TOKENIZER.text(ids[:-1]) == "a"


def test_byte_fallback_vocabulary(tmp_path: Path) -> None:
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    vocab = {piece: i for i, piece in enumerate(["<bos>", *bytes_, "▁", "a", "b"])}
    bare = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    bare.normalizer = normalizers.Replace(" ", "▁")
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bare.add_special_tokens(["<bos>"])
    bare.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_folder(tmp_path)
    text = "a b\n\U0001f600"
    assert loaded.decode(loaded.encode(text)) == text.encode()
    assert Controls.of(loaded) is None
    assert loaded.control("<bos>") == 0
    assert vocab["<0x0A>"] in loaded.newline_ids


def test_some_controls_but_not_all_is_a_broken_checkpoint() -> None:
    with pytest.raises(CheckpointMismatch, match="filler"):
        Controls.of(fim_tokenizer(("<bos>", "<eos>", "<|fim_suffix|>", "<|fim_prefix|>")))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing):
        Tokenizer.from_folder(tmp_path)
    for content in ("{", json.dumps({"model": 3})):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointMismatch):
            Tokenizer.from_folder(tmp_path)


def test_a_stored_truncation_is_not_obeyed(tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(BPE(vocab={"a": 0, "<pad>": 1}, merges=[]))
    bare.enable_truncation(max_length=4)
    bare.enable_padding(length=9, pad_token="<pad>", pad_id=1)
    bare.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("a" * 6) == [0] * 6


def spelled(text: str) -> list[bytes]:
    """Tokens that extend a text, as bytes."""
    return sorted(WORDS.decode([token]) for token in WORDS.tokens_extending(text))


def test_tokens_that_extend_a_stem() -> None:
    assert spelled("ret") == [b"ret", b"retr", b"retry", b"retu", b"retur", b"return"]
    assert spelled("return") == [b"return"]
    assert spelled("returned") == []
    # Of ß there is a first half.
    assert spelled("grö") == ["größe".encode()[:n] for n in range(4, 8)]
    assert set(WORDS.tokens_extending("")) == set(range(WORDS.vocab_tokens)) - WORDS.control_ids


@given(st.sampled_from(["return", "retry", " self", "größe"]), st.integers(1, 8), st.text())
def test_extending_is_beginning_with(word: str, end: int, other: str) -> None:
    for stem in (word[:end], other):
        if any(0xD800 <= ord(c) < 0xE000 for c in stem):
            continue
        expected = {
            token
            for token in range(WORDS.vocab_tokens)
            if token not in WORDS.control_ids and WORDS.decode([token]).startswith(stem.encode())
        }
        assert set(WORDS.tokens_extending(stem)) == expected


def test_extending_is_fast_in_a_large_vocabulary() -> None:
    many = fim_tokenizer(words=tuple(f"word{n}" for n in range(20_000)))
    many.tokens_extending("w")
    started = time.perf_counter()
    found = many.tokens_extending("word19")
    assert time.perf_counter() - started < 0.05
    assert len(found) > 1000


@pytest.mark.parametrize(
    ("prefix", "stem"),
    [
        ("x = ret", "ret"),
        ("return", "return"),
        ("x self", " self"),
        ("x_", "_"),
        ("größ", "größ"),
        ("x grö", "grö"),
        ("aé", ""),  # no token spells é by itself
        ("x = ", ""),
        ("f(", ""),
        ("x\n", ""),
        ("", ""),
    ],
)
def test_an_unfinished_word_is_healed(prefix: str, stem: str) -> None:
    ids = [min(WORDS.control_ids), *WORDS.encode(prefix)]
    kept, found = healed(ids, prefix, WORDS)
    assert found == stem
    assert WORDS.decode(kept) + found.encode() == prefix.encode()
    assert ids[: len(kept)] == kept
    assert not stem or WORDS.tokens_extending(stem)


@given(st.text(alphabet="returny selfgröße_(\n😀"), st.integers(0, 20))
def test_healing_loses_nothing(prefix: str, cut: int) -> None:
    ids = WORDS.encode(prefix)[cut:]
    kept, stem = healed(ids, prefix, WORDS)
    assert WORDS.decode(kept) + stem.encode() == WORDS.decode(ids)


def test_healing_stops_at_a_control_token() -> None:
    mark = min(WORDS.control_ids)
    assert healed([mark], "ret", WORDS) == ([mark], "")


def test_names_of_controls_are_controls_in_a_template_only() -> None:
    bos, eos = WORDS.control("<bos>"), WORDS.control("<eos>")
    text = "<bos>return<eos>\n<eos"
    assert WORDS.encode_template(text) == [
        bos,
        *WORDS.encode("return"),
        eos,
        *WORDS.encode("\n<eos"),
    ]
    assert not WORDS.control_ids & set(WORDS.encode(text))
    assert fim_tokenizer(()).encode_template("<bos>") == fim_tokenizer(()).encode("<bos>")
