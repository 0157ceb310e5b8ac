"""What can go wrong, as one tree.

InfilldError                  .code (stable, snake_case)  .remedy (one sentence)
├─ RequestError               the caller can fix it
│  ├─ SpanOutOfRange  SpansOverlap  GapTooLong  ContextTooLong
│  └─ BadText  BadGrammar  UnknownOption  Unsupported
├─ ModelError                 the installation must be mended
│  └─ CheckpointMissing  CheckpointMismatch  UnsupportedDevice  NotEnoughMemory
├─ Unavailable                try again later
│  └─ Loading  Busy
├─ UnknownId                  nothing is known under this id
└─ Cancelled                  the client went away (superseded and deadline are results, not errors)

The message says what was found, what was expected and where; the remedy says what to do.
"""


class InfilldError(Exception):
    """Base of everything infilld raises on purpose."""

    code = "internal"
    remedy = ""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


class RequestError(InfilldError):
    """The request cannot be served as it was asked."""

    code = "bad_request"


class SpanOutOfRange(RequestError):
    """A span reaches past the text, or ends before it starts."""

    code = "span_out_of_range"
    remedy = "Give spans as half-open code-point offsets inside the text."


class SpansOverlap(RequestError):
    """Two spans share text."""

    code = "spans_overlap"
    remedy = "Give spans that do not share text."


class GapTooLong(RequestError):
    """A gap asks for more tokens than one canvas holds."""

    code = "gap_too_long"
    remedy = "Ask for fewer tokens or a shorter selection."


class ContextTooLong(RequestError):
    """The text cannot be cut down to what the model can read."""

    code = "context_too_long"
    remedy = "Send a smaller window of the document."


class BadText(RequestError):
    """The text is not Unicode that can be encoded (a lone surrogate)."""

    code = "bad_text"
    remedy = "Send valid Unicode: every surrogate must be part of a pair."


class BadGrammar(RequestError):
    """A schema, a pattern or a grammar is malformed, or asks for what cannot be enforced."""

    code = "bad_grammar"
    remedy = "Simplify it; the message says what cannot be served."


class UnknownOption(RequestError):
    """An option has a name or a value that means nothing here."""

    code = "unknown_option"


class Unsupported(RequestError):
    """The loaded model cannot do what was asked."""

    code = "unsupported"
    remedy = "Leave out what this model cannot do, or use another model."


class ModelError(InfilldError):
    """The model, or the machine, is not fit to run."""

    code = "model_error"


class CheckpointMissing(ModelError):
    """A file of the checkpoint is absent or cut off."""

    code = "checkpoint_missing"
    remedy = "Download the checkpoint again, all files of it."


class CheckpointMismatch(ModelError):
    """The tensors do not fit the configuration, or the configuration contradicts itself."""

    code = "checkpoint_mismatch"
    remedy = "Use config.json and tensors of one and the same checkpoint."


class UnsupportedDevice(ModelError):
    """The device cannot run this."""

    code = "unsupported_device"
    remedy = "Choose another device, for example --device cpu."


class NotEnoughMemory(ModelError):
    """The model does not fit."""

    code = "not_enough_memory"
    remedy = "Choose a smaller or quantized model."


class Unavailable(InfilldError):
    """Not now."""

    code = "unavailable"
    remedy = "Try again in a moment."


class Loading(Unavailable):
    """The model is still being loaded."""

    code = "loading"


class Busy(Unavailable):
    """The queue is full."""

    code = "busy"


class UnknownId(InfilldError):
    """An id names no answer, or one that is forgotten."""

    code = "unknown_id"
    remedy = "Send the id of one of the last answers."


class Cancelled(InfilldError):
    """The client went away before the answer was ready."""

    code = "cancelled"
