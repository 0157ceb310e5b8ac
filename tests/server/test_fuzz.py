"""Whatever comes to any route, no answer is a 5xx, and the daemon goes on."""

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from fake_worker import FakeWorker
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_server import LiveServer, live_server

from infilld.server.app import create_app

# The routes are those of the application: a new one is fuzzed without a word here.
TOLD = create_app(FakeWorker(), token="x").openapi()
SCHEMA = schemathesis.openapi.from_dict(TOLD)
SCHEMA.config.generation.update(modes=list(schemathesis.GenerationMode))
WITH_BODY = sorted(path for path, operations in TOLD["paths"].items() if "post" in operations)
_PATIENCE_S = 20.0

fuzzing = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("fuzzed") / "state", FakeWorker(capacity=64)) as live:
        yield live


# One for each request would take most of the time.
@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=_PATIENCE_S) as client:
        yield client


def refuse_server_error(got: "httpx.Response | schemathesis.Response") -> None:
    assert got.status_code < 500, got.text
    if got.status_code >= 400 and got.content:
        assert "error" in got.json(), got.text


@SCHEMA.parametrize()
@fuzzing
def test_json_of_and_beside_the_schema(case: schemathesis.Case, fuzzed: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {fuzzed.token}"}
    refuse_server_error(case.call(base_url=fuzzed.url, headers=headers, timeout=_PATIENCE_S))


# Numbers no float holds, keys that are no keys, text that is no Unicode, cut off anywhere.
_JSON = st.recursive(
    st.sampled_from(
        ["null", "1e999", "-0", "1" * 400, '"\\ud800"', '"\\u0000"', "NaN", '"</s>"', "true"]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda parts: f"[{','.join(parts)}]"),
        st.dictionaries(st.sampled_from(["text", "spans", "prompt", "messages", "n"]), inner).map(
            lambda pairs: "{" + ",".join(f'"{k}":{v}' for k, v in pairs.items()) + "}"
        ),
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("path", WITH_BODY)
@fuzzing
@given(body=st.one_of(st.binary(max_size=64), _JSON.map(str.encode)), cut=st.integers(0, 200))
def test_bytes_that_call_themselves_json(
    path: str, body: bytes, cut: int, fuzzed: LiveServer, client: httpx.Client
) -> None:
    headers = {"Authorization": f"Bearer {fuzzed.token}", "Content-Type": "application/json"}
    content = body[: max(1, len(body) - cut)]
    refuse_server_error(client.post(f"{fuzzed.url}{path}", content=content, headers=headers))


def test_it_still_serves(fuzzed: LiveServer) -> None:
    with fuzzed.client() as client:
        assert client.health().state == "ready"
