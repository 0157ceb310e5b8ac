"""Speaking to a served worker as clients of other servers do."""

import json
from typing import Any

import httpx
from fake_worker import FakeWorker
from live_server import LiveServer

from infilld.engine.request import InfillRequest


def post(server: LiveServer, path: str, body: object, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}"}
    content = json.dumps(body).encode()
    kind = {"Content-Type": "application/json"}
    url = server.url + path
    # Without certificates to read, which takes longer than the request.
    return httpx.post(
        url, content=content, headers=headers | kind, timeout=20, verify=False, **more
    )


def get(server: LiveServer, path: str) -> Any:
    """The JSON at a path."""
    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.get(server.url + path, headers=headers, timeout=20, verify=False).json()


def events(server: LiveServer, path: str, body: dict[str, Any]) -> list[Any]:
    """Data of a stream's events; the one that closes it is left as it is."""
    got = post(server, path, body | {"stream": True})
    assert got.status_code == 200, got.text
    assert got.headers["content-type"].startswith("text/event-stream")
    *frames, rest = got.text.split("\n\n")
    assert rest == ""
    assert all(frame.startswith("data: ") for frame in frames)
    data = [frame.removeprefix("data: ") for frame in frames]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def last_asked(worker: FakeWorker) -> InfillRequest:
    """What the engine was asked last."""
    request = worker.jobs[-1].request
    assert isinstance(request, InfillRequest)
    return request
