"""Tabby's requests: `POST /v1/completions` with `segments`, `/v1/events` and `/v1/health`.

A next-edit request asks for all of the code as it should stand next. What is filled in at its
cursor is the only edit that is suggested; where that is nothing, the code comes back as it is.
"""

import os
import platform
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from infilld.engine.errors import RequestError, UnknownId, UnknownOption
from infilld.engine.request import Context, ContextKind
from infilld.server.compat import fields
from infilld.server.compat.asking import Asked, ask, gap_of
from infilld.server.jobs import Event, Jobs
from infilld.server.wire import MAX_CHARS, Text

ID_PREFIX = "cmpl-"
_REMEMBERED_ANSWERS = 256
EXAMPLE: dict[str, Any] = {
    "language": "python",
    "segments": {
        "prefix": "def add(a, b):\n    return ",
        "suffix": "\n",
        "filepath": "add.py",
    },
}
NEXT_EDIT = "next_edit_suggestion"


class Snippet(fields.Body):
    """Code from elsewhere."""

    filepath: Text = ""
    body: Text = ""
    score: fields.Number | None = None


class EditHistory(fields.Body):
    """What was edited: the code before, the edits, and the code now."""

    original_code: Text | None = None
    edits_diff: Text | None = None
    current_version: Text


class Segments(fields.Body):
    """The code around the cursor, and what helps."""

    prefix: Text
    suffix: Text | None = None
    filepath: Text | None = None
    git_url: Text | None = None
    declarations: list[Snippet] | None = None
    relevant_snippets_from_changed_files: list[Snippet] | None = None
    relevant_snippets_from_recently_opened_files: list[Snippet] | None = None
    clipboard: Text | None = None
    edit_history: EditHistory | None = None

    def snippets(self) -> list[tuple[Snippet, ContextKind]]:
        """Code from elsewhere, the most useful first."""
        groups: list[tuple[list[Snippet] | None, ContextKind]] = [
            (self.declarations, "definition"),
            (self.relevant_snippets_from_changed_files, "recent"),
            (self.relevant_snippets_from_recently_opened_files, "open"),
        ]
        return [(snippet, kind) for group, kind in groups for snippet in group or []]

    def context(self) -> list[Context]:
        """All that helps, as the engine reads it."""
        found = [Context(each.filepath, each.body, kind) for each, kind in self.snippets()]
        if self.edit_history is not None and self.edit_history.edits_diff:
            found.append(Context("recent edits", self.edit_history.edits_diff, "recent"))
        if self.clipboard:
            found.append(Context("clipboard", self.clipboard, "clipboard"))
        return found


class DebugOptions(fields.Body):
    """What is asked for by those who look into it."""

    raw_prompt: Text | None = None
    return_snippets: fields.Flag | None = None
    return_prompt: fields.Flag | None = None
    disable_retrieval_augmented_code_completion: fields.Flag | None = None


class TabbyRequest(fields.Body):
    """Tabby's body of `POST /v1/completions`, told apart by `segments`."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    language: Text | None = None
    segments: Segments | None = None
    user: Text | None = None
    debug_options: DebugOptions | None = None
    temperature: fields.Number | None = None
    seed: fields.Whole | None = None
    mode: Text | None = None

    def asked(self) -> Asked:
        """What is asked.

        Raises:
            UnknownOption: there is nothing to complete.
        """
        debug, segments = self.debug_options, self.segments
        language, seed = self.language, fields.seed_of(self.seed)
        if debug is not None and debug.raw_prompt is not None:
            gap = gap_of(debug.raw_prompt, None)
            return Asked(
                prefix=gap.prefix,
                suffix=gap.suffix,
                context=gap.context,
                path=gap.path,
                language=language,
                seed=seed,
            )
        if segments is None:
            raise UnknownOption("no segments", remedy="Send the code as segments.prefix.")
        if self.mode == NEXT_EDIT and segments.edit_history is None:
            raise UnknownOption("no segments.edit_history", remedy=f"Send it with mode {NEXT_EDIT}")
        alone = debug is not None and debug.disable_retrieval_augmented_code_completion
        return Asked(
            prefix=segments.prefix,
            suffix=segments.suffix or "",
            context=() if alone else segments.context(),
            path=segments.filepath,
            language=language,
            seed=seed,
        )


class TabbyChoice(BaseModel):
    """A text; no suggestion is an empty one."""

    index: int
    text: str


class DebugData(BaseModel):
    """What was asked for in `debug_options`; the engine's prompt is tokens, and not told."""

    snippets: list[dict[str, Any]] | None = None
    prompt: str | None = None


class TabbyReply(BaseModel):
    """Tabby's reply of `POST /v1/completions`."""

    id: str
    choices: list[TabbyChoice]
    mode: str
    debug_data: DebugData | None = None


class TabbyEvent(fields.Body):
    """Body of `POST /v1/events`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"type": "select", "completion_id": "cmpl-3f1c", "choice_index": 0}]
        }
    )

    type: Literal["view", "select", "dismiss"]
    completion_id: Text
    choice_index: fields.Whole | None = None
    view_id: Text | None = None
    elapsed: fields.Number | None = None
    select_kind: Text | None = None


class TabbyVersion(BaseModel):
    """When and from what this was built; a package does not know."""

    build_date: str = ""
    build_timestamp: str = ""
    git_sha: str = ""
    git_describe: str


class TabbyHealth(BaseModel):
    """Reply of `/v1/health`."""

    model: str
    device: str
    arch: str
    cpu_info: str
    cpu_count: int
    cuda_devices: list[str]
    version: TabbyVersion


class Tabby:
    """Tabby's routes over one engine."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        # Length of the first line of each choice of the last answers: one may be taken alone.
        self._first_lines: OrderedDict[str, list[int]] = OrderedDict()

    def add_routes(self, routes: APIRouter) -> None:
        """Add the routes that are Tabby's alone."""
        routes.post("/v1/events", status_code=200, response_class=Response)(self.events)
        for route in (routes.get, routes.post):
            named: Callable[..., Any] = route("/v1/health", response_model=TabbyHealth)
            named(self.health)

    async def complete(self, body: TabbyRequest, request: Request) -> dict[str, Any]:
        """The reply to a completion request."""
        answer = await ask(self._jobs, body.asked(), request)
        first_lines = [len(each.text.partition("\n")[0]) for each in answer.choices]
        self._first_lines[answer.result.id] = first_lines
        if len(self._first_lines) > _REMEMBERED_ANSWERS:
            self._first_lines.popitem(last=False)
        reply: dict[str, Any] = {
            "id": ID_PREFIX + answer.result.id,
            "choices": [
                {"index": rank, "text": _text(body, each.text)}
                for rank, each in enumerate(answer.choices)
            ],
            "mode": body.mode or "standard",
            "infilld": answer.extension,
        }
        return reply | _debug_data(body)

    async def events(
        self, told: TabbyEvent, select_kind: Annotated[str | None, Query()] = None
    ) -> Response:
        """Say what became of a suggestion; one that is not known is passed over."""
        job_id = told.completion_id.removeprefix(ID_PREFIX)
        choice = told.choice_index or 0
        events: dict[str, Event] = {"view": "shown", "select": "inserted", "dismiss": "dismissed"}
        event, chars = events[told.type], None
        if event == "inserted" and "line" in (told.select_kind, select_kind):
            event, chars = "partly", self._first_line(job_id, choice)
        if 0 <= choice <= MAX_CHARS:
            self._tell(job_id, event, choice, chars)
        return Response(status_code=200)

    async def health(self) -> dict[str, Any]:
        """The model and the machine, in Tabby's words."""
        about = self._jobs.worker.describe()
        device = str(about.get("device") or "")
        return {
            "model": str(about["model"]),
            "device": device.partition(":")[0],
            "arch": platform.machine(),
            "cpu_info": platform.processor() or platform.machine(),
            "cpu_count": os.cpu_count() or 1,
            "cuda_devices": [device] if device.startswith("cuda") else [],
            "version": {
                "build_date": "",
                "build_timestamp": "",
                "git_sha": "",
                "git_describe": f"infilld {version('infilld')}",
            },
        }

    def _first_line(self, job_id: str, choice: int) -> int | None:
        known = self._first_lines.get(job_id, [])
        return known[choice] if 0 <= choice < len(known) else None

    def _tell(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        try:
            self._jobs.worker.feedback(job_id, event, choice=choice, chars=chars)
        except (UnknownId, RequestError):
            return
        self._jobs.observer.told(job_id, event, choice, chars)


def _text(body: TabbyRequest, text: str) -> str:
    """What a choice says: the fill, or for a next edit the code with it."""
    segments = body.segments
    if body.mode != NEXT_EDIT or segments is None or segments.edit_history is None:
        return text
    current = segments.edit_history.current_version
    if current != segments.prefix + (segments.suffix or ""):
        return current
    return segments.prefix + text + (segments.suffix or "")


def _debug_data(body: TabbyRequest) -> dict[str, Any]:
    debug, segments = body.debug_options, body.segments
    if debug is None or not (debug.return_prompt or debug.return_snippets):
        return {}
    snippets = None
    if debug.return_snippets and segments is not None:
        snippets = [
            {"filepath": each.filepath, "body": each.body, "score": each.score or 0.0}
            for each, _ in segments.snippets()
        ]
    return {"debug_data": {"snippets": snippets, "prompt": None}}
