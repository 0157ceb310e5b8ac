"""Which prompt layout a checkpoint wants."""

from typing import TYPE_CHECKING

from infilld.engine.chat_prompt import ChatLayout
from infilld.engine.errors import Unsupported
from infilld.engine.prompt import Controls, FimLayout, PromptLayout
from infilld.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from infilld.engine.chat import ChatTemplate


def layout_of(tokenizer: Tokenizer, template: "ChatTemplate | None") -> PromptLayout:
    """The layout of a checkpoint: that of its infill marks, else that of its chat template.

    Raises:
        Unsupported: it has neither.
        CheckpointMismatch: it has some of the marks, or a template no infill can be asked in.
    """
    controls = Controls.of(tokenizer)
    if controls is not None:
        return FimLayout(tokenizer, controls)
    if template is not None:
        return ChatLayout(tokenizer, template)
    raise Unsupported(
        "the loaded model cannot be asked to infill: "
        "its vocabulary has no infill tokens and it has no chat template",
        remedy="Use the starter model (`infilld models use starter`), or an instruction-tuned one.",
    )
