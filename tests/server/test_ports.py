import os
import socket

import pytest

from infilld.server.discovery import DaemonProblem
from infilld.server.process import ports


def test_connections_will_not_wait_for_acknowledgements() -> None:
    with ports.listen("127.0.0.1", 0) as listening:
        # What asyncio looks at before it sets TCP_NODELAY; 40 ms an answer depend on it.
        assert listening.proto == socket.IPPROTO_TCP


def test_a_taken_port_names_its_owner() -> None:
    with ports.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert str(ports.owner_of(port)).endswith(f"(pid {os.getpid()})")
        with pytest.raises(DaemonProblem, match=rf"port {port} is taken by .*pid {os.getpid()}"):
            ports.listen("127.0.0.1", port)
    ports.listen("127.0.0.1", port).close()


def test_a_free_port_has_no_owner() -> None:
    with ports.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
    assert ports.owner_of(port) is None


def test_the_address_of_ipv6_is_bracketed() -> None:
    with ports.listen("::1", 0) as listening:
        assert ports.url_of(listening) == f"http://[::1]:{listening.getsockname()[1]}"
