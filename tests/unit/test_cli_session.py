"""A command's event loop."""

from __future__ import annotations

import _socket
import asyncio

import pytest

from logto_webhooks.cli.session import run_async

uvloop = pytest.importorskip("uvloop")


@pytest.mark.parametrize("start", [2, 3], ids=["generators", "thread pool"])
def test_ctrl_c_while_the_loop_ends(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is Ctrl-C, although uvloop raises a RuntimeError. The loop opens a pair of sockets each
    time that it is run: for the coroutine, for generators, for the thread pool."""
    real, calls = _socket.socketpair, 0

    def interrupted(*arguments: int) -> tuple[_socket.socket, _socket.socket]:
        nonlocal calls
        calls += 1
        if calls == start:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(_socket, "socketpair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_async(asyncio.sleep(0))
    assert calls == start
