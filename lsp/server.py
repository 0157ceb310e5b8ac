"""The bridge's language server: thin features over the modules beside it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException, JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer

from infilld.lsp.asking import Asker
from infilld.lsp.daemon import DaemonLink, State
from infilld.lsp.documents import Documents, encoding_named
from infilld.lsp.edit_params import READERS, EditParams
from infilld.lsp.edits import Edits
from infilld.lsp.inline import ACCEPTED, InlineCompletions
from infilld.lsp.live import LiveJobs
from infilld.lsp.options import parse_options
from infilld.lsp.protocol import BridgeProtocol

STATUS = "infilld.status"
_STATUS_WAIT_S = 2.0
# What a selection is offered: the kind, the command and what the user reads.
_ACTIONS: Mapping[types.CodeActionKind, tuple[str, str]] = {
    types.CodeActionKind.QuickFix: ("repair", "Repair with infilld"),
    types.CodeActionKind.RefactorRewrite: ("rewrite", "Write anew with infilld"),
}

log = logging.getLogger(__name__)


class BridgeServer(LanguageServer):
    """One editor's bridge: its documents, its link to the daemon, its live requests."""

    protocol: BridgeProtocol

    def __init__(self) -> None:
        # Before pygls' part: the protocol it makes uses them.
        self.documents = Documents()
        self.link = DaemonLink(self._tell)
        self.asker = Asker(self.link)
        self.live = LiveJobs()
        self.inline = InlineCompletions(self.documents, self.asker, self.live)
        self.edits = Edits(self.documents, self.asker, self.live)
        self.commands: dict[str | int, asyncio.Task[dict[str, Any]]] = {}
        self.problems: list[str] = []
        super().__init__(
            "infilld",
            version("infilld"),
            protocol_cls=BridgeProtocol,
            # One thread waits for the editor's next line; nothing else is done on threads here.
            max_workers=1,
        )

    def report_server_error(self, error: Exception, source: Any) -> None:
        """Write it to the log; while the user types nothing may pop up."""
        log.error("%s: %s", getattr(source, "__name__", source), error, exc_info=error)

    def _tell(self, state: State, why: str) -> None:
        log.info("daemon %s: %s", state, why)
        kind = types.MessageType.Warning if state == "failed" else types.MessageType.Info
        self.window_log_message(types.LogMessageParams(kind, f"infilld: {why}"))


def create_server() -> BridgeServer:
    """Return a bridge with all its features; `start_io` runs it."""
    server = BridgeServer()
    server.feature(types.INITIALIZE)(_initialize)
    server.feature(types.INITIALIZED)(_initialized)
    server.feature(types.WORKSPACE_DID_CHANGE_WORKSPACE_FOLDERS)(_folders_changed)
    server.feature(types.SHUTDOWN)(_shutdown)
    server.feature(types.TEXT_DOCUMENT_INLINE_COMPLETION, types.InlineCompletionOptions())(
        _inline_completion
    )
    server.feature(
        types.TEXT_DOCUMENT_CODE_ACTION, types.CodeActionOptions(code_action_kinds=list(_ACTIONS))
    )(_code_actions)
    for what in READERS:
        server.feature(f"infilld/{what}")(_edit_request(what))
        server.command(f"infilld.{what}")(_edit_command(what))
    server.command(STATUS)(_status)
    server.command(ACCEPTED)(_accepted)
    return server


def _initialize(ls: BridgeServer, params: types.InitializeParams) -> None:
    """Take over the encoding pygls has agreed on, the folders and the options."""
    ls.documents.encoding = encoding_named(ls.workspace.position_encoding or "utf-16")
    folders = [folder.uri for folder in params.workspace_folders or []]
    ls.asker.roots = folders or [root for root in [params.root_uri] if root]
    ls.asker.options, ls.problems = parse_options(params.initialization_options)
    about = params.capabilities.workspace
    ls.inline.gives_commands = about is not None and about.execute_command is not None
    ls.link.may_start = ls.asker.options.start_daemon


def _initialized(ls: BridgeServer, params: types.InitializedParams) -> None:
    """Complain about options once, then look for the daemon."""
    if ls.problems:
        text = "infilld: " + " ".join(ls.problems)
        log.warning("%s", text)
        ls.window_show_message(types.ShowMessageParams(types.MessageType.Warning, text))
    ls.link.begin()


def _folders_changed(ls: BridgeServer, params: types.DidChangeWorkspaceFoldersParams) -> None:
    """Name documents by their new folders."""
    ls.asker.roots = [folder.uri for folder in ls.workspace.folders.values()]


async def _shutdown(ls: BridgeServer, params: None) -> None:
    """Let go of the daemon, which goes on for other editors."""
    await ls.link.close()


async def _inline_completion(
    ls: BridgeServer, params: types.InlineCompletionParams
) -> types.InlineCompletionList | None:
    """Fill the gap at the cursor."""
    return await ls.inline.answer(params)


def _code_actions(ls: BridgeServer, params: types.CodeActionParams) -> list[types.CodeAction]:
    """Offer to repair or rewrite a selection; each is a command that does the work later."""
    if params.range.start == params.range.end or ls.documents.get(params.text_document.uri) is None:
        return []
    support = (
        ls.client_capabilities.text_document and ls.client_capabilities.text_document.code_action
    )
    tags = [types.CodeActionTag.LlmGenerated] if support and support.tag_support else None
    more: Mapping[str, dict[str, object]] = {
        "repair": {"diagnostics": [_plain(each.range) for each in params.context.diagnostics]},
        "rewrite": {"instruction": ""},
    }
    shared = {"textDocument": {"uri": params.text_document.uri}, "range": _plain(params.range)}
    return [
        types.CodeAction(
            title=title,
            kind=kind,
            tags=tags,
            command=types.Command(title, f"infilld.{what}", arguments=[{**shared, **more[what]}]),
        )
        for kind, (what, title) in _ACTIONS.items()
        if _is_asked_for(kind.value, params.context.only)
    ]


def _is_asked_for(kind: str, only: Sequence[types.CodeActionKind | str] | None) -> bool:
    # "refactor" asks for "refactor.rewrite" too; an empty kind for all.
    return only is None or any(
        not each or f"{kind}.".startswith(f"{each}.") for each in map(_text, only)
    )


def _text(kind: types.CodeActionKind | str) -> str:
    return kind.value if isinstance(kind, types.CodeActionKind) else kind


def _plain(place: types.Range) -> dict[str, dict[str, int]]:
    """A range as JSON; arguments of commands are sent as they are."""
    return {
        "start": {"line": place.start.line, "character": place.start.character},
        "end": {"line": place.end.line, "character": place.end.character},
    }


def _edit_request(what: str) -> Callable[[BridgeServer, Any], Awaitable[dict[str, Any]]]:
    """The request that answers with an edit."""

    async def request(ls: BridgeServer, params: Any) -> dict[str, Any]:
        return await ls.edits.answer(what, _read(what, params))

    return request


def _edit_command(what: str) -> Callable[..., Awaitable[dict[str, Any] | None]]:
    """The command that has the editor apply the edit; its argument is the request's params."""

    async def command(ls: BridgeServer, *arguments: Any) -> dict[str, Any] | None:
        if len(arguments) != 1:
            raise JsonRpcInvalidParams(f"infilld.{what}: expected one argument")
        params = _read(what, arguments[0])
        # pygls lets a cancelled command run on: the protocol cancels this task by its number.
        number = ls.protocol.msg_id
        if number is None or not ls.protocol.is_awaited(number):
            return None
        task = asyncio.get_running_loop().create_task(ls.edits.answer(what, params))
        ls.commands[number] = task
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            del ls.commands[number]
        is_wanted = ls.protocol.is_awaited(number) and not task.cancelled()
        return await _applied(ls, what, task.result()) if is_wanted else None

    return command


def _read(what: str, raw: Any) -> EditParams:
    try:
        return READERS[what](raw)
    except ValueError as error:
        raise JsonRpcInvalidParams(f"{JsonRpcInvalidParams.MESSAGE}: {error}") from None


async def _applied(ls: BridgeServer, what: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Have the editor apply an answer's edit; says how that went."""
    edit, reason, why = answer["edit"], answer["reason"], answer["why"]
    is_applied = False
    if edit is not None:
        wanted = types.ApplyWorkspaceEditParams(edit=edit, label=f"infilld: {what}")
        try:
            result = await ls.workspace_apply_edit_async(wanted)
            is_applied, refusal = result.applied, result.failure_reason
        except JsonRpcException as error:
            refusal = str(error)
        if not is_applied:
            reason, why = "not_applied", refusal or "The editor did not apply the edit."
    if not is_applied and reason not in ("superseded", "closed"):
        # The user asked for it by hand, and editors drop what a command returns.
        text = f"infilld: nothing changed ({reason}). {why}".strip()
        ls.window_show_message(types.ShowMessageParams(types.MessageType.Info, text))
    return {"applied": is_applied, "reason": reason, "why": why}


async def _accepted(ls: BridgeServer, *arguments: Any) -> None:
    """Tell the daemon which suggestion was inserted: it prepares for what is asked next."""
    reply_id, choice = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(reply_id, str) or not isinstance(choice, int):
        raise JsonRpcInvalidParams(f"{ACCEPTED}: expected the id of a reply and a number")
    await ls.link.inserted(reply_id, choice)


async def _status(ls: BridgeServer, *arguments: Any) -> dict[str, object]:
    """Return what the bridge knows about the daemon, and how its last request went."""
    link = ls.link
    return {
        "state": link.state,
        "why": link.why,
        "url": link.daemon.url if link.daemon else None,
        "version": link.daemon.version if link.daemon else None,
        "model": await link.model(_STATUS_WAIT_S),
        "documents": len(ls.documents),
        "last": ls.asker.outcomes[-1] if ls.asker.outcomes else None,
    }
