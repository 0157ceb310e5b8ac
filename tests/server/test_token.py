"""The token file: what may stand there, who may read it, and how it is changed."""

import json
import logging
import os
import stat
from pathlib import Path

import httpx
import pytest
from fake_worker import FakeWorker
from live_server import live_server, serving

from infilld.server import cli, discovery
from infilld.server.process import token
from infilld.server.process.token import TokenFile, TokenProblem
from infilld.server.settings import Settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "token"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_once_and_kept(path: Path) -> None:
    first = token.prepare(path).current()
    assert len(first) >= 40
    assert mode_of(path) == 0o600
    assert token.prepare(path).current() == first
    assert [each.name for each in path.parent.iterdir()] == ["token"], "no draft is left"


def test_one_of_the_user_s_own_is_taken(path: Path) -> None:
    path.write_text("  correct-horse-battery_staple=~+/.\n\n")
    path.chmod(0o600)
    assert token.prepare(path).current() == "correct-horse-battery_staple=~+/."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n\t\n",
        b"short",
        b"fifteen-letters",
        "sechzehn Zeichen mit Ümlaut".encode(),
        b"two words are no token",
        bytes(range(256)),
        b"\0" * 64,
        b"x" * 513,
        b"x" * 5000,
    ],
)
def test_what_is_no_token_is_replaced_at_the_start(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        made = token.prepare(path).current()
    assert len(made) >= 40
    assert f"{path} holds no token" in caplog.text
    assert "a new one was made" in caplog.text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o660])
def test_one_that_others_may_read_is_closed(
    path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text("a-token-that-others-saw")
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert token.prepare(path).current() == "a-token-that-others-saw"
    assert mode_of(path) == 0o600
    assert "infilld token rotate" in caplog.text


def test_a_folder_in_its_place_is_named(path: Path) -> None:
    path.mkdir()
    with pytest.raises(TokenProblem, match="is not a file") as caught:
        token.prepare(path)
    assert "infilld token rotate" in caught.value.remedy
    with pytest.raises(TokenProblem, match="cannot write"):
        token.rotate(path)


def test_a_pipe_in_its_place_makes_nobody_wait(path: Path) -> None:
    os.mkfifo(path, 0o600)
    with pytest.raises(TokenProblem, match="is not a file"):
        token.prepare(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_one_that_cannot_be_read_is_named(path: Path) -> None:
    path.write_text("a-token-that-is-hidden")
    path.chmod(0)
    with pytest.raises(TokenProblem, match="cannot read"):
        token.prepare(path)


def test_a_link_is_followed_and_stays_a_link(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere"
    secret.write_text("a-token-kept-elsewhere")
    secret.chmod(0o644)
    path.symlink_to(secret)
    assert token.prepare(path).current() == "a-token-kept-elsewhere"
    assert mode_of(secret) == 0o600
    made = token.rotate(path)
    assert path.is_symlink()
    assert secret.read_text().strip() == made
    secret.unlink()
    assert token.prepare(path).current() == secret.read_text().strip()


def test_a_change_is_seen_at_once_and_read_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = token.prepare(path)
    first = file.current()
    second = token.rotate(path)
    assert file.current() == second != first
    monkeypatch.setattr(token, "_read", lambda path: pytest.fail("it has not changed"))
    assert file.current() == second


@pytest.mark.parametrize("content", [None, b"", b"short", b"\xff" * 20])
def test_without_a_token_nobody_gets_in(tmp_path: Path, content: bytes | None) -> None:
    with live_server(tmp_path / "state") as server:
        path = server.settings.token_file
        path.unlink() if content is None else path.write_bytes(content)
        for sent in (server.token, "", "None"):
            headers = {"Authorization": f"Bearer {sent}".strip()}
            got = httpx.get(server.url + "/v1/models", headers=headers)
            assert got.status_code == 401
            assert "infilld token rotate" in got.json()["error"]["remedy"]
        assert discovery.find(server.settings) is not None, "status goes on to find it"
        made = token.rotate(path)
        headers = {"Authorization": f"Bearer {made}"}
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200


class TestTheVerb:
    def test_it_says_where_the_token_is(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        state = tmp_path / "state"
        assert cli.main(["token", "--state-dir", str(state)]) == 0
        assert capfd.readouterr().out == f"{state / 'token'}\n"
        assert not state.exists(), "asking makes nothing"

    def test_it_shows_the_token(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        flags = ["--state-dir", str(tmp_path)]
        assert cli.main(["token", "show", *flags]) == 1
        assert "infilld token rotate" in capfd.readouterr().err
        made = token.rotate(tmp_path / "token")
        for words in (["show"], ["--show"], ["path", "--show"]):
            assert cli.main(["token", *words, *flags]) == 0
            assert capfd.readouterr().out == f"{made}\n"
        assert cli.main(["token", "show", "--json", *flags]) == 0
        told = json.loads(capfd.readouterr().out)
        assert told == {"token_file": str(tmp_path / "token"), "token": made}

    def test_it_changes_the_token_of_a_daemon_that_runs(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        wanted = Settings(state_dir=tmp_path / "state", port=0)
        with serving(wanted, FakeWorker()) as old:
            assert cli.main(["token", "rotate", *wanted.flags()]) == 0
            said = capfd.readouterr()
            assert said.out == f"{wanted.token_file}\n"
            assert "no longer works" in said.err
            new = discovery.find(wanted)
            assert new is not None
            assert TokenFile(wanted.token_file).current() == new.token != old.token
            for sent, status in ((old.token, 401), (new.token, 200)):
                headers = {"Authorization": f"Bearer {sent}"}
                assert httpx.get(old.url + "/v1/models", headers=headers).status_code == status
