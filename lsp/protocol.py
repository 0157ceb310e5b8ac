"""pygls' protocol with the rough edges off: every request is answered, nothing pops up.

Four things differ from pygls 2.1:

- A message becomes a typed object once it is complete. pygls does it to every nested JSON object,
  so that the key "jsonrpc" inside a command's arguments breaks the whole message.
- Parameters of the wrong shape are answered with -32602. pygls answers nothing and shows a popup.
- A command that is cancelled stops. pygls answers at once, and the command's coroutine goes on.
- Documents are kept by `infilld.lsp.documents` (see there), not by pygls' workspace.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from cattrs import transform_error
from lsprotocol import types
from pygls.exceptions import (
    JsonRpcException,
    JsonRpcInvalidParams,
    JsonRpcInvalidRequest,
    JsonRpcMethodNotFound,
    JsonRpcServerNotInitialized,
)
from pygls.protocol import LanguageServerProtocol, lsp_method

from infilld.lsp.edit_params import READERS

if TYPE_CHECKING:
    from infilld.lsp.server import BridgeServer

log = logging.getLogger(__name__)


@attrs.define
class EditRequest:
    """A request of ours; pygls would turn the parameters of an unknown one into objects."""

    id: int | str
    method: str
    jsonrpc: str
    params: Any = None


class BridgeProtocol(LanguageServerProtocol):
    """Reads messages, answers the malformed ones, and keeps the documents in step."""

    _server: "BridgeServer"

    @property
    def is_shut_down(self) -> bool:
        """Whether the editor has asked for the end."""
        return self._shutdown

    def is_awaited(self, number: int | str | None) -> bool:
        """Whether a request has neither been answered nor cancelled."""
        return number in self._request_futures

    def structure_message(self, data: dict[str, Any]) -> dict[str, Any]:
        """Leave a nested JSON object as it is; see the module's docstring."""
        return data

    def get_message_type(  # type: ignore[override]  # pygls keeps its answers in a cache
        self, method: str
    ) -> type[Any] | None:
        """Return the type of a message; None when it is not known."""
        is_edit = method.startswith("infilld/") and method.removeprefix("infilld/") in READERS
        found: type[Any] | None = EditRequest if is_edit else super().get_message_type(method)
        return found

    def _handle_cancel_notification(self, msg_id: int | str) -> None:
        super()._handle_cancel_notification(msg_id)
        task = self._server.commands.get(msg_id)
        if task is not None:
            task.cancel()

    def handle_message(self, message: Any) -> None:
        """Answer or carry out one message, given as parsed JSON."""
        if not isinstance(message, Mapping) or message.get("jsonrpc") != self.VERSION:
            self._refuse(message, JsonRpcInvalidRequest("Expected a JSON-RPC 2.0 message"))
            return
        problem = self._objection(message) if "method" in message else None
        if problem is not None:
            self._refuse(message, problem)
            return
        try:
            typed = super().structure_message(dict(message))
        except JsonRpcException as error:
            self._refuse(message, JsonRpcInvalidParams(_say_what(error)))
            return
        super().handle_message(typed)

    def _objection(self, message: Mapping[str, Any]) -> JsonRpcException | None:
        """Return why a request or notification cannot be looked at; None when it can."""
        method, number = message["method"], message.get("id")
        if "id" in message and (not isinstance(number, int | str) or isinstance(number, bool)):
            return JsonRpcInvalidRequest("The id must be a string or an integer")
        if not isinstance(method, str):
            return JsonRpcInvalidRequest("The method must be a string")
        is_known = method in self.fm.builtin_features or method in self.fm.features
        if not is_known and method != types.CANCEL_REQUEST:
            return JsonRpcMethodNotFound(f"Method Not Found: {method}")
        if self._workspace is None and method not in {types.INITIALIZE, types.EXIT}:
            return JsonRpcServerNotInitialized("Expected initialize first")
        if self._workspace is not None and method == types.INITIALIZE:
            return JsonRpcInvalidRequest("Initialized already")
        if self._shutdown and method != types.EXIT:
            return JsonRpcInvalidRequest("Shut down already")
        return None

    def _refuse(self, message: Any, problem: JsonRpcException) -> None:
        """Answer a request with an error; drop a notification or a response."""
        is_message = isinstance(message, Mapping)
        method = message.get("method") if is_message else None
        is_news = not isinstance(problem, JsonRpcMethodNotFound)
        log.log(logging.WARNING if is_news else logging.DEBUG, "refused %r: %s", method, problem)
        if is_message and ("id" not in message or "method" not in message):
            return
        number = message.get("id") if is_message else None
        is_usable = isinstance(number, int | str) and not isinstance(number, bool)
        error = types.ResponseErrorMessage(
            id=number if is_usable else None, error=problem.to_response_error()
        )
        self._send_data(error)

    @lsp_method(types.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: types.DidOpenTextDocumentParams) -> None:
        """Take a new document in."""
        snapshot = self._server.documents.open(params.text_document)
        self._server.live.changed(snapshot.uri, snapshot)

    @lsp_method(types.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: types.DidChangeTextDocumentParams) -> None:
        """Take the next version of a document in."""
        document = params.text_document
        snapshot = self._server.documents.change(
            document.uri, document.version, params.content_changes
        )
        if snapshot is None:
            log.warning("a change of a document that is not open was ignored")
            return
        self._server.live.changed(document.uri, snapshot)

    @lsp_method(types.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: types.DidCloseTextDocumentParams) -> None:
        """Forget a document."""
        self._server.documents.close(params.text_document.uri)
        self._server.live.stop(params.text_document.uri, "closed")


def _say_what(error: JsonRpcException) -> str:
    """Say which part of the parameters is wrong, without repeating its value."""
    cause = error.__cause__ or error.__context__
    try:
        found = transform_error(cause, path="message") if cause is not None else []
    except Exception:  # the message is all that is at stake
        found = []
    return "; ".join([JsonRpcInvalidParams.MESSAGE, *found[:3]])
