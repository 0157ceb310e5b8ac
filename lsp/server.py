"""The bridge's language server: thin features over the modules beside it."""

import logging
from importlib.metadata import version
from typing import Any

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from infilld.lsp.daemon import DaemonLink, State
from infilld.lsp.documents import Documents, encoding_named
from infilld.lsp.inline import InlineCompletions
from infilld.lsp.options import parse_options
from infilld.lsp.protocol import BridgeProtocol

STATUS = "infilld.status"
_STATUS_WAIT_S = 2.0

log = logging.getLogger(__name__)


class BridgeServer(LanguageServer):
    """One editor's bridge: its documents, its link to the daemon, its live requests."""

    protocol: BridgeProtocol

    def __init__(self) -> None:
        # Before pygls' part: the protocol it makes uses them.
        self.documents = Documents()
        self.link = DaemonLink(self._tell)
        self.inline = InlineCompletions(self.documents, self.link)
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
    server.command(STATUS)(_status)
    return server


def _initialize(ls: BridgeServer, params: types.InitializeParams) -> None:
    """Take over the encoding pygls has agreed on, the folders and the options."""
    ls.documents.encoding = encoding_named(ls.workspace.position_encoding or "utf-16")
    folders = [folder.uri for folder in params.workspace_folders or []]
    ls.inline.roots = folders or [root for root in [params.root_uri] if root]
    ls.inline.options, ls.problems = parse_options(params.initialization_options)
    ls.link.may_start = ls.inline.options.start_daemon


def _initialized(ls: BridgeServer, params: types.InitializedParams) -> None:
    """Complain about options once, then look for the daemon."""
    if ls.problems:
        text = "infilld: " + " ".join(ls.problems)
        log.warning("%s", text)
        ls.window_show_message(types.ShowMessageParams(types.MessageType.Warning, text))
    ls.link.begin()


def _folders_changed(ls: BridgeServer, params: types.DidChangeWorkspaceFoldersParams) -> None:
    """Name documents by their new folders."""
    ls.inline.roots = [folder.uri for folder in ls.workspace.folders.values()]


async def _shutdown(ls: BridgeServer, params: None) -> None:
    """Let go of the daemon, which goes on for other editors."""
    await ls.link.close()


async def _inline_completion(
    ls: BridgeServer, params: types.InlineCompletionParams
) -> types.InlineCompletionList | None:
    """Fill the gap at the cursor."""
    return await ls.inline.answer(params)


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
        "last": ls.inline.outcomes[-1] if ls.inline.outcomes else None,
    }
