"""The service over real HTTP: what Logto sends is answered 200, once it is on disk."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import msgspec
import pytest

from logto_webhooks import server
from logto_webhooks.cli.trigger import send_requests
from logto_webhooks.instrumentation.logs import LINES
from logto_webhooks.samples import history
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import recorded
from tests.support.service import PATH, Service, wait_until_done

KEYS = ",".join([*recorded.KEYS, SIGNING_KEY])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with Service(folder, "--log-format", "json", LOGTO_WEBHOOK_SIGNING_KEY=KEYS) as running:
        yield running


@pytest.mark.parametrize("delivery", recorded.deliveries(), ids=lambda each: each.name)
def test_every_recorded_delivery_is_accepted(service: Service, delivery: recorded.Recorded) -> None:
    """With its real body, headers and signature; those with a header set twice by hand are 401."""
    answer = service.post(delivery.signed)
    if "hooktest-multi" in delivery.name:
        assert answer.status_code == 401
    else:
        assert answer.status_code == 200
        assert answer.json().keys() == {"id", "duplicate"}
        assert isinstance(answer.json()["id"], str)


def test_the_answer_tells_nothing_of_a_person(service: Service) -> None:
    """Logto stores it."""
    first = service.post(delivery := make.user_created(email="ana@example.com"))
    second = service.post(delivery)
    assert first.json() == {"id": first.json()["id"], "duplicate": False}
    assert second.json() == {"id": first.json()["id"], "duplicate": True}
    assert first.headers["content-type"] == "application/json"


def test_what_was_answered_200_is_on_disk(tmp_path: Path) -> None:
    """Also after kill -9; and the next start applies it."""
    with Service(tmp_path) as service:
        for number in range(20):
            assert service.post(make.user_created(id=f"u{number}")).status_code == 200
        service.process.send_signal(signal.SIGKILL)
        service.process.wait(10)
    with Service(tmp_path) as service:
        assert service.stored() == 20
        wait_until_done(service)
        assert service.rows("SELECT count(*) FROM logto_users") == [(20,)]


def test_one_line_is_logged_for_each_delivery(service: Service) -> None:
    """With id, event, subject, outcome and the time it took, in JSON."""
    answer = service.post(make.user_created(id="logged"))
    line = msgspec.json.decode(service.wait_for_log("user:logged"))
    assert line.pop("time")
    assert line.pop("took_ms") >= 0
    assert line == {
        "level": "info",
        "message": "delivery",
        "id": int(answer.json()["id"]),
        "event": "User.Created",
        "subject": "user:logged",
        "outcome": "applied",
    }


def test_what_was_summed_up_is_logged_at_the_end(tmp_path: Path) -> None:
    """Although the time that it is counted for isn't over."""
    with Service(tmp_path) as service:
        for _ in range(LINES + 7):
            assert service.http.post("/elsewhere").status_code == 404
        service.process.terminate()
        assert service.process.wait(30) == 0
    assert "refused not_found: 7 more like this" in service.log


def test_odd_fields_are_a_warning_in_its_line(service: Service) -> None:
    """A new Logto release doesn't stop the copy."""
    service.post(make.user_created(id="odd", ip=7))
    assert msgspec.json.decode(service.wait_for_log("user:odd"))["odd_fields"] == ["ip"]


def test_a_whole_history_over_http(tmp_path: Path) -> None:
    """480 connections at once, as Logto opens them to a slow receiver: all are answered 200."""
    recorded_history = history.load("lossy")
    statuses: list[int] = []

    def answered(_: SignedRequest, response: httpx2.Response) -> None:
        statuses.append(response.status_code)

    with Service(tmp_path, LOGTO_WEBHOOK_SIGNING_KEY=recorded_history.signing_key) as service:
        url = f"{service.url}{PATH}"
        asyncio.run(send_requests(url, recorded_history.deliveries, answered, concurrency=480))
        assert statuses == [200] * len(recorded_history.deliveries)
        assert service.stored() == len(recorded_history.deliveries)
        wait_until_done(service)


def test_an_answer_is_one_piece(service: Service) -> None:
    """Head and body together, in order, on a connection that stays; and a head alone is sent."""
    made = make.user_created()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(made.body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in made.headers if name != "host")
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        for _ in range(2):
            connection.sendall(head.encode() + b"\r\n" + made.body)
            answered = connection.recv(65_536)
            assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b'{"id":' in answered
        connection.sendall(b"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")
        connection.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 100 Continue\r\n")
        connection.sendall(made.body)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400 ")
        assert connection.recv(65_536) == b""


def test_idle_connections_outlive_logtos() -> None:
    """Logto closes its own after 4 to 13 s; who closes first loses a delivery."""

    async def app(scope: object, receive: object, send: object) -> None:
        """Answer nothing."""

    listener = server.listen("127.0.0.1", 0)
    made = server.Server(app, listener)
    assert made._server.config.timeout_keep_alive == 75
    listener.close()
