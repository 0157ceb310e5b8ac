"""Mercury's `POST /v1/edit/completions`: the next edit of a marked region.

The user's message is a document between tags:

    <|recently_viewed_code_snippets|>  each a <|recently_viewed_code_snippet|>, whose first line is
                                       code_snippet_file_path: PATH
    <|current_file_content|>           current_file_path: PATH, then text, and in it
        <|code_to_edit|> region, with <|cursor|> in it <|/code_to_edit|>
    <|edit_diff_history|>              unified diffs

and the answer the region as it should stand next, between ``` lines. A line end behind `tag>` and
one before the last ``` belong to the tags. Clients take away the first ``` and the last, so the
region may hold others.

A model that was taught to follow instructions writes the region anew. Of one that was not, a new
text for all of it would be a guess; it fills the gap at the cursor, and the rest stays. Where
nothing is suggested the region comes back as it is.
"""

import re
import time
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from infilld.engine.errors import UnknownOption, Unsupported
from infilld.engine.request import Context, InfillRequest, InfillResult, Span
from infilld.server.compat import fields
from infilld.server.compat.asking import Answered, Shaped, canvas_tokens
from infilld.server.compat.mistral import FimReply, Writer
from infilld.server.http.answering import answer
from infilld.server.jobs import Jobs
from infilld.server.wire import MAX_CONTEXT_ITEMS, Text

CURSOR = "<|cursor|>"
FENCE = "```"
_SNIPPET_START = "<|recently_viewed_code_snippet|>"
_SNIPPET_END = "<|/recently_viewed_code_snippet|>"
_SNIPPET_PATH = re.compile(r"code_snippet_file_path:[ \t]*(.*)\n?")
_FILE_PATH = re.compile(r"current_file_path:[ \t]*(.*)\n?")
_INSTRUCTION = "Continue the recent edits: write this code as it should stand next."


@dataclass(frozen=True)
class Document:
    """A tagged document.

    Attributes:
        before, region, after: text of the file. cursor: place in `region`; None: not told.
        path: of the file. context: other files, and the last edits.
    """

    before: str
    region: str
    after: str
    cursor: int | None
    path: str | None
    context: tuple[Context, ...]


def parse(content: str) -> Document:
    """Read a tagged document.

    Raises:
        UnknownOption: it has no region to edit.
    """
    head, opened, rest = content.partition("<|code_to_edit|>")
    region, closed, tail = rest.partition("<|/code_to_edit|>")
    if not opened or not closed:
        raise UnknownOption(
            "the message has no <|code_to_edit|> … <|/code_to_edit|>",
            remedy="Mark the region that may change, and in it the <|cursor|>.",
        )
    region = region.removeprefix("\n")
    cursor = region.find(CURSOR)
    outside, opened, before = head.rpartition("<|current_file_content|>")
    after, closed, history = tail.removeprefix("\n").partition("<|/current_file_content|>")
    if not opened or not closed:
        # The region stands alone.
        outside, before, after, history = head, "", "", tail
    before = before.removeprefix("\n")
    path = _FILE_PATH.match(before) or _FILE_PATH.search(outside)
    if path is not None and path.re.match(before):
        before = before[path.end() :]
    return Document(
        before=before.replace(CURSOR, ""),
        region=region.replace(CURSOR, ""),
        after=after.replace(CURSOR, ""),
        cursor=None if cursor < 0 else cursor,
        path=path[1].strip() if path is not None else None,
        context=(*_snippets(outside + history), *_edits(outside + history)),
    )


def _snippets(text: str) -> list[Context]:
    found: list[Context] = []
    at = 0
    while len(found) < MAX_CONTEXT_ITEMS:
        start = text.find(_SNIPPET_START, at)
        end = text.find(_SNIPPET_END, start)
        if start < 0 or end < 0:
            break
        snippet = text[start + len(_SNIPPET_START) : end].removeprefix("\n")
        path = _SNIPPET_PATH.match(snippet)
        body = snippet[path.end() :] if path else snippet
        found.append(Context(path[1].strip() if path else "", body, "recent"))
        at = end
    return found


def _edits(text: str) -> list[Context]:
    _, _, rest = text.partition("<|edit_diff_history|>")
    diffs, _, _ = rest.partition("<|/edit_diff_history|>")
    return [Context("recent edits", diffs.strip("\n"), "recent")] if diffs.strip() else []


class Part(fields.Body):
    """A part of a message."""

    type: Text | None = None
    text: Text | None = None


class Message(fields.Body):
    """One turn."""

    role: Text
    content: Text | list[Part] | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class EditRequest(fields.Body):
    """Body of `POST /v1/edit/completions`; the last user message is the tagged document."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "any",
                    "messages": [
                        {
                            "role": "user",
                            "content": "<|recently_viewed_code_snippets|>\n"
                            "<|/recently_viewed_code_snippets|>\n"
                            "<|current_file_content|>\ncurrent_file_path: add.py\n"
                            "<|code_to_edit|>\ndef add(a, b):\n    return <|cursor|>\n"
                            "<|/code_to_edit|>\n<|/current_file_content|>\n"
                            "<|edit_diff_history|>\n<|/edit_diff_history|>\n",
                        }
                    ],
                }
            ]
        }
    )

    model: Text | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: fields.Whole | None = None
    seed: fields.Whole | None = None
    stream: fields.Flag | None = None
    temperature: fields.Number | None = None

    def document(self) -> Document:
        """The tagged document.

        Raises:
            UnknownOption: there is none. Unsupported: it is to be streamed.
        """
        if self.stream:
            raise Unsupported("an edit is answered whole", remedy="Leave `stream` out.")
        users = [message for message in self.messages if message.role == "user"]
        return parse(users[-1].text if users else "")


def router(jobs: Jobs) -> APIRouter:
    """The route over one engine."""
    routes = APIRouter()

    @routes.post("/v1/edit/completions", response_model=FimReply)
    async def edit(asked: EditRequest, request: Request) -> JSONResponse:
        """Suggest the next edit of the region between `<|code_to_edit|>` tags."""
        document = asked.document()
        wanted = wanted_of(jobs, document, asked)
        result = await answer(jobs, wanted, request)
        region = edited(document, wanted, result).removesuffix("\n")
        answered = Answered(result, (Shaped(tokens=result.usage.text_tokens),))
        writer = Writer(jobs.model, int(time.time()))
        return JSONResponse(writer.reply(answered, [f"{FENCE}\n{region}\n{FENCE}"]))

    return routes


def wanted_of(jobs: Jobs, document: Document, asked: EditRequest) -> InfillRequest:
    """What the loaded model can do about a region.

    Raises:
        RequestError: see `InfillRequest`.
    """
    text = document.before + document.region + document.after
    start = len(document.before)
    whole = Span(start, start + len(document.region))
    follows = bool(jobs.worker.describe().get("follows_instructions")) and bool(document.region)
    if follows:
        span = whole
    else:
        place = whole.end if document.cursor is None else start + document.cursor
        if place > start and document.cursor is None and document.region.endswith("\n"):
            place -= 1
        span = Span(place, place)
    span = Span(_undivided(text, span.start), _undivided(text, span.end))
    most = fields.bound(asked.max_tokens)
    return InfillRequest(
        text=text,
        spans=(span,),
        path=document.path,
        context=document.context,
        instruction=_INSTRUCTION if follows else None,
        max_tokens=max(1, min(most, canvas_tokens(jobs))) if most and not follows else None,
        seed=fields.seed_of(asked.seed),
    )


def _undivided(text: str, place: int) -> int:
    """A place that divides no line end."""
    return place - 1 if place and text[place - 1 : place + 1] == "\r\n" else place


def edited(document: Document, wanted: InfillRequest, result: InfillResult) -> str:
    """The region with the best answer in it; as it is where there is none."""
    (span,) = wanted.spans
    start, end = len(document.before), len(document.before) + len(document.region)
    if not result.alternatives or span.start < start:
        return document.region
    (fill,) = result.alternatives[0].spans
    return wanted.text[start : span.start] + fill.text + wanted.text[span.end : end]
