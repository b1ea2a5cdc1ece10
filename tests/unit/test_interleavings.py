"""One user is changed, told of by webhooks, and asked about, all at once and in any order."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from msgspec import Struct

from logto_webhooks.events import parse
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.records.changes import changes_from_event
from logto_webhooks.records.merge import merge
from logto_webhooks.records.projection import project
from logto_webhooks.records.record import Absent, Change, Key, Record
from logto_webhooks.signing_keys import trust

Json = dict[str, Any]
USER = Key("user", "u")
BORN = 1_795_485_335_000
LATER_MS = 10_000


class Write(Struct):
    """A change in Logto: begun, executed, and told of, each a little later; or not told."""

    start: int
    executed: int
    told: int
    route: str
    value: Json | None  # None deletes
    lost: bool


class Question(Struct):
    """A question to Logto's API, asked by then."""

    asked: int


class Logto(RuleBasedStateMachine):
    """Logto's truth, what is under way, and what the record makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BORN
        self.truth: Json | None = {"name": "0", "customData": {}}
        self.number = 0
        self.writes: list[Write] = []
        self.unheard: list[Write] = []  # lost, and not seen by a read since
        self.questions: list[Question] = []
        self.under_way: list[Change] = []
        self.known = Record(USER)
        self._tell(Write(BORN, BORN, BORN, "", {}, False))

    @rule(pause=st.sampled_from([1, 5, 20, 60, 150, 700]))
    def time_passes(self, pause: int) -> None:
        """What is due is executed."""
        self.now += pause
        due = sorted((w for w in self.writes if w.executed <= self.now), key=lambda w: w.executed)
        self.writes = [each for each in self.writes if each.executed > self.now]
        for write in due:
            self._execute(write)

    @rule(
        route=st.sampled_from(["", "/custom-data"]),
        takes=st.sampled_from([0, 5, 50]),
        dispatch=st.sampled_from([0, 5, 50]),
        lost=st.sampled_from([False, False, True]),
    )
    def somebody_writes(self, route: str, takes: int, dispatch: int, lost: bool) -> None:
        """A whole user, or a part."""
        self.number += 1
        value: Json = {"customData": {"n": self.number}} if route else {"name": str(self.number)}
        executed = max([self.now + takes, *(each.executed + 1 for each in self.writes)])
        self.writes.append(
            Write(self.now, executed, executed + dispatch, route, value, lost and self.number > 1)
        )

    @precondition(lambda self: self.number > 3)
    @rule(lost=st.booleans())
    def somebody_deletes(self, lost: bool) -> None:
        """Once; later writes find nobody."""
        executed = max([self.now, *(each.executed + 1 for each in self.writes)])
        self.writes.append(Write(self.now, executed, executed + 5, "", None, lost))

    @rule()
    def a_read_begins(self) -> None:
        """It is asked."""
        self.questions.append(Question(self.now))

    @rule(late=st.sampled_from([0, 30, 900]))
    def a_read_is_quick(self, late: int) -> None:
        """It is asked, and answered within the millisecond."""
        self.under_way.append(self._answered(self.now - 1, self.now + late))

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), early=st.sampled_from([1, 30, 900]), late=st.sampled_from([0, 30, 900]))
    def a_read_is_answered(self, data: Any, early: int, late: int) -> None:
        """With what is true now; when exactly it was, is known to some hundred ms."""
        question = self.questions.pop(data.draw(st.integers(0, len(self.questions) - 1)))
        self.under_way.append(self._answered(question.asked - early, self.now + late))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def something_is_applied(self, data: Any) -> None:
        """A webhook or an answer, whichever."""
        self._apply(self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1))))

    def teardown(self) -> None:
        """All arrives: what isn't in doubt is true. Then one read settles it all."""
        self.time_passes(1_000)
        order = random.Random(len(self.under_way))
        order.shuffle(self.under_way)
        before = self.known
        for change in self.under_way:
            self._apply(change)
        if self.known.waiting_for is None and not self.unheard:
            self._must_be_true()
        self.now += LATER_MS
        read = self._answered(self.now, self.now + 500)
        for late in (0, len(self.under_way)):  # the read comes last, or all else does
            self.known = before
            for change in [*self.under_way[late:], read, *self.under_way[:late]]:
                self._apply(change)
            assert self.known.waiting_for is None
            self._must_be_true()

    def _apply(self, change: Change) -> None:
        again = merge(merge(self.known, change), change)
        self.known = merge(self.known, change)
        assert again == self.known

    def _must_be_true(self) -> None:
        if self.truth is None:
            assert self.known.deleted_at is not None
            return
        row = project(self.known)
        assert row
        assert self.known.deleted_at is None
        assert row["name"] == self.truth["name"]
        assert row["custom_data"] == self.truth["customData"] | {"logtoUserId": "u"}

    def _execute(self, write: Write) -> None:
        if self.truth is None:
            return
        self.truth = None if write.value is None else self.truth | write.value
        if write.lost:
            self.unheard.append(write)
        else:
            self._tell(write)

    def _tell(self, write: Write) -> None:
        stamp = datetime.fromtimestamp(write.told / 1000, UTC).isoformat(timespec="milliseconds")
        body: Json = {"event": "User.Data.Updated", "createdAt": stamp, "params": {"userId": "u"}}
        if write.value is None:
            body |= {"event": "User.Deleted", "matchedRoute": "/users/:userId"}
        else:
            body["matchedRoute"] = f"/users/:userId{write.route}"
            whole = self._whole(write.start)
            body["data"] = whole["customData"] if write.route else whole
        self.under_way += changes_from_event(parse(trust(msgspec.json.encode(body))))

    def _answered(self, at: int, end: int) -> Change:
        self.unheard = [each for each in self.unheard if each.executed > at]
        content = self._whole(self.now) if self.truth is not None else None
        told = api_responses.read_user("u", content, Span(at, end))
        assert isinstance(told, Absent) == (self.truth is None)
        return told

    def _whole(self, updated_at: int) -> Json:
        assert self.truth is not None
        return {"id": "u", "updatedAt": updated_at, "isSuspended": False, **self.truth}


TestInterleavings = Logto.TestCase
# Short ones: most of what can go wrong takes a few steps, and is seldom met among many.
TestInterleavings.settings = settings(
    max_examples=20 * settings().max_examples, stateful_step_count=8
)
