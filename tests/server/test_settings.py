from pathlib import Path

import pytest

from infilld.server import settings
from infilld.server.settings import Settings, SettingsProblem, load


def write_config(home: Path, text: str) -> Path:
    path = home / "config" / "infilld" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_defaults(own_home: Path) -> None:
    assert load() == Settings(state_dir=own_home / "state" / "infilld")
    assert load().model_folder is None


def test_flags_win_over_environment_over_file(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(own_home, 'port = 1\ndevice = "a"\nlog_level = "debug"\n')
    monkeypatch.setenv("INFILLD_PORT", "2")
    monkeypatch.setenv("INFILLD_DEVICE", "b")
    got = load({"port": "3", "device": None})
    assert (got.port, got.device, got.log_level) == (3, "b", "debug")


def test_a_relative_model_of_the_file_counts_from_the_file(own_home: Path) -> None:
    path = write_config(own_home, 'model = "weights"\n')
    assert load().model_folder == path.parent / "weights"


@pytest.mark.parametrize("text", ["prot = 1", "[server]\nport = 1"])
def test_an_unknown_key_names_key_and_file(own_home: Path, text: str) -> None:
    path = write_config(own_home, text)
    with pytest.raises(SettingsProblem, match=r"unknown key '(prot|server)'") as caught:
        load()
    assert str(path) in str(caught.value)


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFILLD_PROT", "1")
    with pytest.raises(SettingsProblem, match="INFILLD_PROT"):
        load()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "8741x"),
        ("port", True),
        ("auth", "maybe"),
        ("log_level", "loud"),
        ("idle_unload_minutes", "-1"),
        ("idle_unload_minutes", "soon"),
        ("idle_unload_minutes", "nan"),
        ("idle_unload_minutes", "inf"),
        ("idle_unload_minutes", True),
        ("device", ""),
        ("model", ""),
        ("host", "example.org"),
        ("allowed_hosts", "http://box.lan"),
        ("allowed_hosts", "box.lan,,other"),
        ("allowed_hosts", "*"),
        ("socket", ""),
        ("log_format", "xml"),
        ("engine", "http://host:8000"),
        ("engine", "openai:host:8000"),
        ("engine", "openai:http://user:secret@host:8000"),
        ("engine", "openai:http://:secret@host:8000"),
        ("engine", "openai:http://@host:8000"),
        ("engine", "openai:http://host:8000/#v1"),
        ("engine", "openai:http://host:8000?"),
        ("engine", "openai:file:///etc/passwd"),
    ],
)
def test_a_bad_value_names_the_flag(name: str, value: object) -> None:
    with pytest.raises(SettingsProblem, match=f"--{name.replace('_', '-')}"):
        load({name: value})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "::"])
def test_other_machines_are_let_in_only_when_told_and_with_a_token(host: str) -> None:
    with pytest.raises(SettingsProblem, match="other machines") as refused:
        load({"host": host})
    assert "--allow-remote" in refused.value.remedy
    with pytest.raises(SettingsProblem, match="without a token"):
        load({"host": host, "allow_remote": "true", "auth": "false"})
    assert load({"host": host, "allow_remote": "true"}).host == host


def test_a_remote_engine_is_an_address() -> None:
    assert load().engine_url is None
    assert load({"engine": "openai:http://host:8000/"}).engine_url == "http://host:8000"


@pytest.mark.parametrize(
    "url", ["http://:s3cret@host", "http://me:s3cret@host", "http://me:s3cret@ho\u2100st"]
)
def test_a_secret_in_an_address_is_not_repeated(url: str) -> None:
    with pytest.raises(SettingsProblem, match="engine_key_file") as caught:
        load({"engine": f"openai:{url}"})
    assert "s3cret" not in str(caught.value)


def test_broken_toml_names_the_file(own_home: Path) -> None:
    path = write_config(own_home, "port = ")
    with pytest.raises(SettingsProblem, match=str(path)):
        load()


@pytest.mark.parametrize(
    ("value", "meant"), [("auto", "auto"), ("0", 0.0), (1.5, 1.5), ("15", 15.0)]
)
def test_the_model_may_be_unloaded_when_idle(value: object, meant: object) -> None:
    assert load().idle_unload_minutes == "auto"
    wanted = load({"idle_unload_minutes": value})
    assert wanted.idle_unload_minutes == meant
    words = wanted.flags()
    given = words[words.index("--idle-unload-minutes") + 1]
    assert load({"idle_unload_minutes": given}) == wanted


def test_flags_give_another_process_the_same_settings(own_home: Path) -> None:
    wanted = load(
        {
            "port": "0",
            "auth": "false",
            "model": "some where",
            "host": "::1",
            "socket": "run/infilld.sock",
            "allowed_hosts": "box.lan:8741, other",
            "engine": "openai:https://host",
        }
    )
    words = wanted.flags()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
    assert load(given) == wanted
    assert set(given) == set(settings.HELP) == set(settings.KEYS)
