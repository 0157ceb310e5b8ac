"""`infilld/rewrite`, `infilld/fillGaps`, `infilld/repair`: one edit of what was asked for.

Each answers with a versioned edit of the given ranges and of nothing else, or with none and a
reason. An edit is for the document as it was asked about; one that has changed meanwhile gets none.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsprotocol import types

from infilld.lsp.asking import Asker
from infilld.lsp.documents import (
    Documents,
    Snapshot,
    has_lone_surrogate,
    line_end_near,
    with_line_feeds,
)
from infilld.lsp.edit_params import EditParams
from infilld.lsp.filters import Silence, silence_for
from infilld.lsp.gap import reach
from infilld.lsp.live import Job, LiveJobs

PLACEHOLDER = "<|gap|>"
"""Marks a gap in the text of a document; no language has it, and it can be typed."""

# Side by side they are one gap.
_PLACEHOLDERS = re.compile(f"(?:{re.escape(PLACEHOLDER)})+")

Offsets = tuple[int, int]
_STOPPED = {
    "superseded": "A newer request for this document came.",
    "stale": "The document changed meanwhile.",
    "closed": "The document was closed.",
}


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is asked of the daemon.

    Attributes:
        snapshot: the document when the request came.
        ranges: what the edit replaces in it.
        text: what the model reads; the document, without the placeholders it is to fill.
        spans: the ranges in that text.
        instruction: what to do with them.
        repair: what is suspected in that text; None: no repair.
    """

    snapshot: Snapshot
    ranges: Sequence[Offsets]
    text: str
    spans: Sequence[Offsets]
    instruction: str | None = None
    repair: Sequence[Offsets] | None = None


class Edits:
    """Answers edit requests; lives on the bridge's event loop."""

    def __init__(self, documents: Documents, asker: Asker, live: LiveJobs) -> None:
        self._documents = documents
        self._asker = asker
        self._live = live

    async def answer(self, what: str, params: EditParams) -> dict[str, Any]:
        """Return `{edit, reason, why}`; the edit is None where the reason is not `ok`.

        Cancelling this coroutine closes the request to the daemon.
        """
        # No await before the job is registered: the snapshot is the document at receipt.
        started_s = time.monotonic()
        self._live.stop(params.uri, "superseded")
        wanted = self._answerable(params)
        edit = wanted if isinstance(wanted, Silence) else await self._edit(wanted)
        if isinstance(edit, Silence):
            self._asker.note(what, edit.reason, edit.why, started_s)
            return {"edit": None, "reason": edit.reason, "why": edit.why}
        self._asker.note(what, "ok", "", started_s)
        return {"edit": edit, "reason": "ok", "why": ""}

    def _answerable(self, params: EditParams) -> _Wanted | Silence:
        snapshot = self._documents.get(params.uri)
        if snapshot is None:
            return Silence("not_open", "The editor has not opened this document.")
        silence = silence_for(snapshot, self._asker.options)
        if silence is not None:
            return silence
        if has_lone_surrogate(params.instruction or ""):
            return Silence("filtered", "The instruction holds half a surrogate pair.")
        if params.ranges is None:
            return _placeholders(snapshot)
        spans = [_offsets(snapshot, each) for each in params.ranges]
        if not spans:
            return Silence("no_gap", "The list of ranges is empty.")
        return _Wanted(
            snapshot=snapshot,
            ranges=spans,
            text=snapshot.text,
            spans=spans,
            instruction=params.instruction,
            repair=None
            if params.suspects is None
            else _suspected(snapshot, spans, params.suspects),
        )

    async def _edit(self, wanted: _Wanted) -> types.WorkspaceEdit | Silence:
        """Ask the daemon, unless the document moves."""
        snapshot, options = wanted.snapshot, self._asker.options
        content = self._content(wanted)
        asking = self._asker.ask(
            snapshot,
            lambda: content,
            deadline_ms=options.edit_deadline_ms,
            wait_s=options.daemon_wait_ms / 1000,
        )
        task = asyncio.get_running_loop().create_task(asking)
        job = Job(task, fits=lambda now: now.text == snapshot.text, is_edit=True)
        await self._live.run(snapshot.uri, job)
        if job.stopped is not None:
            return Silence(job.stopped, _STOPPED[job.stopped])
        reply = task.result()
        if isinstance(reply, Silence):
            return reply
        if not reply.choices:
            return Silence(reply.reason, reply.why)
        now = self._documents.get(snapshot.uri)
        if now is None or now.text != snapshot.text:
            return Silence("stale", _STOPPED["stale"])
        spans = reply.choices[0].spans
        if [{"start": span.start, "end": span.end} for span in spans] != content["spans"]:
            return Silence("not_infilld", "The daemon answered for other spans.")
        return _workspace_edit(now, wanted.ranges, [span.text for span in spans])

    def _content(self, wanted: _Wanted) -> dict[str, Any]:
        """The request's body: the text from the first span to the last, and some around it."""
        text, options = wanted.text, self._asker.options
        start, end = min(span[0] for span in wanted.spans), max(span[1] for span in wanted.spans)
        at, to = reach(text, start, end, options.before_chars, options.after_chars)

        def moved(ranges: Sequence[Offsets]) -> list[dict[str, int]]:
            return [{"start": first - at, "end": last - at} for first, last in ranges]

        return {
            "text": text[at:to],
            "spans": moved(wanted.spans),
            "instruction": wanted.instruction,
            "repair": None if wanted.repair is None else moved(wanted.repair),
        }


def _workspace_edit(
    now: Snapshot, ranges: Sequence[Offsets], texts: Sequence[str]
) -> types.WorkspaceEdit | Silence:
    edits = []
    for (start, end), text in sorted(zip(ranges, texts, strict=True)):
        new = with_line_feeds(text).replace("\n", line_end_near(now.text, start))
        if new != now.text[start:end]:
            edits.append(types.TextEdit(now.range_at(start, end), new))
    if not edits:
        return Silence("unchanged", "The model left the text as it is.")
    document = types.OptionalVersionedTextDocumentIdentifier(uri=now.uri, version=now.version)
    return types.WorkspaceEdit(document_changes=[types.TextDocumentEdit(document, edits)])


def _placeholders(snapshot: Snapshot) -> _Wanted | Silence:
    # Left in the text, the model would take them for text that is to be written anew.
    ranges = [match.span() for match in _PLACEHOLDERS.finditer(snapshot.text)]
    if not ranges:
        return Silence("no_gap", f"The document holds no {PLACEHOLDER}.")
    spans, removed_chars = [], 0
    for start, end in ranges:
        spans.append((start - removed_chars,) * 2)
        removed_chars += end - start
    text = _PLACEHOLDERS.sub("", snapshot.text)
    return _Wanted(snapshot=snapshot, ranges=ranges, text=text, spans=spans)


def _offsets(snapshot: Snapshot, where: types.Range) -> Offsets:
    start = snapshot.offset_at(where.start)
    # Both ends may lie past the end of their line.
    return start, max(start, snapshot.offset_at(where.end))


def _suspected(
    snapshot: Snapshot, spans: Sequence[Offsets], suspects: Sequence[types.Range]
) -> list[Offsets]:
    """The parts of the suspects that lie within the spans, each once."""
    found = set()
    for suspect in suspects:
        first, last = _offsets(snapshot, suspect)
        for start, end in spans:
            if max(first, start) < min(last, end):
                found.add((max(first, start), min(last, end)))
    return sorted(found)
