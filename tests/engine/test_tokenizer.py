"""Every byte comes back, for both kinds of vocabulary."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_infill import byte_tokenizer
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.engine.prompt import Controls
from infilld.engine.tokenizer import Tokenizer

TOKENIZER = byte_tokenizer()


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
        Controls.of(byte_tokenizer(("<bos>", "<eos>", "<|fim_suffix|>", "<|fim_prefix|>")))


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
