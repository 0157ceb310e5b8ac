"""The shapes of the native REST interface, one model each.

The server, the client, the command line and the bridge share these, so nothing here imports the
engine or HTTP. Requests refuse unknown keys; replies ignore them, so an older client can read a
newer daemon. Offsets are code points of the request's text, ranges half-open `[start, end)`.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict


def _refuse_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate at code point {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_refuse_lone_surrogates)]
"""A string that can be encoded; every surrogate is part of a pair."""


MAX_DEADLINE_MS = 3_600_000
MAX_SEED = 2**63 - 1
MAX_TOKENS = 1_000_000
MAX_CHARS = 2**31 - 1
# Each is looked at for each span, or counted in the prompt: far more than anybody has use for.
MAX_CONTEXT_ITEMS = 256
MAX_REPAIRS = 256

# JSON's own types only: neither "3" nor 3.0 nor true is a count.
Count = Annotated[int, Field(strict=True)]
# Bounded, for whoever computes with them: a clock, a generator, an allocation.
Deadline = Annotated[int, Field(strict=True, ge=1, le=MAX_DEADLINE_MS)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
TokenCount = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKENS)]
Place = Annotated[int, Field(strict=True, ge=0, le=MAX_CHARS)]
Flag = Annotated[bool, Field(strict=True)]
Boldness = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_json(self) -> bytes:
        """The body as bytes, without the keys that hold their default."""
        return self.model_dump_json(exclude_defaults=True).encode()


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)


class Span(_Request):
    """Text that may change: `[start, end)` in code points; an empty range is a gap."""

    start: Count
    end: Count


class ContextItem(_Request):
    """Material from elsewhere that helps the model."""

    path: Text
    text: Text
    kind: Literal["open", "recent", "definition", "diagnostic", "clipboard"]


class Pin(_Request):
    """Text that the result of one span must start or end with; `span` is its index."""

    span: Count
    at: Literal["start", "end"]
    text: Text


_GAP: JsonDict = {
    "text": "def area(w, h):\n    return \n",
    "spans": [{"start": 27, "end": 27}],
    "path": "shapes.py",
    "deadline_ms": 500,
}
_REWRITE: JsonDict = {
    "text": "total = 0\nfor x in xs:\n    total += x\n",
    "spans": [{"start": 0, "end": 38}],
    "language": "python",
    "instruction": "use sum",
    "n": 2,
    "stream": True,
}


class InfillRequest(_Request):
    """Body of `POST /v1/infill`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_GAP, _REWRITE]})

    text: Text
    """The document, or a window of it."""
    spans: list[Span]
    """What may change; an empty range is a gap. No two share text."""
    document: Text | None = None
    """Opaque key of the document: a newer request with the same key supersedes this one."""
    path: Text | None = None
    """File name, for the prompt and the filters."""
    language: Text | None = None
    """Language identifier, such as `python`; null: that of the path."""
    instruction: Text | None = None
    """What to do with the selected text; not every model follows instructions."""
    context: Annotated[list[ContextItem], Field(max_length=MAX_CONTEXT_ITEMS)] | None = None
    """Material from elsewhere; what helps is read, as far as there is room."""
    pins: list[Pin] | None = None
    """Text that results must start or end with."""
    draft: list[Text | None] | None = None
    """A text to start from for each span, null where there is none."""
    repair: Annotated[list[Span], Field(max_length=MAX_REPAIRS)] | None = None
    """Suspected text within the spans, whose other text is kept; an empty list lets the model find
    what is suspicious, null asks for no repair."""
    n: Count = 1
    """How many different answers are wanted, up to 8."""
    min_tokens: TokenCount | None = None
    """Fewest tokens of each fill."""
    max_tokens: TokenCount | None = None
    """Most tokens of each fill; null: chosen from the kind of gap."""
    boldness: Boldness | None = None
    """0 shows only what is nearly certain, 1 whatever is not broken; null: the model's own."""
    deadline_ms: Deadline | None = None
    """Milliseconds from arrival after which what is certain is shown."""
    seed: Seed | None = None
    """Of every random draw; null: drawn and returned."""
    stream: Flag = False
    """Answer with events, one after every pass."""
    think: Flag = False
    """Let the model reason before it writes."""
    warm: Flag = False
    """Only encode the prompt; choices come back empty."""
    background: Flag = False
    """Every other request goes first."""
    show_tokens: Flag = False
    """With `stream`: every event shows the canvas token by token."""


class SpanText(_Reply):
    """New text of `[start, end)`; `confidence` is a mean probability, 0 to 1."""

    start: int
    end: int
    text: str
    confidence: float


class Choice(_Reply):
    """One answer for all spans; `score` is the mean log-probability per token, nats."""

    spans: list[SpanText]
    score: float


class Usage(_Reply):
    """What the request cost; `text_tokens` are those of the best answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    canvas_tokens: int = 0
    passes: int = 0
    text_tokens: int = 0


class Timings(_Reply):
    """Milliseconds of each phase."""

    queue_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    total_ms: float = 0.0


class InfillReply(_Reply):
    """Reply of `POST /v1/infill`, and data of `event: done`.

    `choices` are best first. No choices is an answer: `reason` is its code and `why` one sentence.
    """

    id: str
    model: str
    seed: int
    choices: list[Choice]
    reason: str
    why: str
    usage: Usage
    timings: Timings


class DraftSpan(_Reply):
    """A span's whole text as it stands; the first `settled` code points are final."""

    text: str
    settled: int


class CanvasToken(_Reply):
    """A position of the canvas: its most probable token, and what becomes of it.

    `given` is pinned, `settled` certain and unchanged, `accepted` kept its proposal, `noise` will
    be drawn anew. `span` is the number of the span it belongs to, null where it is given;
    `entropy` counts nats. A filler stands where no text is wanted. Part of a character is U+FFFD.
    """

    text: str
    entropy: float
    state: Literal["given", "settled", "accepted", "noise"]
    span: int | None = None
    filler: bool = False


class CanvasEvent(_Reply):
    """Data of `event: canvas`: the hypothesis that is best now.

    `seq` counts events from 0, also those that a slow reader is spared; `canvas` the canvases of a
    long answer; `passes` (`pass` on the wire) the forwards done on this canvas. `revised` says that
    settled text was taken back.
    `tokens` are there for requests with `show_tokens`.
    """

    id: str
    seq: int
    canvas: int
    passes: int = Field(validation_alias="pass", serialization_alias="pass")
    spans: list[DraftSpan]
    revised: bool = False
    tokens: list[CanvasToken] = []


class Feedback(_Request):
    """Body of `POST /v1/feedback`: what became of choice number `choice` of an answer.

    `shown`, then `inserted` (all of it), `partly` (its first `chars` code points) or `dismissed`;
    `retained`: what was inserted still stands later. The answer is an empty 204.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "3f1c9b0a", "choice": 0, "event": "inserted"}]}
    )

    id: Text
    choice: Place = 0
    event: Literal["shown", "inserted", "partly", "dismissed", "retained"]
    chars: Place | None = None


class ErrorBody(_Reply):
    """What went wrong, and one sentence on what to do about it (may be empty).

    `type` and `param` (the key that is wrong) are what clients of OpenAI's and llama.cpp's look at.
    """

    code: str
    message: str
    remedy: str = ""
    type: str = ""
    param: str | None = None


class ErrorReply(_Reply):
    """Body of every answer that is not a 2xx, and data of `event: error`."""

    error: ErrorBody


class LoadingError(_Reply):
    """Why `/health` answers 503, in the words of llama.cpp."""

    code: int
    message: str
    type: str


class Health(_Reply):
    """Reply of `GET /health`.

    llama.cpp's clients look at `status`, which is there with a 200, and at `error`, which is there
    with a 503.
    """

    api: int
    version: str
    state: Literal["loading", "ready", "failed"]
    status: Literal["ok"] | None = None
    error: LoadingError | None = None


class SwitchRequest(_Request):
    """Body of `POST /v1/model`: the absolute path of a checkpoint, or "starter"."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "starter"}]})

    model: Text


class SwitchReply(_Reply):
    """Reply of `POST /v1/model`: the model until the other is loaded, and the engine's state."""

    model: str
    state: str
