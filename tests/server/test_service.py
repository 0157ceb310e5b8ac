"""`infilld service`: files that service managers read as meant, and nobody else's touched."""

import json
import os
import plistlib
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import LiveServer

from infilld.server import cli, discovery
from infilld.server.settings import Settings
from infilld.server.verbs import service

NASTY = [
    "/opt/a b/py%h\\thon",
    "-x",
    "$HOME ${HOME} $$",
    'say "hi"; #no',
    "tab\tnew\nline é",
    "%%",
    "",
]


@pytest.fixture
def home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(own_home / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    return own_home


@pytest.fixture
def calls(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a systemctl and a launchctl of our own write what they were asked."""
    folder, told = home / "bin", home / "calls"
    folder.mkdir()
    for name in ("systemctl", "launchctl"):
        tool = folder / name
        tool.write_text(
            f'#!/bin/sh\necho "{name} $*" >> "{told}"\n'
            f'[ ! -e "{told}.fail" ] || {{ echo no bus >&2; exit 1; }}\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return told


def unit_file(home: Path) -> Path:
    return home / "config" / "systemd" / "user" / "infilld.service"


def plist_file(home: Path) -> Path:
    return home / "home" / "Library" / "LaunchAgents" / "local.infilld.daemon.plist"


def words_of(line: str) -> list[str]:
    """What systemd makes of a line of words that are all quoted, specifiers resolved.

    Source: systemd.syntax(7), Quoting; systemd.unit(5), Specifiers.
    """
    escapes = {"\\": "\\", '"': '"', "n": "\n", "t": "\t", "s": " "}
    words = []
    while line:
        match = re.match(r'"((?:[^"\\\n]|\\.)*)"(?: |$)', line)
        assert match, line
        words.append(re.sub(r"\\(.)", lambda found: escapes[found[1]], match[1]))
        line = line[match.end() :]
    assert not [word for word in words if re.sub("%%", "", word).count("%")]
    return [word.replace("%%", "%") for word in words]


def values(unit: str, key: str) -> list[str]:
    # As systemd does: lines end at \n alone.
    pairs = [line.partition("=") for line in unit.split("\n") if not line.startswith("#")]
    return [value for name, _, value in pairs if name == key]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))))
def test_words_arrive_as_they_were(words: list[str]) -> None:
    (line,) = values(service.unit(["/usr/bin/python", *words], {}), "ExecStart")
    assert words_of(line) == [":/usr/bin/python", *words]


def test_nasty_words_and_folders() -> None:
    unit = service.unit(NASTY, {"XDG_STATE_HOME": NASTY[0]})
    assert words_of(values(unit, "ExecStart")[0]) == [":" + NASTY[0], *NASTY[1:]]
    assert words_of(values(unit, "Environment")[0]) == [f"XDG_STATE_HOME={NASTY[0]}"]
    told = plistlib.loads(service.property_list(NASTY, {"A": NASTY[3]}, Path(NASTY[0])))
    assert told["ProgramArguments"] == NASTY
    assert told["EnvironmentVariables"] == {"A": NASTY[3]}
    assert told["StandardErrorPath"] == NASTY[0]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("folder", ["plain", "a b%d$x;#é"])
def test_systemd_has_nothing_to_say(tmp_path: Path, folder: str) -> None:
    python = tmp_path / folder / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    path = tmp_path / "infilld.service"
    path.write_text(service.unit([str(python), *NASTY[1:]], {"XDG_STATE_HOME": NASTY[0]}))
    (tmp_path / "run").mkdir(mode=0o700)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path / "run")},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ['q"', "q'", "q\\", "q\n"])
@pytest.mark.usefixtures("home")
def test_a_program_that_systemd_would_not_start(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(discovery, "COMMAND", (f"/opt/{name}/python", "-m", "x"))
    assert cli.main(["service", "install", "--kind", "systemd"]) == 1
    assert "without them" in capfd.readouterr().err


def test_install_writes_and_says_what_is_left(
    home: Path, calls: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["service", "install", "--kind", "systemd", "--port", "9123", "--model", "m x"]
    assert cli.main(words) == 0
    path = unit_file(home)
    out = capfd.readouterr().out
    assert f"{path}: written" in out
    assert (
        "  systemctl --user daemon-reload\n  systemctl --user enable --now infilld.service" in out
    )
    assert not calls.exists(), "only --now runs anything"
    unit = path.read_text()
    command = words_of(values(unit, "ExecStart")[0])
    assert command == [
        f":{sys.executable}",
        *("-P", "-m", "infilld.server", "serve"),
        *("--model", str(Path.cwd() / "m x"), "--port", "9123"),
    ]
    assert words_of(" ".join(values(unit, "Environment"))) == [
        f"XDG_CONFIG_HOME={home / 'config'}",
        f"XDG_STATE_HOME={home / 'state'}",
    ]
    for key, value in (
        ("Type", "notify"),
        ("Restart", "on-failure"),
        ("NoNewPrivileges", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6"),
    ):
        assert values(unit, key) == [value]
    inode = path.stat().st_ino
    assert cli.main(words) == 0
    assert "up to date already" in capfd.readouterr().out
    assert path.stat().st_ino == inode
    assert cli.main(["service", "install", "--kind", "systemd", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["state"], len(told["next"])) == ("written", 2)
    assert "9123" not in path.read_text()


def test_install_now_replaces_the_daemon_that_runs(
    server: LiveServer, home: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Settings] = []
    monkeypatch.setattr(discovery, "stop", stopped.append)
    words = ["--kind", "systemd", "--now", "--state-dir", str(server.settings.state_dir)]
    assert cli.main(["service", "install", *words]) == 0
    assert [each.state_dir for each in stopped] == [server.settings.state_dir]
    assert calls.read_text().splitlines() == [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now infilld.service",
    ]
    calls.with_suffix(".fail").touch()
    assert cli.main(["service", "install", *words]) == 1
    assert len(stopped) == 1


@pytest.mark.usefixtures("home")
def test_a_command_that_fails_is_said(calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path(f"{calls}.fail").touch()
    assert cli.main(["service", "install", "--kind", "systemd", "--now"]) == 1
    assert "daemon-reload: no bus" in capfd.readouterr().err


@pytest.mark.parametrize("kind", service.KINDS)
@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_file_of_another_is_left_alone(
    home: Path, kind: str, action: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = unit_file(home) if kind == "systemd" else plist_file(home)
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/usr/bin/mine\n")
    assert cli.main(["service", action, "--kind", kind]) == 1
    assert "--force" in capfd.readouterr().err
    assert "mine" in path.read_text()
    assert cli.main(["service", action, "--kind", kind, "--force"]) == 0
    assert not path.exists() or service.MARK in path.read_text()


def test_uninstall_removes_what_was_written_and_no_more(
    home: Path, calls: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = unit_file(home)
    assert cli.main(["service", "install", "--kind", "systemd"]) == 0
    other = path.with_name("other.service")
    other.write_text("mine")
    wants = path.parent / "default.target.wants"
    wants.mkdir()
    (wants / "infilld.service").symlink_to(path)
    (wants / "other.service").symlink_to(other)
    assert cli.main(["service", "uninstall", "--kind", "systemd", "--now"]) == 0
    assert calls.read_text().splitlines() == [
        "systemctl --user disable --now infilld.service",
        "systemctl --user daemon-reload",
    ]
    assert sorted(file.name for file in path.parent.rglob("*")) == [
        "default.target.wants",
        "other.service",
        "other.service",
    ]
    capfd.readouterr()
    assert cli.main(["service", "uninstall", "--kind", "systemd"]) == 0
    assert "not there" in capfd.readouterr().out


def test_launchd(home: Path, calls: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = plist_file(home)
    assert cli.main(["service", "install", "--kind", "launchd", "--now"]) == 0
    told = plistlib.loads(path.read_bytes())
    assert told["ProgramArguments"] == [sys.executable, "-P", "-m", "infilld.server", "serve"]
    assert (told["RunAtLoad"], told["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert Path(told["StandardErrorPath"]).parent.is_dir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert cli.main(["service", "uninstall", "--kind", "launchd", "--now"]) == 0
    assert not path.exists()
    domain = f"gui/{os.getuid()}"
    assert calls.read_text().splitlines() == [
        f"launchctl bootstrap {domain} {path}",
        f"launchctl bootout {domain}/local.infilld.daemon",
    ]
    capfd.readouterr()


def test_show(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["service", "show", "--kind", "systemd"]
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    assert "not installed" in err
    assert not unit_file(home).exists()
    assert cli.main(["service", "install", "--kind", "systemd"]) == 0
    assert unit_file(home).read_text() == out
    capfd.readouterr()
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["installed"], told["current"], told["content"]) == (True, True, out)
    assert cli.main([*words, "--port", "9000"]) == 0
    out, err = capfd.readouterr()
    assert "installed with other content" in err
    assert '"--port" "9000"' in out


def test_a_folder_that_cannot_be_made_is_said(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "config").mkdir()
    (home / "config" / "systemd").write_text("a file")
    assert cli.main(["service", "install", "--kind", "systemd"]) == 1
    assert capfd.readouterr().err.startswith("infilld: ")
