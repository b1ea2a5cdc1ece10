"""Create a user from token claims before its webhook arrives: the mirror's row, and the
application's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.apply import batch
from logto_webhooks.database.runner import HandlerRunner, TransactionRunner
from logto_webhooks.database.sessions import make_session_error
from logto_webhooks.database.store import Store
from logto_webhooks.database.threads import HAS_WRITER, DetachedCall
from logto_webhooks.errors import (
    ClaimsUnusable,
    LogtoApiError,
    LogtoUnreachable,
    SettingInvalid,
    UserHasNoRow,
    UserIsDeletedError,
    UserNotReady,
    WriterBusy,
)
from logto_webhooks.events.local import UserRow
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import ApiResponse, make_span_clock, read_span_clock
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.own_rows import (
    OwnRow,
    describe_several_rows,
    find_own_row,
    select_own,
)
from logto_webhooks.records import local_events
from logto_webhooks.records.record import GUARD_MS, Change, Key, Record, Upsert, Value

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

# Lone surrogates aren't valid text, and no database stores them.
_SURROGATES: Final = r"\ud800-\udfff"
Text = Annotated[str, Meta(pattern=rf"\A[^{_SURROGATES}]*\Z")]
Sub = Annotated[str, Meta(min_length=1, max_length=256, pattern=rf"\A[^\0:{_SURROGATES}]*\Z")]


class Claims(Struct, frozen=True, kw_only=True):
    """The claims of an ID token, an access token or of `/oidc/me`, as Logto names them.

    An application's own token has its id in both `sub` and `client_id`.
    """

    sub: Sub
    client_id: Any = None
    username: Text | None = None
    email: Text | None = None
    phone_number: Text | None = None
    name: Text | None = None
    picture: Text | None = None


def to_change(claims: Mapping[str, Any]) -> Upsert:
    """Return the change for claims, with a low stamp, so that any data from Logto wins.

    Raises ClaimsUnusable.
    """
    if not isinstance(claims, Mapping):
        raise ClaimsUnusable(problem=f"they are a {type(claims).__name__}, not a mapping")
    try:
        parsed = msgspec.convert(dict(claims), Claims)
    except msgspec.ValidationError as error:
        raise ClaimsUnusable(problem=str(error)) from None
    if parsed.client_id == parsed.sub:
        raise ClaimsUnusable(
            problem="they belong to an application, because `sub` equals `client_id`"
        )
    own: dict[str, Any] = {
        "username": parsed.username,
        "primaryEmail": parsed.email,
        "primaryPhone": parsed.phone_number,
        "name": parsed.name,
        "avatar": parsed.picture,
        "identities": {},
    }
    return _make_change(Key("user", parsed.sub), own)


def _make_change(key: Key, own: dict[str, Any]) -> Upsert:
    """Make a change from claims. Those that say more win over others, without doubt."""
    said = sum(value is not None for value in own.values())
    return Upsert(key, {"own": Value(own, stamp=said, start=GUARD_MS + 1, end=0)})


POLL_S: Final = 0.1
WRITERS: Final = 2  # users that are created at once
ASK_S: Final = 3.0  # for Logto's answer, because a request of the application waits for it


def find_user(store: Store, claims: Mapping[str, Any]) -> UserRow | None:
    """Return the user of the claims if it is here and they add nothing, without locking it. Raises
    ClaimsUnusable."""
    change = to_change(claims)
    record = store.read_unlocked([change.key])[change.key]
    return None if _complete(record, change) else _find_row(record)


def _complete(record: Record, change: Upsert) -> Upsert | None:
    """Return the change that completes a user of whom only other claims are known, such as those of
    an access token; None if Logto has told of the user, or the claims add nothing."""
    known, own = record.groups.get("own"), change.values["own"].content
    if known is None or not known.is_claimed or record.deleted_at is not None:
        return None
    new = {
        name: value
        for name, value in own.items()
        if value is not None and known.content[name] is None
    }
    return _make_change(record.key, known.content | new) if new else None


def ensure_user(store: Store, claims: Mapping[str, Any], answer: Change | None = None) -> UserRow:
    """Return the user of the claims. If unknown, or known only from claims that said less, write
    the user from `answer`, which is Logto's answer about the user, or else from the claims.

    Raises ClaimsUnusable, UserDeleted.
    """
    change = to_change(claims)
    record = store.lock([change.key])[change.key]
    is_gone = record.deleted_at is not None
    completion = _complete(record, change)
    told_by: Change | None = answer
    if answer is None and not is_gone:  # claims don't restore a deleted user
        told_by = completion or change
    if told_by is not None and (is_gone or not record.complete or completion):
        batch.apply_reads(store, [told_by], "ensure_user")
        record = store.lock([change.key])[change.key]
    return _to_row(record)


class UserLookup:
    """Finds and creates users for all callers on one event loop. Together, they use one connection
    to read and `WRITERS` to write, because others need the pool, such as accepting."""

    def __init__(self, host: TransactionRunner) -> None:
        self._host = host
        self._asked: dict[Key, asyncio.Future[Record]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._writing = asyncio.Semaphore(WRITERS)
        self._writes: dict[tuple[str, bool], asyncio.Task[UserRow]] = {}
        self._requests: dict[Key, asyncio.Task[ApiResponse | None]] = {}

    async def ensure(
        self, claims: Mapping[str, Any], logto: ManagementClient | None = None
    ) -> UserRow:
        """Return the user of the claims. A user who is unknown, or may have been restored after a
        deletion, is created from Logto's answer if there is one, else from the claims.

        Raises ClaimsUnusable, UserDeleted, InvalidApiResponse, WriterBusy, StoreUnavailable.
        """
        key = to_change(claims).key
        if HAS_WRITER.get():  # earlier calls may wait for this handler's writer
            raise WriterBusy()
        record = await self._find(key)
        row = _find_row(record)
        if row is not None and _complete(record, to_change(claims)) is None:
            return row
        may_ask = record.deleted_at is None or _may_be_back(record, claims)
        answered = await self.ask(logto, key) if logto and may_ask else None
        answer = None
        if answered is not None:
            when = (await make_span_clock(self._host))(answered)
            answer = api_responses.read_user(key.id, answered.content, when)
        # A user whose record is locked takes one turn, however many requests there are.
        # Logto's answer can restore a deleted user, claims can't.
        turn = (key.id, answer is not None)
        if turn in self._writes:
            await asyncio.shield(self._writes[turn])
            return await self.ensure(claims, logto)  # these claims may say more
        write = asyncio.create_task(self._write(claims, answer))
        write.add_done_callback(partial(self._finish_write, turn))
        self._writes[turn] = write
        return await asyncio.shield(write)

    async def wait(self, user_id: str, timeout_s: float) -> UserRow:
        """Wait until a user is known here. Raises ClaimsUnusable for an invalid id, TimeoutError,
        UserDeleted, StoreUnavailable."""
        key = to_change({"sub": user_id}).key
        waits = timeout_s > 0
        async with asyncio.timeout(timeout_s if waits else None):
            while True:
                record = await self._find(key)
                if record.complete or record.deleted_at is not None:
                    return _to_row(record)
                if not waits:
                    raise TimeoutError
                await asyncio.sleep(POLL_S)  # another process may apply the webhook

    async def ask(self, logto: ManagementClient, key: Key) -> ApiResponse | None:
        """Ask Logto about a user; None if it can't be asked now, or has no such user: the token's
        user existed, so wait for the webhook. Calls at the same time share a request."""
        if key not in self._requests:
            request = asyncio.create_task(_request(logto, key))
            self._requests[key] = request
            request.add_done_callback(lambda _: self._requests.pop(key))
        return await asyncio.shield(self._requests[key])

    async def _write(self, claims: Mapping[str, Any], answer: Change | None) -> UserRow:
        async with self._writing:
            return await self._host.run(lambda store: ensure_user(store, claims, answer))

    def _finish_write(self, turn: tuple[str, bool], write: asyncio.Task[UserRow]) -> None:
        del self._writes[turn]
        if not write.cancelled():
            write.exception()  # every caller may have been cancelled

    async def _find(self, key: Key) -> Record:
        """Return a user's record, empty if unknown. Calls at the same time share a query. Raises
        StoreUnavailable."""
        loop = asyncio.get_running_loop()
        if key not in self._asked:
            self._asked[key] = loop.create_future()
        found = self._asked[key]
        if self._looking is None:
            self._looking = loop.create_task(self._look())
        return await asyncio.shield(found)

    async def _look(self) -> None:
        try:
            while self._asked:
                await asyncio.sleep(0)  # collect other calls
                asked, self._asked = self._asked, {}
                try:
                    records = await self._host.read(partial(Store.read_unlocked, keys=asked))
                except Exception as error:
                    for found in asked.values():
                        found.set_exception(error)
                else:
                    for key, found in asked.items():
                        found.set_result(records[key])
                finally:
                    for found in asked.values():
                        found.cancel()  # if this was cancelled
        finally:
            self._looking = None


async def _request(logto: ManagementClient, key: Key) -> ApiResponse | None:
    try:
        async with asyncio.timeout(ASK_S):
            answered = await logto.user(key.id)
    except (LogtoUnreachable, LogtoApiError, TimeoutError):
        return None
    return None if answered.content is None else answered


T = TypeVar("T")
# Asks Logto about a user.
Ask = Callable[[Key], Awaitable[ApiResponse | None]]


class OwnUsers(Generic[T]):
    """Gets the application's own objects of users, in its sessions. Only a session's connection is
    used: others may all be held by requests that wait for this one."""

    def __init__(self, host: HandlerRunner, mappings: Mappings, target: type[T]) -> None:
        """Raises SettingInvalid for a class that isn't mapped."""
        mapping = mappings.find_entity(target)
        if mapping is None or mapping.kind != "user" or not isinstance(target, type):
            name = getattr(target, "__name__", repr(target))
            problem = "it isn't a class whose table map_users maps; call map_users with it first"
            raise SettingInvalid(name=name, problem=problem)
        self._host = host
        self._mappings = mappings
        self._mapping = mapping
        self._target = target

    async def get(self, claims: Mapping[str, Any], session: Any, ask: Ask | None) -> T:
        """Return the object of the claims' user. If its row isn't there, write the user and the row
        from the claims; if these lack something, and there is `ask`, from Logto's answer.

        Raises ClaimsUnusable, UserIsDeletedError, UserHasNoRow, UserNotReady, SettingInvalid,
        InvalidApiResponse, StoreUnavailable.
        """
        key = to_change(claims).key
        _check_session(session)
        within = self._host.within
        row = await within(session, partial(self._find, key=key), writes=False)
        if row.state == "here" and not row.is_deleted:  # the usual case, which locks nothing
            found = await self._load(key, session, {})
            if found is not None:
                return found
        try:
            await within(session, partial(self._write, claims=claims))
        except (UserNotReady, UserHasNoRow, UserIsDeletedError) as error:
            record = await within(session, partial(_read_record, key=key), writes=False)
            is_over = isinstance(error, UserIsDeletedError) and not _may_be_back(record, claims)
            answered = None if ask is None or is_over else await ask(key)
            if answered is None:
                raise
            await within(session, partial(self._write, claims=claims, answered=answered))
        # The session may have the object as it was before.
        found = await self._load(key, session, {"populate_existing": True})
        if found is None:
            raise self._not_ready(key, "the session doesn't see it")
        return found

    def _find(self, store: Store, key: Key) -> OwnRow:
        return find_own_row(store.connection, self._mapping, key.id)

    def _write(
        self, store: Store, claims: Mapping[str, Any], answered: ApiResponse | None = None
    ) -> None:
        """Write the user and the own row, or else raise, which undoes both."""
        key = to_change(claims).key
        registered = store.mappings.registered()
        store.mappings.register(
            [mapping for mapping in self._mappings.registered if mapping.name not in registered]
        )
        if answered is not None:
            when = read_span_clock(store)(answered)
            answer = api_responses.read_user(key.id, answered.content, when)
            batch.apply_reads(store, [answer], "ensure_user")
        ensure_user(store, claims)
        store.mark_changed([key])
        store.project_changes()
        row = self._find(store, key)
        if row.state == "absent" and not _is_claimed(store, key):
            raise UserHasNoRow(id=key.id, table=self._mapping.name, reason=row.reason)
        if row.state != "here":
            raise self._not_ready(key, row.reason)

    async def _load(self, key: Key, session: Any, options: dict[str, Any]) -> T | None:
        here = OwnRow(state="here")
        query = select_own(self._mapping, self._target, key.id, here).execution_options(**options)
        if hasattr(session, "sync_session"):
            result = await session.scalars(query)
        else:
            result = await DetachedCall[Any]().run(partial(session.scalars, query))
        objects = result.unique().fetchmany(2)
        if len(objects) > 1:
            raise self._not_ready(key, describe_several_rows(self._mapping))
        found: T | None = objects[0] if objects else None
        return found

    def _not_ready(self, key: Key, reason: str) -> UserNotReady:
        return UserNotReady(id=key.id, table=self._mapping.name, reason=reason)


def _check_session(session: Any) -> None:
    from sqlalchemy.orm import Session  # slow to import, and rarely used

    if not isinstance(session, Session) and not hasattr(session, "sync_session"):
        raise make_session_error(session, "an AsyncSession or a Session")


def _read_record(store: Store, key: Key) -> Record:
    return store.read_unlocked([key])[key]


def _is_claimed(store: Store, key: Key) -> bool:
    """Whether only claims tell of the user, which may lack what the mapping decides by."""
    own = _read_record(store, key).groups.get("own")
    return own is None or own.is_claimed


def _may_be_back(record: Record, claims: Mapping[str, Any]) -> bool:
    """Whether there is evidence of a user after the deletion: from Logto, or a later token."""
    issued_at = claims.get("iat")
    if isinstance(issued_at, int | float) and issued_at * 1000 > (record.deleted_at or 0):
        return True
    return bool(record.doubts)


def _find_row(record: Record) -> UserRow | None:
    """Return the row of a user; None if the user isn't known, or was deleted."""
    return None if record.deleted_at is not None else local_events.user_row(record)


def _to_row(record: Record) -> UserRow:
    if (row := _find_row(record)) is None:
        raise UserIsDeletedError(id=record.key.id)
    return row
