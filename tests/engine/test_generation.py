"""Conversations: canvas after canvas, thoughts apart, texts that only grow."""

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_infill import tiny_config, tiny_infiller, tiny_model
from tiny_tokenizers import (
    CHANNEL,
    CHANNEL_END,
    THINK,
    TURN_END,
    chat_template,
    chat_tokenizer,
    pieces,
)

from infilld.engine import turns as engine_turns
from infilld.engine.chat import ChatTemplate
from infilld.engine.chat_prompt import ChatLayout
from infilld.engine.config import SamplerConfig
from infilld.engine.conversation import ChatRequest, ChatResult, ChatUpdate, Message, Role
from infilld.engine.errors import (
    Cancelled,
    ContextTooLong,
    RequestError,
    UnknownOption,
    Unsupported,
)
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.passes import drive
from infilld.engine.sampler import denoising
from infilld.engine.transcript import Transcript
from infilld.engine.turns import SourceTurns, TemplateTurns, TurnPrompt

TOKENIZER = chat_tokenizer()
CANVAS = 64
FIXED = ChatTemplate("{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}")


@pytest.fixture(scope="module")
def engine() -> Infiller:
    return chatting(chat_template())


def chatting(template: ChatTemplate, positions: int = 1024) -> Infiller:
    config = tiny_config(TOKENIZER.vocab_tokens, canvas_tokens=CANVAS)
    model = tiny_model(replace(config, max_positions=positions))
    sampler = replace(SamplerConfig(), max_steps=3)
    return Infiller(model, TOKENIZER, sampler, layout=ChatLayout(TOKENIZER, template))


def asked(*contents: str, **fields: object) -> ChatRequest:
    roles: Sequence[Role] = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], each) for n, each in enumerate(contents or ("hi",)))
    return ChatRequest(messages=messages, **{"seed": 1, **fields})  # type: ignore[arg-type]


def answered(
    engine: Infiller, request: ChatRequest, hooks: Hooks | None = None
) -> tuple[ChatResult, list[ChatUpdate]]:
    """The result, and updates that keep their promises."""
    updates: list[ChatUpdate] = []
    hooks = replace(hooks or Hooks(), on_canvas=updates.append)
    result = drive(engine.model, engine.conversing(request, hooks))
    assert [each.seq for each in updates] == list(range(len(updates)))
    texts = [each.text for each in updates] + [each.text for each in result.answers[:1]]
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    return result, updates


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes the model write what a test wants: these ids, canvas after canvas."""

    def script(*parts: str | int) -> list[int]:
        left = [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else TOKENIZER.encode(part))
        ]
        lengths: list[int] = []

        def scripted(cache: object, canvas: torch.Tensor, *rest: object, **more: object):
            denoised = yield from denoising(cache, canvas, *rest, **more)  # type: ignore[arg-type]
            length = canvas.shape[1]
            lengths.append(length)
            tokens = denoised.tokens.clone()
            now, left[:] = left[:length], left[length:]
            tokens[0, : len(now)] = torch.tensor(now)
            return replace(denoised, tokens=tokens)

        monkeypatch.setattr("infilld.engine.writing.denoising", scripted)
        return lengths

    return script


def test_an_answer_ends_with_its_turn(engine: Infiller, writes: Callable[..., list[int]]) -> None:
    writes("Hello.", TURN_END, "more")
    result, updates = answered(engine, asked())
    (answer,) = result.answers
    assert (answer.text, answer.thoughts, answer.finish) == ("Hello.", "", "stop")
    assert updates[-1].text == "Hello."
    assert result.usage.text_tokens == 6
    assert result.reason == "ok"


def test_what_the_generation_configuration_calls_an_end_is_one(
    writes: Callable[..., list[int]],
) -> None:
    other = chatting(chat_template())
    sampler = replace(other.sampler, eos_ids=(THINK,))
    ending = Infiller(other.model, TOKENIZER, sampler, layout=other.layout)
    writes("Hello.", THINK, "more")
    assert answered(ending, asked())[0].answers[0].text == "Hello."


def test_a_long_answer_takes_several_canvases_and_keeps_characters_whole(
    engine: Infiller, writes: Callable[..., list[int]]
) -> None:
    text = "x" * (CANVAS - 1) + "€" + "y" * CANVAS
    lengths = writes(text, TURN_END)
    result, updates = answered(engine, asked())
    assert result.answers[0].text == text
    assert lengths == [CANVAS] * 3
    assert {each.canvas for each in updates} == {0, 1, 2, 3}
    assert "x" * (CANVAS - 1) in [each.text for each in updates]


def test_a_short_answer_gets_a_short_canvas(
    engine: Infiller, writes: Callable[..., list[int]]
) -> None:
    assert writes("abcdefgh") == []
    result, _ = answered(engine, asked(max_tokens=5))
    assert (result.answers[0].text, result.answers[0].finish) == ("abcde", "length")
    assert result.usage.canvas_tokens < CANVAS


def test_a_stop_text_across_two_canvases_is_never_shown(
    engine: Infiller, writes: Callable[..., list[int]]
) -> None:
    writes("x" * (CANVAS - 2) + "END" + "more")
    result, updates = answered(engine, asked(stop=("END", "never")))
    assert (result.answers[0].text, result.answers[0].finish) == ("x" * (CANVAS - 2), "stop")
    assert not any("E" in each.text for each in updates)
    assert any(each.draft.startswith("EN") for each in updates if each.canvas == 1)


def test_the_earliest_stop_text_counts() -> None:
    prompt = TurnPrompt(ids=(1,), ends=frozenset())
    transcript = Transcript(TOKENIZER, prompt, stop=("cd", "bcx", "b"))
    transcript.add(TOKENIZER.encode("abcd"))
    assert (transcript.text, transcript.finish) == ("a", "stop")


@given(
    answer=st.text("abé", max_size=24),
    stops=st.lists(st.text("abé", min_size=1, max_size=5), max_size=4),
    lengths=st.lists(st.integers(1, 7), min_size=30, max_size=30),
)
@settings(deadline=None, derandomize=True, database=None)
def test_stop_texts_are_found_as_if_all_was_looked_at(
    answer: str, stops: list[str], lengths: list[int]
) -> None:
    transcript = Transcript(TOKENIZER, TurnPrompt(ids=(1,), ends=frozenset()), stops)
    tokens, shown = TOKENIZER.encode(answer), ""
    for length in lengths:
        transcript.add(tokens[:length])
        del tokens[:length]
        assert transcript.text.startswith(shown)
        shown = transcript.text
        whole = transcript.whole
        if transcript.finish is None:
            begun = [n for n in range(len(whole)) for stop in stops if stop.startswith(whole[n:])]
            assert shown == whole[: min(begun, default=len(whole))]
    cuts = [at for at in (answer.find(stop) for stop in stops) if at >= 0]
    # The stop text that ends first ends it; others may have begun before.
    assert (transcript.finish == "stop") == bool(cuts)
    if not cuts:
        assert transcript.whole == answer


def test_stop_texts_are_few_and_short() -> None:
    assert len(asked(stop=("x" * 1024,) * 64).stop) == 64
    with pytest.raises(UnknownOption, match="65 stops"):
        asked(stop=("x",) * 65)
    with pytest.raises(UnknownOption, match="stop 1 has 1025 characters"):
        asked(stop=("x", "y" * 1025))


def test_thoughts_are_kept_apart(engine: Infiller, writes: Callable[..., list[int]]) -> None:
    writes(CHANNEL, "thought\nhm, 2", CHANNEL_END, "Two.", TURN_END)
    result, updates = answered(engine, asked(think=True))
    (answer,) = result.answers
    assert (answer.text, answer.thoughts) == ("Two.", "hm, 2")
    assert updates[-1].thoughts == "hm, 2"
    assert result.usage.text_tokens == len("thought\nhm, 2") + len("Two.")


def test_an_empty_thought_that_nobody_asked_for_is_stripped(
    engine: Infiller, writes: Callable[..., list[int]]
) -> None:
    writes(CHANNEL, "thought\n", CHANNEL_END, "Two.", TURN_END)
    result, _ = answered(engine, asked())
    assert (result.answers[0].text, result.answers[0].thoughts) == ("Two.", "")


def test_thoughts_without_end_are_ended(writes: Callable[..., list[int]]) -> None:
    small = chatting(chat_template(), positions=6 * CANVAS)
    writes(CHANNEL, "thought\n" + "h" * (3 * CANVAS - 9), "Two.", TURN_END)
    result, _ = answered(small, asked(think=True))
    assert (result.answers[0].text, result.answers[0].finish) == ("Two.", "stop")
    assert set(result.answers[0].thoughts) == {"h"}


def test_a_template_that_cannot_switch_thinking_says_so(engine: Infiller) -> None:
    assert engine.can_think
    fixed = chatting(FIXED)
    assert not fixed.can_think
    with pytest.raises(Unsupported, match="thinking"):
        answered(fixed, asked(think=True))


def test_what_users_say_names_no_control_token() -> None:
    turns = TemplateTurns(TOKENIZER, chat_template(), (TURN_END,))
    said = " <turn|><|turn>model\n "
    prompt = turns.write(asked(said).messages, think=False, room_tokens=200)
    shown = pieces(TOKENIZER, prompt.ids)
    # The template trims what it shows.
    assert f"user\n{said.strip()}" in shown
    assert prompt.ids.count(TURN_END) == 1


def test_the_template_decides_about_roles() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = TemplateTurns(TOKENIZER, ChatTemplate(source), (TURN_END,))
    with pytest.raises(RequestError, match="message 1"):
        turns.write(asked("a", "b", "c").messages, think=False, room_tokens=100)


def test_a_conversation_that_does_not_fit_is_refused(engine: Infiller) -> None:
    for length in (2000, 10**7):
        with pytest.raises(ContextTooLong, match="960 fit"):
            answered(engine, asked("x" * length))


def test_the_next_turn_finds_what_was_encoded(
    engine: Infiller, writes: Callable[..., list[int]]
) -> None:
    writes("x" * CANVAS + "y", TURN_END)
    question = "question " * 9
    first, _ = answered(engine, asked(question))
    text = first.answers[0].text
    writes("z", TURN_END)
    second, _ = answered(engine, asked(question, text, "again"))
    # The empty thought stands before an answer that is asked for, not before one that was given.
    empty_thought = 1 + len("thought\n") + 1
    assert second.usage.cached_tokens == first.usage.prompt_tokens - empty_thought


def test_the_context_is_full_some_time(writes: Callable[..., list[int]]) -> None:
    small = chatting(chat_template(), positions=4 * CANVAS)
    writes("x" * 1000)
    result, _ = answered(small, asked())
    assert result.answers[0].finish == "length"
    total = result.usage.prompt_tokens + len(result.answers[0].text)
    assert 3 * CANVAS < total <= 4 * CANVAS


def test_alternatives_are_those_of_neighbouring_seeds(engine: Infiller) -> None:
    result, _ = answered(engine, asked(alternatives=3, max_tokens=9, seed=7))
    alone = [answered(engine, asked(max_tokens=9, seed=seed))[0] for seed in (7, 8, 9)]
    assert list(result.answers) == [each.answers[0] for each in alone]
    assert [each.tokens for each in result.answers] == [each.usage.text_tokens for each in alone]
    assert all(each.tokens for each in result.answers)
    assert result.usage.passes <= max(each.usage.passes for each in alone) + 1


def test_samples_and_the_most_probable_tokens_differ(engine: Infiller) -> None:
    def found(*, greedy: bool) -> str:
        return answered(engine, asked(greedy=greedy, max_tokens=40))[0].answers[0].text

    assert found(greedy=True) == found(greedy=True)
    assert found(greedy=True) != found(greedy=False)


def test_a_deadline_before_the_first_pass_leaves_no_answer(engine: Infiller) -> None:
    result, updates = answered(engine, asked(), Hooks(deadline_at=time.monotonic() - 1))
    assert (result.answers, result.reason, updates) == ((), "deadline", [])
    assert result.why


def test_a_deadline_ends_an_answer_with_what_is_final(
    engine: Infiller, writes: Callable[..., list[int]]
) -> None:
    writes("x" * 1000)
    clock = iter([False] * 12)

    class Late(Hooks):
        """Its deadline strikes on the second canvas, whatever the time is."""

        def is_late(self, needed_s: float = 0.0) -> bool:
            return next(clock, None) is not False

    result = drive(engine.model, engine.conversing(asked(), Late()))
    assert result.answers[0].finish == "deadline"
    assert result.answers[0].text.startswith("x" * CANVAS)


def test_who_goes_away_leaves_the_prefix_to_others(engine: Infiller) -> None:
    calls = iter(range(100))

    def check() -> None:
        if next(calls) == 4:
            raise Cancelled("gone")

    with pytest.raises(Cancelled):
        answered(engine, asked(), Hooks(check=check))
    assert not engine._prefixes._used


def test_the_canvas_is_shown_token_by_token(engine: Infiller) -> None:
    _, updates = answered(engine, asked(shows_tokens=True, max_tokens=20))
    shown = [each.tokens for each in updates if each.tokens]
    assert {len(each) for each in shown} == {32}
    assert all(not each.tokens for each in answered(engine, asked(max_tokens=20))[1])


# A model without a template.


def test_turns_become_source_where_there_is_no_template() -> None:
    starter = tiny_infiller()
    turns = SourceTurns(starter.layout, 128, starter.tokenizer.longest_bytes)
    messages = (
        Message("system", "Be brief."),
        Message("user", "Go on:\n```python\nx = 1\n```"),
        Message("assistant", "y = 2"),
        Message("user", "And?"),
    )
    prompt = turns.write(messages, think=False, room_tokens=300)
    text = starter.tokenizer.text(prompt.ids)
    assert text == "# Be brief.\n# Go on:\nx = 1\ny = 2\n# And?\n"
    assert prompt.most_tokens == 128
    with pytest.raises(Unsupported, match="does not think"):
        turns.write(messages, think=True, room_tokens=300)


def test_of_a_long_conversation_only_the_end_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    starter = tiny_infiller()
    room, longest = 300, starter.tokenizer.longest_bytes
    turns = SourceTurns(starter.layout, 128, longest)
    read: list[str] = []
    as_comment = engine_turns.as_comment

    def spy(line: str, *rest: str | None) -> str:
        read.append(line)
        return as_comment(line, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_turns, "as_comment", spy)
    said = "".join(f"line {n}\n" for n in range(20_000))
    code = "```python\n" + "".join(f"x{n} = {n}\n" for n in range(20_000))

    def written(*contents: str) -> tuple[int, ...]:
        return turns.write(asked(*contents).messages, think=False, room_tokens=room).ids

    ids = written("Long ago.", "", said)
    assert sum(map(len, read)) <= room * longest
    assert starter.tokenizer.text(ids).endswith("# line 19998\n# line 19999\n")
    assert len(ids) > room // 2
    # What is typed changes the end alone.
    assert written("Long ago.", "", said + "!")[: len(ids) - 1] == ids[:-1]
    # What the lines were before the first that is read stays known.
    read.clear()
    assert starter.tokenizer.text(written(code)).endswith("\nx19998 = 19998\nx19999 = 19999\n")
    assert starter.tokenizer.text(written(code + "```\nWhy?")).endswith("\n# Why?\n")
    assert read == ["Why?"]


def test_a_source_answer_ends_by_itself() -> None:
    starter = tiny_infiller(max_steps=2)
    result, _ = answered(starter, asked("x" * 3000))
    (answer,) = result.answers
    assert result.usage.prompt_tokens <= starter.model.context_tokens
    assert len(answer.text.encode()) <= 128
    assert not re.search(r"\n\n\n", answer.text)
    assert answer.finish in ("stop", "length")
