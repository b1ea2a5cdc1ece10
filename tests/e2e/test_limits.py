"""Limits that every server has, over real sockets to a real process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from logto_webhooks.signing_keys import HEADER, sign
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.service import PATH, Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all that can't harm it."""
    with Service(tmp_path_factory.mktemp("service")) as running:
        yield running


def head(*lines: str, target: str = PATH) -> bytes:
    start = [f"POST {target} HTTP/1.1", "host: 127.0.0.1", *lines]
    return ("\r\n".join(start) + "\r\n\r\n").encode()


def signed(body: bytes, *lines: str) -> bytes:
    signature = f"{HEADER}: {sign(body, SIGNING_KEY)}"
    return head(f"content-length: {len(body)}", signature, *lines) + body


def answer(connection: socket.socket) -> bytes:
    """What comes, until the answer is whole or the connection is closed."""
    text = b""
    while b"}" not in text:
        piece = connection.recv(2**16)
        if not piece:
            break
        text += piece
    return text


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head("x: " + "a" * 70_000), b"431"),
        (head(*(f"x{number}: y" for number in range(300))), b"431"),
        (head("x: " + "a" * 300_000), b"431"),
        (head("x" * 70_000 + ": a"), b"431"),
        (head(target="/" + "a" * 70_000), b"414"),
        (head(target=PATH + "?" + "a" * 300_000), b"414"),
        (
            head("transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\nx: " + b"a" * 300_000,
            b"431",
        ),
        (b"no HTTP\r\n\r\n", b"400"),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", b"400"),
    ],
    ids=["value", "number", "long value", "name", "path", "query", "trailer", "junk", "CONNECT"],
)
def test_what_is_too_large_is_refused(service: Service, request_: bytes, status: bytes) -> None:
    """In one piece or in many, and the client reads why; the service goes on."""
    for size in (len(request_), 10_000):
        with service.connect() as connection:
            for start in range(0, len(request_), size):
                connection.sendall(request_[start : start + size])
            assert answer(connection).split()[1] == status
    assert service.post(make.user_created()).status_code == 200


def test_a_head_below_the_limit_with_a_large_body_is_accepted(service: Service) -> None:
    """The body doesn't count, though it comes in the same piece."""
    body = make.user_created(name="x" * 200_000).body
    with service.connect() as connection:
        connection.sendall(signed(body, "x: " + "a" * 60_000))
        assert answer(connection).split()[1] == b"200"


@pytest.mark.parametrize("cut", [10, 90, 250, 10_000])
def test_an_offer_of_another_protocol_is_ignored(service: Service, cut: int) -> None:
    """Wherever the head is cut, in a chunked body, and one after the other."""
    upgrade = ("connection: keep-alive, Upgrade, HTTP2-Settings", "upgrade: h2c")
    first, second = (make.user_created().body for _ in range(2))
    chunked = head(
        *upgrade, "transfer-encoding: chunked", f"{HEADER}: {sign(second, SIGNING_KEY)}"
    ) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(second), second)
    both = signed(first, *upgrade, "http2-settings: AAMAAABk") + chunked
    with service.connect() as connection:
        connection.sendall(both[:cut])
        connection.sendall(both[cut:])
        text = b""
        while text.count(b'"duplicate":false') < 2:
            piece = connection.recv(2**16)
            assert piece, text
            text += piece
    assert b" 101 " not in text


def test_bodies_that_are_nearly_whole_hold_back_nobody(tmp_path: Path) -> None:
    """However many of them look signed; those that are small are served at once."""
    size = 8 * 2**20
    junk = head(f"content-length: {size}", f"{HEADER}: {'0' * 64}")
    piece = b"x" * (size - 1)
    with Service(tmp_path) as service:
        connections = [service.connect() for _ in range(40)]

        def send(connection: socket.socket) -> None:
            try:
                connection.sendall(junk + piece)
            except OSError:
                return

        threads = [threading.Thread(target=send, args=(each,)) for each in connections]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert service.post(make.user_created()).status_code == 200
        large = make.user_created(name="x" * 3_600_000)
        assert service.post(large).status_code == 200
        for connection in connections:
            connection.close()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("sent", [b"", head("x: y")[:-2], head("content-length: 9") + b"x"])
def test_slow_clients_that_hold_all_descriptors_make_room(tmp_path: Path, sent: bytes) -> None:
    """Whether they said nothing, half a head or half a body."""
    limit = """sh -c 'ulimit -n 64; exec "$@"' sh"""
    with Service(tmp_path, prefix=limit) as service:
        slow = [service.connect() for _ in range(100)]
        for connection in slow:
            try:
                connection.sendall(sent)
            except OSError:
                continue
        for _ in range(5):
            with service.connect() as connection:
                connection.sendall(signed(make.user_created().body))
                assert answer(connection).split()[1] == b"200"
        for connection in slow:
            connection.close()
