"""Prompts with the control tokens of other models, and code that is about them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infilld.engine.request import Context
from infilld.server.compat.markers import Divided, divided

P, S = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
STYLES = {
    "qwen": "<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
    "starcoder": "<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
    "code llama": "<PRE> {P} <SUF>{S} <MID>",
    "deepseek": "<｜fim▁begin｜>{P}<｜fim▁hole｜>{S}<｜fim▁end｜>",
    "glm": "<|code_prefix|>{P}<|code_suffix|>{S}<|code_middle|>",
    "codestral": "[SUFFIX]{S}[PREFIX]{P}",
}
SUFFIX_FIRST = {
    "qwen": "<|fim_suffix|>{S}<|fim_prefix|>{P}<|fim_middle|>",
    "starcoder": "<fim_prefix><fim_suffix>{S}<fim_middle>{P}",
    "code llama": "<PRE> <SUF>{S} <MID> {P}",
    "glm": "<|code_suffix|>{S}<|code_prefix|>{P}<|code_middle|>",
    "codestral": "[SUFFIX]{S}[PREFIX]{P}[MIDDLE]",
}
TEXTS = st.text(st.sampled_from("ab \n\r\té<>|[]"), max_size=12)


@pytest.mark.parametrize("style", STYLES)
@given(TEXTS, TEXTS)
def test_every_style_gives_back_what_was_put_in(style: str, prefix: str, suffix: str) -> None:
    assert divided(STYLES[style].format(P=prefix, S=suffix)) == Divided(prefix, suffix)


@pytest.mark.parametrize("style", SUFFIX_FIRST)
def test_the_suffix_may_come_first(style: str) -> None:
    assert divided(SUFFIX_FIRST[style].format(P=P, S=S)) == Divided(P, S)


@pytest.mark.parametrize("style", ["qwen", "starcoder", "deepseek", "glm"])
def test_text_behind_the_last_marker_goes_on_with_the_prefix(style: str) -> None:
    prompt = STYLES[style].format(P=P, S=S) + "a +"
    assert divided(prompt) == Divided(P + "a +", S)


def test_a_beginning_token_is_no_text() -> None:
    prompt = "<s>" + STYLES["codestral"].format(P=P, S=S)
    assert divided(prompt) == Divided(P, S)
    prompt = "<｜begin▁of▁sentence｜>" + STYLES["deepseek"].format(P=P, S=S)
    assert divided(prompt) == Divided(P, S)


def test_a_prefix_without_blanks_keeps_its_own() -> None:
    assert divided("<PRE>x = <SUF>\ny<MID>") == Divided("x = ", "\ny")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        P,
        "<|fim_prefix|>",
        f"<|fim_prefix|>{P}",
        f"<|fim_prefix|>{P}<|fim_suffix|>{S}",
        f"<|fim_middle|>{P}<|fim_prefix|>a<|fim_suffix|>",
        f"<fim_prefix>{P}<|fim_suffix|>{S}<fim_middle>",
        f"[PREFIX]{P}[SUFFIX]{S}",
        "[SUFFIX]\nkey = 1\n",
        'PROMPT = f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>"\n',
        '# Codestral\nf"[SUFFIX]{after}[PREFIX]{before}"\n',
        "<PRE> \n# no more",
    ],
)
def test_code_about_markers_stays_whole(prompt: str) -> None:
    assert divided(prompt) is None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("where", ["prefix", "suffix", "both"])
def test_a_gap_in_code_about_markers(style: str, where: str) -> None:
    line = 'PROMPT = f"' + STYLES[style].format(P="{before}", S="{after}") + '"\n'
    prefix = line + P if where in ("prefix", "both") else P
    suffix = S + line if where in ("suffix", "both") else S
    assert divided(STYLES[style].format(P=prefix, S=suffix)) == Divided(prefix, suffix)


@pytest.mark.parametrize("style", ["qwen", "starcoder", "deepseek", "glm"])
def test_a_gap_in_code_with_the_first_marker_alone(style: str) -> None:
    prefix = 'MARK = "' + STYLES[style].partition("{")[0] + '"\n'
    assert divided(STYLES[style].format(P=prefix, S=S)) == Divided(prefix, S)


def test_other_files_become_context() -> None:
    prompt = (
        "<|repo_name|>shop\n<|file_sep|>models.py\nclass Item:\n    pass\n"
        "<|file_sep|>empty.py\n\n<|file_sep|>app.py\n" + STYLES["qwen"].format(P=P, S=S)
    )
    context = (Context("models.py", "class Item:\n    pass\n"),)
    assert divided(prompt) == Divided(P, S, context, "app.py")


def test_the_head_of_the_file_with_the_gap_is_prefix() -> None:
    prompt = "<file_sep>app.py\nimport os\n" + STYLES["starcoder"].format(P=P, S=S)
    assert divided(prompt) == Divided("import os\n" + P, S, (), "app.py")


def test_codestral_has_its_files_in_the_prefix() -> None:
    prefix = f"+++++ models.py\nclass Item: ...\n\n+++++ app.py\n{P}"
    context = (Context("models.py", "class Item: ...\n\n"),)
    assert divided(f"[SUFFIX]{S}[PREFIX]{prefix}") == Divided(P, S, context, "app.py")
