"""Put this folder on PYTHONPATH: a process then writes down whom it wants to reach, and with what.

The file named by WATCH_NETWORK gets one line for the start, and one for each connection, message or
look-up beyond this machine, and for each library that is made to reach others.
"""

import ipaddress
import os
import sys

_LIBRARIES = {"transformers", "huggingface_hub", "datasets", "requests", "aiohttp", "sentry_sdk"}
_file = os.open(os.environ["WATCH_NETWORK"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _write(*words: object) -> None:
    os.write(_file, (" ".join(map(str, words)) + "\n").encode())


def _is_here(host: object) -> bool:
    if host is None:
        return True
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _watch(event: str, args: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not _is_here(address[0]):
            _write(event, address)
    elif event.startswith("socket.get") and event.endswith(("addrinfo", "byname", "byaddr")):
        if not _is_here(args[0]):
            _write(event, args[0])
    elif event == "import" and str(args[0]) in _LIBRARIES:
        _write(event, args[0])


sys.addaudithook(_watch)
_write("watching")
