"""`textDocument/inlineCompletion`: one live request per document, fresh or silent."""

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from lsprotocol import types

from infilld.lsp.asking import Asker
from infilld.lsp.documents import Documents, Snapshot, has_lone_surrogate
from infilld.lsp.filters import Silence, silence_for
from infilld.lsp.gap import Gap, fill_of, gap_at, item_for, typed_since, window
from infilld.lsp.live import Job, LiveJobs

if TYPE_CHECKING:
    from infilld.server import wire

_WHAT = "inline completion"
# The editor runs it when an item was inserted: reply id, number of the choice.
ACCEPTED = "infilld.accepted"


class InlineCompletions:
    """Answers inline completion requests; lives on the bridge's event loop.

    `gives_commands`: each item has the editor say that it was inserted.
    """

    def __init__(self, documents: Documents, asker: Asker, live: LiveJobs) -> None:
        self._documents = documents
        self._asker = asker
        self._live = live
        self.gives_commands = False

    async def answer(
        self, params: types.InlineCompletionParams
    ) -> types.InlineCompletionList | None:
        """Return items; an empty list when there is nothing to show, None when superseded.

        Cancelling this coroutine closes the request to the daemon.
        """
        # No await before the job is registered: the snapshot is the document at receipt.
        uri = params.text_document.uri
        started_s = time.monotonic()
        is_invoked = params.context.trigger_kind is types.InlineCompletionTriggerKind.Invoked
        if not is_invoked and self._live.has_edit(uri):
            # Asked by the editor, not by the user, who waits for the edit.
            return self._silent(
                Silence("busy", "An edit of this document is being written."), started_s
            )
        self._live.stop(uri, "superseded")
        gap = self._gap(params)
        if isinstance(gap, Silence):
            return self._silent(gap, started_s)
        task = asyncio.get_running_loop().create_task(self._ask(gap, is_invoked))
        job = Job(task, fits=partial(_fits, gap))
        await self._live.run(uri, job)
        if job.stopped == "superseded":
            return None
        if job.stopped is not None:
            return self._silent(Silence(job.stopped, "The document changed meanwhile."), started_s)
        reply = task.result()
        if isinstance(reply, Silence):
            return self._silent(reply, started_s)
        return self._shaped(gap, reply, started_s)

    def _gap(self, params: types.InlineCompletionParams) -> Gap | Silence:
        snapshot = self._documents.get(params.text_document.uri)
        if snapshot is None:
            return Silence("not_open", "The editor has not opened this document.")
        silence = silence_for(snapshot, self._asker.options)
        if silence is not None:
            return silence
        gap = gap_at(snapshot, params)
        if gap is None:
            return Silence("filtered", "The selected menu entry replaces more than one line.")
        if has_lone_surrogate(gap.lead):
            return Silence("filtered", "The selected menu entry holds half a surrogate pair.")
        return gap

    async def _ask(self, gap: Gap, is_invoked: bool) -> "wire.InfillReply | Silence":
        options = self._asker.options
        return await self._asker.ask(
            gap.snapshot,
            partial(self._content, gap, is_invoked),
            deadline_ms=(
                options.invoked_deadline_ms if is_invoked else options.automatic_deadline_ms
            ),
            wait_s=options.daemon_wait_ms / 1000 if is_invoked else 0.0,
        )

    def _content(self, gap: Gap, is_invoked: bool) -> dict[str, Any]:
        options = self._asker.options
        part = window(gap, options.before_chars, options.after_chars)
        return {
            "text": part.text,
            "spans": [{"start": part.gap, "end": part.gap}],
            "pins": [{"span": 0, "at": "start", "text": gap.pin}] if gap.pin else None,
            "n": options.alternatives if is_invoked else 1,
        }

    def _shaped(
        self, gap: Gap, reply: "wire.InfillReply", started_s: float
    ) -> types.InlineCompletionList:
        if not reply.choices:
            return self._silent(Silence(reply.reason, reply.why), started_s)
        now = self._documents.get(gap.snapshot.uri)
        items: dict[str, types.InlineCompletionItem] = {}
        for number, choice in enumerate(reply.choices):
            fill = fill_of(gap, choice.spans[0].text) if choice.spans else None
            item = item_for(gap, fill, now) if now and fill is not None else None
            if item is not None:
                if self.gives_commands:
                    item.command = types.Command("infilld", ACCEPTED, arguments=[reply.id, number])
                items.setdefault(str(item.insert_text), item)
        if not items:
            return self._silent(Silence("stale", "The document has moved on."), started_s)
        self._asker.note(_WHAT, "ok", f"alternatives: {len(items)}", started_s)
        return types.InlineCompletionList(items=list(items.values()))

    def _silent(self, silence: Silence, started_s: float) -> types.InlineCompletionList:
        self._asker.note(_WHAT, silence.reason, silence.why, started_s)
        return types.InlineCompletionList(items=[])


def _fits(gap: Gap, now: Snapshot) -> bool:
    """Whether the document has changed in no other way than by typing into the gap."""
    return typed_since(gap, now) is not None
