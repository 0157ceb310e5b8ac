"""The next turn of a conversation: from a `ChatRequest` to its answers.

request ─turns─▶ prompt ─Writer─▶ canvas after canvas ─▶ transcript ─▶ answer, thoughts
                   └──── one for each answer that is wanted, side by side ────┘
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

from torch import Tensor

from infilld.engine.config import SamplerConfig
from infilld.engine.conversation import ChatAnswer, ChatRequest, ChatResult, ChatUpdate
from infilld.engine.draft import canvas_tokens, steady
from infilld.engine.errors import InfilldError
from infilld.engine.matching import GrammarTokens
from infilld.engine.pace import Pace
from infilld.engine.passes import CanvasModel, Work, together
from infilld.engine.prefixes import PrefixPool
from infilld.engine.prompt import PromptLayout
from infilld.engine.request import CanvasToken, Timings, Usage
from infilld.engine.sampler import Step
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.transcript import Transcript
from infilld.engine.turns import TurnPrompt, Turns, turns_of
from infilld.engine.writing import Watching, Writer

if TYPE_CHECKING:
    from infilld.engine.infill import Hooks

_MOST_SEEDS = 2**63


@dataclass
class _Teller:
    """Tells whoever watches how the first answer goes."""

    told: Callable[[ChatUpdate], None]
    tokenizer: Tokenizer
    shows_tokens: bool
    writer: Writer = field(init=False)
    _seq: int = field(default=0, init=False)
    _argmax: Tensor | None = field(default=None, init=False)

    def step(self, step: Step, final: Transcript, draft: Transcript, passes: int) -> None:
        """The canvas was refined."""
        tokens: tuple[CanvasToken, ...] = ()
        if self.shows_tokens:
            is_steady = steady(step, 0, self._argmax)
            self._argmax = step.argmax
            tokens = tuple(canvas_tokens(step, 0, is_steady, self.tokenizer, None))
        self._tell(final, draft, passes, tokens)

    def committed(self) -> None:
        """A canvas is final."""
        self._argmax = None
        final = self.writer.transcript
        self._tell(final, final, self.writer.passes)

    def _tell(
        self,
        final: Transcript,
        draft: Transcript,
        passes: int,
        tokens: tuple[CanvasToken, ...] = (),
    ) -> None:
        text = final.text
        self.told(
            ChatUpdate(
                seq=self._seq,
                canvas=self.writer.canvases,
                passes=passes,
                text=text,
                thoughts=final.thoughts,
                draft=draft.whole.removeprefix(text),
                tokens=tokens,
            )
        )
        self._seq += 1


class Converser:
    """Serves conversations with one model; not for several threads.

    Args:
        model: weights. tokenizer: its vocabulary. sampler: its generation configuration.
        layout: of its infills. prefixes: encoded before, shared with them.

    Attributes:
        grammar_tokens: its vocabulary as grammars see it.
    """

    def __init__(
        self,
        model: CanvasModel,
        tokenizer: Tokenizer,
        sampler: SamplerConfig,
        layout: PromptLayout,
        prefixes: PrefixPool,
    ) -> None:
        self._model, self._tokenizer, self._sampler = model, tokenizer, sampler
        self._layout, self._prefixes = layout, prefixes
        self.grammar_tokens = GrammarTokens(tokenizer, model.config.vocab_tokens)
        # Its own: canvases are larger than those of gaps, and nothing is scored behind them.
        self._pace = Pace()

    def work(self, request: ChatRequest, hooks: "Hooks") -> Work[ChatResult]:
        """Answer a request, as work that can share its passes with others.

        Raises:
            ContextTooLong: the conversation does not fit. Unsupported: more than the loaded model
            can do. RequestError: its template refuses the conversation. BadGrammar: see
            `refuse_bad`.
            ModelError: the model's output means nothing.
        """
        started = time.monotonic()
        seed = secrets.randbelow(_MOST_SEEDS) if request.seed is None else request.seed
        prompt = self._turns.write(
            request.messages, think=request.think, room_tokens=self._model.context_tokens
        )
        prompt = replace(prompt, ends=prompt.ends | set(self._sampler.eos_ids))
        writers = [
            self._writer(request, hooks, prompt, (seed + number) % _MOST_SEEDS, is_shown=not number)
            for number in range(request.alternatives)
        ]
        yield from together([writer.work() for writer in writers])
        total, encode_s = time.monotonic() - started, max(each.encode_s for each in writers)
        answers = tuple(
            ChatAnswer(each.text, each.thoughts, each.finish, each.tokens + each.thought_tokens)
            for writer in writers
            if (each := writer.transcript).finish is not None
            and (writer.canvases or each.finish != "deadline")
        )
        first = writers[0].transcript
        return ChatResult(
            id=secrets.token_hex(8),
            seed=seed,
            answers=answers,
            reason="ok" if answers else "deadline",
            why="" if answers else "The deadline struck before the first pass.",
            usage=Usage(
                prompt_tokens=len(prompt.ids),
                cached_tokens=writers[0].cached_tokens,
                canvas_tokens=sum(each.canvas_tokens for each in writers),
                # Canvases side by side share their passes.
                passes=max(each.passes for each in writers),
                text_tokens=first.tokens + first.thought_tokens,
            ),
            timings=Timings(
                encode_ms=1e3 * encode_s,
                denoise_ms=1e3 * (total - encode_s),
                total_ms=1e3 * total,
            ),
        )

    @property
    def can_think(self) -> bool:
        """Whether the model may be asked to think before it answers."""
        try:
            return self._turns.can_think
        except InfilldError:
            # Its template knows no conversation; whoever asks for one hears why.
            return False

    @cached_property
    def _turns(self) -> Turns:
        return turns_of(self._tokenizer, self._layout, self._model.config.canvas_tokens)

    def _writer(
        self, request: ChatRequest, hooks: "Hooks", prompt: TurnPrompt, seed: int, *, is_shown: bool
    ) -> Writer:
        max_tokens = request.max_tokens or prompt.most_tokens
        matching = None if request.grammar is None else self.grammar_tokens.start(request.grammar)
        stop = (*request.stop, *(prompt.closing if matching is None else ()))
        # A text under a grammar counts its own tokens: it may end with the last one.
        bound = max_tokens if matching is None else None
        teller = None
        if is_shown and hooks.on_canvas is not None:
            told = cast(Callable[[ChatUpdate], None], hooks.on_canvas)
            teller = _Teller(told, self._tokenizer, request.shows_tokens)
        writer = Writer(
            model=self._model,
            tokenizer=self._tokenizer,
            sampler=self._sampler,
            prefixes=self._prefixes,
            pace=self._pace,
            prompt=prompt,
            transcript=Transcript(self._tokenizer, prompt, stop, bound),
            seed=seed,
            greedy=request.greedy,
            max_tokens=max_tokens,
            grammar=matching,
            thinks_first=request.think,
            watching=Watching(
                on_step=None if teller is None else teller.step,
                on_canvas=None if teller is None else teller.committed,
                check=hooks.check,
                is_late=hooks.is_late,
            ),
        )
        if teller is not None:
            teller.writer = writer
        return writer
