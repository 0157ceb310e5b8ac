"""What the daemon tells of itself, for people: `status`, `stats`, `why`."""

import argparse
import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from infilld.server import discovery
from infilld.server.client import Client
from infilld.server.discovery import Daemon, DaemonProblem
from infilld.server.settings import Settings
from infilld.server.verbs.flags import whole

# As `recent.CAPACITY`, which is not imported: it brings the web framework along.
MOST_RECENT = 256
_WINDOWS = {"today": "today", "week": "7 days", "total": "90 days"}
_COUNTS = ("answers", "shown", "inserted", "partly", "dismissed", "retained", "chars_inserted")
_ANSWER_S = 10.0


def status(options: argparse.Namespace, wanted: Settings) -> int:
    """Say whether the daemon runs; returns the exit code. Only people get the token."""
    found = discovery.find(wanted)
    told = _configured(wanted)
    if found is None:
        told |= {"state": "starting"} if told["pid"] is not None else {}
        _print(told, as_json=options.json)
        return 0
    with _client(found) as client:
        state, entry, stats = client.health().state, client.models()[0], client.stats()
    model_state = entry.get("state", state)
    told |= {
        "state": "running",
        "pid": found.pid,
        "url": found.url,
        "model": entry["model"],
        "device": entry.get("device", wanted.device),
        # Ready is also a daemon that has to load its model again first.
        "loaded": state == "ready" and model_state == "ready",
        "page": None if found.url.startswith(discovery.UNIX) else f"{found.url}/",
    }
    if options.json:
        _print(told, as_json=True)
        return 0
    # A token of earlier days may stand in the file while none is asked for.
    if told["page"] is not None and wanted.auth and found.token:
        told["page"] = f"{told['page']}#token={found.token}"
    if not told["loaded"]:
        told["loaded"] = f"no: {model_state}"
    _print(told | _running(stats, entry, found.pid), as_json=False)
    return 0


def add_why_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `why`."""
    parser.add_argument(
        "-n",
        "--lines",
        type=whole(1, MOST_RECENT),
        default=10,
        metavar="N",
        help=f"how many answers, {MOST_RECENT} at most",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def why(options: argparse.Namespace, wanted: Settings) -> int:
    """Say how the last answers ended, newest first; returns the exit code.

    Raises:
        DaemonProblem: no daemon runs, and only it knows.
    """
    found = discovery.find(wanted)
    if found is None:
        raise DaemonProblem("no daemon runs", remedy="It only remembers since its start.")
    with _client(found) as client:
        told = client.recent(options.lines)
    if options.json:
        sys.stdout.write(json.dumps(told) + "\n")
        return 0
    for each in told["recent"]:
        sys.stdout.write(_recent_line(each) + "\n")
    reasons = told["reasons"]
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    number = sum(reasons.values())
    sys.stdout.write(f"of the last {number}: {counts}\n" if number else "nothing was asked yet\n")
    return 0


def stats(options: argparse.Namespace, wanted: Settings) -> int:
    """Print what is kept of answers; a daemon need not run. Returns the exit code."""
    found = discovery.find(wanted)
    if found is None:
        told = _from_file(wanted)
    else:
        with _client(found) as client:
            told = client.stats()
    if options.json:
        sys.stdout.write(json.dumps(told) + "\n")
        return 0
    kept = told.get("statistics", {})
    if kept.get("why"):
        sys.stdout.write(f"statistics are not kept: {kept['why']}\n")
    if "total" in told:
        sys.stdout.writelines(f"{line}\n" for line in _table(told))
    return 0


def _configured(wanted: Settings) -> dict[str, object]:
    """What is known without a daemon's word."""
    return {
        "state": "stopped",
        "pid": discovery.running_pid(wanted),
        "url": None,
        "token_file": str(wanted.token_file),
        "model": wanted.model,
        "device": wanted.device,
        "loaded": False,
        "page": None,
    }


def _running(stats: Mapping[str, Any], entry: Mapping[str, Any], pid: int) -> dict[str, object]:
    """What people also get to know of a daemon that runs."""
    told: dict[str, object] = {
        "uptime": _span(stats["uptime_s"]),
        "jobs": f"{stats.get('jobs', 0)} done, {stats['live_jobs']} live",
        "memory": f"model {_size(entry.get('memory_bytes'))}, "
        f"process {_size(stats.get('resident_bytes'))}",
    }
    if stats.get("p50_ms") is not None:
        told["times"] = f"p50 {stats['p50_ms']:.0f} ms, p95 {stats['p95_ms']:.0f} ms"
    load_s = entry.get("last_load_s", stats.get("last_load_s"))
    if load_s is not None:
        told["last load"] = f"{load_s:.1f} s"
    if entry.get("engine") is not None:
        told["engine"] = f"{entry['engine']}, {entry.get('url')}"
    for name in ("failure", "switch_failure", "problem"):
        said = stats.get(name) or entry.get(name)
        if said:
            told[name.replace("_", " ")] = said
    kept = stats.get("statistics", {})
    if kept.get("why"):
        told["statistics"] = f"not kept: {kept['why']}"
    return told


def _print(told: Mapping[str, object], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(told) + "\n")
        return
    words = {None: "-", True: "yes", False: "no"}
    for name, value in told.items():
        shown = words[value] if value is None or isinstance(value, bool) else value
        sys.stdout.write(f"{name:<15}{shown}\n")


def _from_file(wanted: Settings) -> dict[str, Any]:
    # Late: it loads the engine's records, which other verbs need not wait for.
    from infilld.server.keeping import statistics, store

    path = wanted.state_dir / statistics.FILE_NAME
    kept = {"state": "kept", "why": None, "file": str(path)}
    if not path.exists():
        return {"statistics": kept | {"state": "none", "why": "nothing was asked yet"}}
    try:
        return {"statistics": kept, **store.report(path)}
    except sqlite3.Error as error:
        return {"statistics": kept | {"state": "unreadable", "why": str(error)}}


def _table(told: Mapping[str, Any]) -> Iterator[str]:
    """Rows of counts and times, with a column for each window."""
    windows = [told[name] for name in _WINDOWS]
    yield _row("", list(_WINDOWS.values()))
    for name in _COUNTS:
        yield _row(name.replace("_", " "), [f"{window[name]:,}" for window in windows])
    shares = [window["acceptance"] for window in windows]
    yield _row("acceptance", ["-" if share is None else f"{share:.0%}" for share in shares])
    for key, suffix in (("p50_ms", "p50"), ("p95_ms", "p95")):
        for kind in windows[-1][key]:
            times = [window[key].get(kind) for window in windows]
            shown = ["-" if ms is None else f"{ms:,.0f} ms" for ms in times]
            yield _row(f"{kind} {suffix}", shown)
    for key, title in (("abstentions", "nothing"), ("errors", "error")):
        for reason in windows[-1][key]:
            counts = [f"{window[key].get(reason, 0):,}" for window in windows]
            yield _row(f"{title}: {reason}", counts)


def _row(title: str, cells: list[str]) -> str:
    return f"{title:<26}" + "".join(f"{cell:>12}" for cell in cells)


def _recent_line(each: Mapping[str, Any]) -> str:
    at = datetime.fromisoformat(each["time"]).astimezone().strftime("%H:%M:%S")
    deadline = f" of {each['deadline_ms']:g}" if each["deadline_ms"] is not None else ""
    time_ms = f"{each['total_ms']:.0f}{deadline} ms"
    about = " ".join(filter(None, (each["kind"], each["language"])))
    line = f"{at}  {each['reason']:<16}{time_ms:>14}  {about:<18}{each['route']}  {each['why']}"
    return line.rstrip()


def _span(seconds: float) -> str:
    minutes, whole_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (whole_s, "s"))
    shown = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(shown[:2]) or "0 s"


def _size(count: object) -> str:
    if not isinstance(count, int):
        return "unknown"
    return f"{count / 1e9:.2f} GB" if count >= 1_000_000_000 else f"{count / 1e6:.0f} MB"


@contextmanager
def _client(found: Daemon) -> Iterator[Client]:
    with Client(found.url, found.token, timeout_s=_ANSWER_S) as client:
        yield client
