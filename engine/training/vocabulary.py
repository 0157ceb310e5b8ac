"""A byte-level BPE of source code: words, single digits, runs of spaces, lines' indents."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from infilld.engine.prompt import BOS, EOS, FILLER, PAD, PREFIX_MARK, SUFFIX_MARK
from infilld.engine.tokenizer import Tokenizer

# Ids are positions: pad 0, eos 1, bos 2, as in DiffusionGemma.
CONTROLS = (PAD, EOS, BOS, "<|turn>", "<turn|>", SUFFIX_MARK, PREFIX_MARK, FILLER)

# A line end takes its indent along and nothing else merges across it; a word takes one space;
# digits stand alone, so that numbers are spelt the same everywhere.
_PIECES = Regex(r"\n *|\r|\t+| ?[A-Za-z_\p{L}]+|[0-9]| ?[^\sA-Za-z0-9_\p{L}]{1,3}| +(?= )|\s")


def train_vocabulary(texts: Iterable[str], vocab_tokens: int) -> tokenizers.Tokenizer:
    """A tokenizer with `vocab_tokens` ids, the control tokens first."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_tokens,
        special_tokens=list(CONTROLS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_vocabulary(tokenizer: tokenizers.Tokenizer, folder: Path, max_positions: int) -> None:
    """Write tokenizer.json, and the settings `transformers` needs to open it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def load_vocabulary(folder: Path) -> Tokenizer:
    """The engine's view of a saved vocabulary."""
    return Tokenizer.from_folder(folder)
