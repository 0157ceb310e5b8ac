"""A checkpoint is asked in the layout it was made for."""

import pytest
from tiny_tokenizers import chat_template, chat_tokenizer, fim_tokenizer

from infilld.engine.chat_prompt import ChatLayout
from infilld.engine.errors import Unsupported
from infilld.engine.layout import layout_of
from infilld.engine.prompt import Controls, FimLayout


def test_infill_marks_win_over_a_template() -> None:
    tokenizer = fim_tokenizer()
    controls = Controls.of(tokenizer)
    assert controls is not None
    for template in (None, chat_template()):
        layout = layout_of(tokenizer, template)
        assert isinstance(layout, FimLayout)
        assert layout.filler == controls.filler
        assert not layout.follows_instructions


def test_a_template_is_used_where_there_are_none() -> None:
    layout = layout_of(chat_tokenizer(), chat_template())
    assert isinstance(layout, ChatLayout)
    assert layout.filler is None
    assert layout.follows_instructions


def test_neither_is_refused() -> None:
    with pytest.raises(Unsupported, match="no infill tokens") as error:
        layout_of(chat_tokenizer(), None)
    assert "infilld models use starter" in error.value.remedy
