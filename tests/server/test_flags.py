"""Numbers on the command line: what cannot be meant is bad usage, said before anything runs."""

import argparse

import pytest

from infilld.engine.training import run as training
from infilld.server import cli
from infilld.server.verbs import flags

HUGE = "9" * 5_000
NO_COUNT = ["x", "", "1.5", "1_0", "+1", " 1", "\N{ARABIC-INDIC DIGIT THREE}", HUGE]


@pytest.mark.parametrize(
    ("words", "flag", "bad"),
    [
        ("bench", "--repeats", ["0", "-1", *NO_COUNT]),
        ("eval", "--items", ["0", "-1", *NO_COUNT]),
        ("eval", "--seed", ["-1", str(2**63), *NO_COUNT]),
        ("logs", "-n", ["-1", *NO_COUNT]),
        ("fill a.py --at 1:1", "--deadline-ms", ["0", "-1", "3600001", *NO_COUNT]),
        ("fill a.py --at 1:1", "--seed", ["-1", str(2**63), *NO_COUNT]),
        ("fill a.py --at 1:1", "-n", ["0", "9", "-1", "x", "", HUGE]),
        ("fill a.py --at 1:1", "--boldness", ["-0.1", "1.1", "nan", "inf", "x", "", "1e400"]),
        ("train", "--minutes", ["0", "-1", "nan", "inf", "1e400", "x", "", "600001"]),
        ("train", "--seed", ["-1", str(2**63), *NO_COUNT]),
        ("train", "--max-steps", ["0", "-1", *NO_COUNT]),
    ],
)
def test_a_number_out_of_range_is_bad_usage(
    words: str,
    flag: str,
    bad: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What got past the flags must not train for minutes before the test fails.
    monkeypatch.setattr(training, "train", lambda *_: {})
    for text in bad:
        with pytest.raises(SystemExit) as leaving:
            cli.main([*words.split(), f"{flag}={text}" if flag.startswith("--") else flag + text])
        assert leaving.value.code == 2, text
        out, err = capfd.readouterr()
        assert (out, flag in err) == ("", True)


def test_the_bounds_themselves_are_fine() -> None:
    read = flags.whole(1, 20)
    assert [read("1"), read("020"), read("20")] == [1, 20, 20]
    for text in ("0", "21"):
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 1 to 20"):
            read(text)
    minutes = flags.above_zero(10)
    assert [minutes("0.5"), minutes("10"), minutes("1e1")] == [0.5, 10.0, 10.0]


def test_the_usage_above_an_error_is_that_of_the_verb(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fill", "a.py", "--at", "x"])
    said = capfd.readouterr().err
    assert ("--instruction" in said, "--state-dir" in said) == (True, False)
    with pytest.raises(SystemExit):
        cli.main(["fill", "--help"])
    assert "--state-dir" in capfd.readouterr().out
