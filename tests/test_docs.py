"""The documents name only what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "editor-configs/README.md")
# What users or checkpoints have, a route, and a file that must not be.
NOT_OURS = {
    *("app.py", "config.json", "generation_config.json", "tokenizer.json", "/openapi.json"),
    "calibration.json",
    "kernels/__init__.py",
}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def verbs() -> set[str]:
    helped = subprocess.run(
        [sys.executable, "-P", "-m", "infilld.server", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(re.findall(r"^    (\w+)  ", helped, re.M))


@pytest.mark.parametrize("name", PAGES)
def test_verbs_exist(name: str) -> None:
    code = re.findall(r"^```\n(.*?)^```", page(name), re.M | re.S)
    code += re.findall(r"`(infilld [^`\n]+)`", page(name))
    named = {verb for part in code for verb in re.findall(r"^infilld (\w+)", part, re.M)}
    assert named <= verbs(), named - verbs()


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", page("Makefile"), re.M))
    pairs = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page(name), re.M)
    named = {a or b for a, b in pairs}
    assert named <= targets, named - targets


@pytest.mark.parametrize("name", PAGES)
def test_files_exist(name: str) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|toml|lua|el|txt|safetensors|json))`", page(name)))
    for path in sorted(named - NOT_OURS):
        beside = {ROOT / path, (ROOT / name).parent / path}
        anywhere = "/" not in path and any(ROOT.glob(f"*/{path}"))
        assert anywhere or any(p.exists() for p in beside), f"{name} names {path}"


def test_links_lead_somewhere() -> None:
    for name in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page(name)):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"
