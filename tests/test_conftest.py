"""The guards of the test suite, each with a case in which it must strike."""

from __future__ import annotations

import socket
import threading

import pytest
import torch


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_no_socket_leaves_the_machine(method):
    with socket.socket() as client, pytest.raises(AssertionError, match=r"tried to reach 192\.0\.2\.1"):
        getattr(client, method)(("192.0.2.1", 9))


def test_no_name_is_looked_up():
    with pytest.raises(AssertionError, match="tried to reach example"):
        socket.create_connection(("example.invalid", 80), timeout=1)


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=lambda: server.accept()[0].close())
        accepting.start()
        with socket.create_connection(server.getsockname(), timeout=10) as client:
            assert client.recv(1) == b""
        accepting.join(timeout=10)
        assert not accepting.is_alive()


def test_the_tolerance_table_tells_close_from_apart(tolerance):
    one = torch.ones(3)
    torch.testing.assert_close(one, one + 1e-6, **tolerance(torch.float32))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one, one + 1e-3, **tolerance(torch.float32))
