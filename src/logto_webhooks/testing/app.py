"""The whole way of a delivery in memory: no server, no thread, no event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from logto_webhooks.adapters.hosts.memory import MemoryHost
from logto_webhooks.adapters.stores.memory import MemoryStore, Tables
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.ports import Accepted, Found, Status, Store, Waiting
from logto_webhooks.core.reports import Failed, Report, Synced
from logto_webhooks.core.signature import HEADER, VerifiedBody
from logto_webhooks.samples.signed import Signed
from logto_webhooks.service.receive import Receiver
from logto_webhooks.service.work import Worker
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.make import SIGNING_KEY

T = TypeVar("T")
_ALL = 1_000_000


class Delivered(Struct, frozen=True):
    """What became of a delivery: the answer's status, and the outcome of the sync.

    `outcome` is applied, stale, tombstoned, unchanged, asks, nothing, test, unknown, failed,
    dead or duplicate; None when it wasn't accepted.
    """

    status: int
    id: int | None = None
    outcome: str | None = None


class App:
    """Receiver and worker over the store in memory."""

    def __init__(self, *, keys: Sequence[str] = (SIGNING_KEY,), clock: FrozenClock | None = None):
        self.clock: FrozenClock = clock or FrozenClock()
        self.reports: list[Report] = []
        self._tables = Tables()
        host = MemoryHost(self._open)
        self._host = host
        self._receiver = Receiver(keys, self._store, self.clock, self.reports.append, _here)
        self.worker: Worker = Worker(host, self.clock, self.reports.append, jitter=lambda: 0.0)

    def deliver(self, *deliveries: Signed) -> Delivered:
        """Receive deliveries, then apply what is due; say what became of the last."""
        answers = [self._receive(each) for each in deliveries]
        self.work()
        return self._outcome(answers[-1])

    def work(self) -> None:
        """Apply all that is due now; `clock.tick` makes more of it due."""
        while _run(self.worker.step()):
            pass

    def status(self) -> Status:
        """Count deliveries and records."""
        return self._read(lambda store: store.status())

    def users(self, query: str = "") -> list[Found]:
        """Find users; all of them if nothing is asked for."""
        return self._read(lambda store: store.find("user", query, _ALL))

    def organizations(self, query: str = "") -> list[Found]:
        """Find organizations; all of them if nothing is asked for."""
        return self._read(lambda store: store.find("organization", query, _ALL))

    def waiting(self) -> list[Waiting]:
        """List the records that only Logto can settle."""
        return self._read(lambda store: store.waiting(_ALL))

    def _receive(self, delivery: Signed) -> Delivered:
        signatures = [value.encode() for name, value in delivery.headers if name == HEADER]
        answer = _run(self._receiver.receive(signatures, delivery.body))
        if answer.status != 200:
            return Delivered(answer.status)
        duplicate = answer.content["duplicate"]
        return Delivered(200, int(answer.content["id"]), "duplicate" if duplicate else None)

    def _outcome(self, answer: Delivered) -> Delivered:
        if answer.id is None or answer.outcome:
            return answer
        for report in reversed(self.reports):
            if isinstance(report, Synced) and report.id == answer.id:
                return Delivered(200, answer.id, report.outcome)
            if isinstance(report, Failed) and report.id == answer.id:
                outcome = "dead" if report.retry_in_s is None else "failed"
                return Delivered(200, answer.id, outcome)
        return answer

    async def _store(self, delivery: Delivery) -> Accepted:
        [accepted] = await self._host.run(lambda store: store.add([delivery]))
        return accepted

    def _open(self) -> tuple[Store, Callable[[], None]]:
        snapshot = self._tables.copy()

        def undo() -> None:
            self._tables = snapshot

        return MemoryStore(self._tables, self.clock), undo

    def _read(self, work: Callable[[Store], T]) -> T:
        return _run(self._host.read(work))


async def _here(
    identify: Callable[[VerifiedBody, int], Delivery], body: VerifiedBody, at: int
) -> Delivery:
    return identify(body, at)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never has to wait, in a test with or without an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("the memory host never waits")
