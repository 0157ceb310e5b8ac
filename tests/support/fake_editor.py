"""An editor for tests: a real bridge process, spoken to in raw JSON-RPC over its pipes.

Raw, so that tests see the wire and can send what no well-behaved client library would. Its text
arithmetic is its own and shares nothing with the bridge.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT_S = 20.0
AUTOMATIC, INVOKED = 2, 1


class FakeEditor:
    """One bridge process; every wait has a time limit and names what it waited for."""

    def __init__(
        self,
        home: Path,
        *,
        state_dir: Path,
        encodings: Sequence[str] | None = None,
        options: object = None,
        root: str | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.encoding = "utf-16"
        self._encodings, self._options, self._root = encodings, options, root
        self._messages: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ids = 0
        self._is_over = False
        keep = {
            name: os.environ[name] for name in ("PATH", "OMP_WAIT_POLICY") if name in os.environ
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "infilld.lsp", "--stdio"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**keep, "HOME": str(home), "INFILLD_STATE_DIR": str(state_dir), **(environ or {})},
            cwd=home,
        )
        self.stderr = b""
        self._readers = [
            threading.Thread(target=self._read_messages, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    # The protocol

    def send(self, message: object) -> None:
        self.send_raw(json.dumps(message).encode())

    def send_raw(self, body: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def request(self, method: str, params: object) -> int:
        self._ids += 1
        self.send({"jsonrpc": "2.0", "id": self._ids, "method": method, "params": params})
        return self._ids

    def notify(self, method: str, params: object) -> None:
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def reply(self, number: int | None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """The whole reply to a request."""
        return self.wait(
            lambda m: "method" not in m and m.get("id") == number,
            f"the reply to request {number}",
            timeout_s,
        )

    def respond(self, number: int | str, result: object) -> None:
        """Answer a request of the bridge."""
        self.send({"jsonrpc": "2.0", "id": number, "result": result})

    def call(self, method: str, params: object) -> Any:
        got = self.reply(self.request(method, params))
        assert "error" not in got, got
        return got["result"]

    def wait(
        self, wanted: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            return next((m for m in self._messages if wanted(m)), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or self._is_over, timeout_s)
            found = find()
        assert found is not None, f"{what} never came; stderr: {self.stderr.decode()}"
        return found

    def received(self, method: str) -> list[dict[str, Any]]:
        """The notifications and requests of one kind that have come so far."""
        with self._changed:
            return [m["params"] for m in self._messages if m.get("method") == method]

    def forget(self, message: dict[str, Any]) -> None:
        """Leave a message out of what has come, so that the next of its kind is found."""
        with self._changed:
            self._messages.remove(message)

    def received_errors(self) -> list[dict[str, Any]]:
        """The errors that have come so far, those without an id included."""
        with self._changed:
            return [m["error"] for m in self._messages if "error" in m]

    # A session

    def initialize(self, **capabilities: object) -> dict[str, Any]:
        general = {} if self._encodings is None else {"positionEncodings": list(self._encodings)}
        result: dict[str, Any] = self.call(
            "initialize",
            {
                "processId": os.getpid(),
                "rootUri": self._root,
                "capabilities": {"general": general, **capabilities},
                "initializationOptions": self._options,
            },
        )
        self.encoding = result["capabilities"].get("positionEncoding", "utf-16")
        self.notify("initialized", {})
        return result

    def wait_state(self, state: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Ask for the status until the link to the daemon is in this state."""
        until = time.monotonic() + timeout_s
        while (status := self.status())["state"] != state:
            assert time.monotonic() < until, f"never {state}: {status}"
        return status

    def status(self) -> dict[str, Any]:
        got: dict[str, Any] = self.call("workspace/executeCommand", {"command": "infilld.status"})
        return got

    def open(self, uri: str, text: str, language: str = "python") -> None:
        item = {"uri": uri, "languageId": language, "version": 1, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": item})

    def change(self, uri: str, version: int, *changes: dict[str, Any]) -> None:
        self.notify(
            "textDocument/didChange",
            {"textDocument": {"uri": uri, "version": version}, "contentChanges": list(changes)},
        )

    def insert(self, uri: str, version: int, line: int, character: int, text: str) -> None:
        here = {"line": line, "character": character}
        self.change(uri, version, {"range": {"start": here, "end": here}, "text": text})

    def complete(
        self, uri: str, line: int, character: int, kind: int = AUTOMATIC, **context: object
    ) -> int:
        """Ask for inline completion; returns the request's id."""
        return self.request(
            "textDocument/inlineCompletion",
            {
                "textDocument": {"uri": uri},
                "position": {"line": line, "character": character},
                "context": {"triggerKind": kind, **context},
            },
        )

    def items(self, uri: str, line: int, character: int, kind: int = AUTOMATIC) -> Any:
        """The items of one inline completion; None when the answer was null."""
        got = self.reply(self.complete(uri, line, character, kind))
        assert "error" not in got, got
        return None if got["result"] is None else got["result"]["items"]

    def close(self) -> int:
        """Shut down as an editor does; returns the exit status."""
        if self.process.poll() is None and not self._is_over:
            self.call("shutdown", None)
            self.notify("exit", None)
        return self.wait_exit()

    def wait_exit(self) -> int:
        status = self.process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return status

    def __enter__(self) -> "FakeEditor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self.process.returncode is None:
            self.process.kill()
            self.wait_exit()

    def _read_messages(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        try:
            while header := stream.readline():
                length = int(header.removeprefix(b"Content-Length: "))
                while stream.readline() != b"\r\n":
                    pass
                message = json.loads(stream.read(length))
                with self._changed:
                    self._messages.append(message)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line


def position(text: str, offset: int, encoding: str) -> tuple[int, int]:
    """Line and code units of a code-point offset."""
    lines = re.split("\r\n|\r|\n", text[:offset])
    return len(lines) - 1, len(_encoded(lines[-1], encoding)) // _unit_bytes(encoding)


def apply_item(text: str, item: dict[str, Any], encoding: str) -> str:
    """The document after the item was inserted."""
    start, end = (_offset(text, item["range"][side], encoding) for side in ("start", "end"))
    return f"{text[:start]}{item['insertText']}{text[end:]}"


def apply_edit(text: str, edit: dict[str, Any], uri: str, version: int, encoding: str) -> str:
    """The document after a versioned edit of it, and of nothing else, was applied."""
    assert set(edit) == {"documentChanges"}, edit
    (change,) = edit["documentChanges"]
    assert change["textDocument"] == {"uri": uri, "version": version}
    places = [
        (*(_offset(text, each["range"][side], encoding) for side in ("start", "end")), number)
        for number, each in enumerate(change["edits"])
    ]
    last = len(text)
    after = text
    for start, end, number in sorted(places, reverse=True):
        assert start <= end <= last, "the edits overlap"
        after = after[:start] + change["edits"][number]["newText"] + after[end:]
        last = start
    return after


def _offset(text: str, where: dict[str, int], encoding: str) -> int:
    starts = [0, *(match.end() for match in re.finditer("\r\n|\r|\n", text))]
    start = starts[where["line"]]
    units = where["character"] * _unit_bytes(encoding)
    return start + len(_encoded(text[start:], encoding)[:units].decode(_codec(encoding)))


def _codec(encoding: str) -> str:
    return {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}[encoding]


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode(_codec(encoding))


def _unit_bytes(encoding: str) -> int:
    return {"utf-8": 1, "utf-16": 2, "utf-32": 4}[encoding]
