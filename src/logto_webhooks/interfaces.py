"""Protocols of what has more than one implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any, Final, Protocol, TypeVar

from msgspec import Struct

from logto_webhooks.clock_offset import Clocks
from logto_webhooks.deliveries import (
    ClaimedDelivery,
    DeliveryOutcome,
    Inbox,
    NewDelivery,
    ReceivedBody,
    StoreResult,
)
from logto_webhooks.flow import Gap, RecordedFlow
from logto_webhooks.jobs import Jobs
from logto_webhooks.records.record import Ending, Key, Kind, Record
from logto_webhooks.signing_keys import KeyStore

T = TypeVar("T")
LONGEST_S: Final = 1.0  # a transaction of the worker, where it holds up only other workers
# The execution option of an engine that holds the name of the setting with its URL.
SETTING: Final = "logto_setting"


class Status(Struct, frozen=True, kw_only=True):
    """Counts of deliveries, records and jobs. `oldest_pending_s` is None if nothing is pending.

    `recovered` counts deliveries from Logto's log, which was last read at `complete_up_to` (ms).
    All records were last compared with Logto at `reconciled_at` (ms). Since `silent_since` (ms), no
    deliveries arrived, or all were rejected; None while they arrive as usual. `memberships_to_end`
    are still listed although their user or organization was deleted. `jobs` are counted by state,
    `unrunnable` are jobs of handlers that nobody registered, and `spooled` are deliveries in the
    spool directory.
    """

    deliveries: dict[str, int]
    doubtful: int
    refetch: int
    oldest_pending_s: float | None
    recovered: int = 0
    complete_up_to: int | None = None
    reconciled_at: int | None = None
    silent_since: int | None = None
    memberships_to_end: int = 0
    jobs: dict[str, int] = {}
    unrunnable: dict[str, int] = {}
    spooled: int = 0


RECOVER: Final = "recover"
RECONCILE: Final = "reconcile"


class Checkpoint(Struct, frozen=True):
    """How far long work has come: up to which moment (ms), and with how much to show for it."""

    at: int
    count: int


class Lease(Struct, frozen=True):
    """Which process holds something, and until when (ms)."""

    holder: int
    until: int


class DatabaseClock(Struct, frozen=True, kw_only=True):
    """What the database's clock says now, what it said when that was last noted and when this was
    installed (ms; 0 if never), by how much due times were moved along with it in all, and whether
    a delivery is due later than any wait explains."""

    now: int
    noted: int
    installed: int
    moved: int
    due_too_late: bool


class RefetchNeed(Struct, frozen=True, kw_only=True):
    """A record that needs a refetch, and why."""

    key: Key
    reason: str
    doubtful: bool


class FoundRow(Struct, frozen=True, kw_only=True):
    """A user's or an organization's row, why it needs a refetch, and its memberships.

    Memberships in doubt are listed separately, whether they exist or not. `roles` are the names of
    a user's roles.
    """

    row: dict[str, Any]
    waiting_for: str | None
    memberships: list[str]
    memberships_in_doubt: list[str]
    roles: list[str] = []


class ApiResponse(Struct, frozen=True, kw_only=True):
    """What Logto's API answered: `content` is decoded JSON, None where there is no such thing.

    Times in milliseconds: `asked_at` and `took` by our clock, `date` by Logto's, as its header
    tells it to the second. `total` counts all items of a listing.
    """

    content: Any
    asked_at: int
    took: int
    date: int | None = None
    total: int | None = None


LOCK_S: Final = 1.0  # that a transaction of ours waits for a lock
STATEMENT_S: Final = 5.0  # that one of its statements may take


class Store(Protocol):
    """The database within one transaction."""

    @property
    def inbox(self) -> Inbox:
        """The inbox to look at."""

    def add(
        self, deliveries: Sequence[NewDelivery], tried: Collection[bytes] = ()
    ) -> list[StoreResult]:
        """Put deliveries into the inbox; one answer each, in order.

        Those whose digests were `tried` before may be there already, with the same `received_at`:
        then they are no duplicates of others.
        """

    def limit_waits(self, lock_s: float, statement_s: float) -> None:
        """Let this transaction wait no longer for a lock, or for a statement, where the database
        can limit that: TimedOut is raised then. A host's `run` sets LOCK_S and STATEMENT_S."""

    def claim(
        self, token: str, limit: int, max_bytes: int, lease_s: float
    ) -> list[ClaimedDelivery]:
        """Take due deliveries, the longest due first; nobody else gets them during the lease."""

    def renew(self, token: str, ids: Sequence[int], lease_s: float) -> None:
        """Hold claimed deliveries longer. Raises ClaimLost when any is no longer held."""

    def finish(self, token: str, outcomes: Sequence[DeliveryOutcome]) -> None:
        """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""

    def lock(
        self, keys: Sequence[Key], *, share: bool = False, ends: Sequence[Key] = ()
    ) -> dict[Key, Record]:
        """Hold records until the transaction ends; of unknown ones there are empty stubs.

        Who only reads them may share them with others who do. All memberships of `ends` are held,
        too, but not returned: there can be many.
        """

    @property
    def jobs(self) -> Jobs:
        """The handlers and their jobs, in the same transaction."""

    @property
    def keys_of_hooks(self) -> KeyStore:
        """Keys of hooks, and what no key signed, in the same transaction."""

    def save(self, records: Sequence[Record]) -> list[Record]:
        """Write locked records, and the rows of the mirror that follow from them; return them
        as they are kept, with their local ids."""

    def drop_memberships(self, ends: Sequence[Record]) -> list[Key]:
        """End the memberships that are no newer than the end of their user or organization; return
        those that were present."""

    def present_memberships(self, ends: Sequence[Key]) -> list[Key]:
        """List the present memberships of users and organizations."""

    def find_here(self, keys: Sequence[Key]) -> set[Key]:
        """Find those users and organizations that have a row, and aren't deleted."""

    def newest_membership(self, end: Key) -> int:
        """Return the greatest stamp at which a membership of a user or an organization was told
        of; NEVER if there is none."""

    def end_memberships(self, end: Record, pairs: Sequence[Key]) -> tuple[list[Key], int]:
        """Do both of the above for some memberships of a user or an organization, quickly."""

    def with_few_memberships(self, ends: Sequence[Key], most: int) -> list[Key]:
        """List those users and organizations that have no more than `most` memberships in all,
        ended ones included."""

    def note_ending(self, ending: Ending) -> None:
        """Keep that memberships are to be ended step by step."""

    def endings(self) -> list[Ending]:
        """List whose memberships are to be ended, the oldest first."""

    def memberships_to_end(self, ending: Ending, limit: int) -> list[Key]:
        """List memberships that are still to be ended."""

    def finish_ending(self, ending: Ending) -> None:
        """Note that all memberships have ended."""

    def recent(self, limit: int) -> list[ReceivedBody]:
        """Return the newest deliveries, the newest first."""

    def clocks(self, limit: int) -> Clocks:
        """Return the database's clock, and how the newest deliveries are dated."""

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return how far the work of that name has come; None if it never began."""

    def save_checkpoint(self, name: str, reached: Checkpoint) -> None:
        """Keep how far the work of that name has come."""

    def lease(self, name: str) -> Lease | None:
        """Return who holds what has that name, or held it last."""

    def save_lease(self, name: str, lease: Lease) -> None:
        """Keep who holds what has that name."""

    def flow(self) -> RecordedFlow:
        """Return what is noted of the flow of deliveries."""

    def save_flow(self, flow: RecordedFlow) -> None:
        """Note it, but for its gaps."""

    def save_gap(self, place: int, gap: Gap) -> None:
        """Note a gap in the flow, instead of the one that has the same place."""

    def installed_at(self) -> int:
        """Return since when this is installed (ms): what is older runs no handlers."""

    def set_installed_at(self, moment: int) -> None:
        """Let it be installed since then."""

    def status(self) -> Status:
        """Count."""

    def clock(self) -> DatabaseClock:
        """Look at the database's clock."""

    def set_clock_back(self, by_ms: int, moved: int) -> None:
        """Let all that is due later be due so much sooner, and note what the clock says. Who saw
        another sum `moved` than there is now comes after somebody else, and moves nothing."""

    def waiting(self, limit: int) -> list[RefetchNeed]:
        """List the records about which Logto must be asked, the longest waiting first."""

    def find(self, kind: Kind, query: str, limit: int) -> list[FoundRow]:
        """Find users or organizations by Logto id, local id or what else names them (an email, a
        phone, a name); else by a part of that."""

    def keys(
        self,
        kind: Kind,
        limit: int,
        *,
        after: str = "",
        of: Key | None = None,
        unread_since: int | None = None,
        with_roles: bool = False,
    ) -> list[Key]:
        """List known records by id, from `after` on, without users and organizations that are
        deleted for sure.

        Memberships may be those `of` a user or an organization, present or not; users and
        organizations those of which Logto wasn't asked since a moment (ms); users `with_roles`
        are those with a role that Logto wasn't asked about since.
        """


class TransactionRunner(Protocol):
    """Runs functions of a Store, each in one transaction."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run `Store.add` alone, each statement committed by itself, within a limit.

        A connection that doesn't answer is thrown away, and so are all others of its age. What
        was given up may be stored all the same. Raises as `run`.
        """

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""

    async def close(self) -> None:
        """Give back threads and connections."""


class HandlerRunner(TransactionRunner, Protocol):
    """A host that lets handlers take part in its transactions."""

    @property
    def room(self) -> int:
        """For how many handlers there is room."""

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's session, which it ends by itself.

        Raises SettingInvalid for a session that can't be used here, and what `run` raises.
        """

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation."""

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with the transaction that was wished for, await what it returns if need be, and
        let `finish` end in the same one. All is rolled back if either raises.

        Raises what they raise, and StoreUnavailable.
        """


class Logto(Protocol):
    """Logto's Management API, within its budget; listings come page by page, as Logto has them.

    All raise LogtoUnreachable for what may be better later, LogtoApiError for what a person has
    to mend.
    """

    async def user(self, user_id: str) -> ApiResponse:
        """One user."""

    async def organization(self, organization_id: str) -> ApiResponse:
        """One organization."""

    async def organizations_of(self, user_id: str) -> ApiResponse:
        """All organizations of one user."""

    def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        """All users, the newest first, from a page on."""

    def organizations(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        """All organizations, from a page on."""

    def members(self, organization_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        """An organization's members with their roles in it; none for an unknown organization."""

    def roles_of(self, user_id: str) -> AsyncIterator[ApiResponse]:
        """A user's roles; none for an unknown user."""

    def roles(self) -> AsyncIterator[ApiResponse]:
        """All roles, of users and of applications."""

    def holders(self, role_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        """All users who have a role; none for an unknown role."""

    def hooks(self) -> AsyncIterator[ApiResponse]:
        """All webhooks, with their signing keys."""

    def log(self, hook_id: str, start: int, end: int) -> AsyncIterator[ApiResponse]:
        """What a hook tried to deliver between two moments (ms), the newest first."""

    async def create_hook(self, name: str, url: str, events: Sequence[str]) -> ApiResponse:
        """Make a webhook. It is asked once: if that fails, it may be there all the same."""

    async def change_hook(self, hook_id: str, changes: dict[str, Any]) -> ApiResponse:
        """Replace some fields of a webhook, each whole."""

    async def rotate_key(self, hook_id: str) -> ApiResponse:
        """Give a webhook a new signing key; it is asked once. None if the webhook is unknown."""

    async def delete_hook(self, hook_id: str) -> ApiResponse:
        """Delete a webhook, if it is there."""

    async def test_hook(self, hook_id: str, url: str, event: str) -> ApiResponse:
        """Have a test sent to a URL. None if the webhook is unknown; else what went wrong, empty
        if nothing did."""

    async def close(self) -> None:
        """Give back the connections."""


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> int:
        """Milliseconds since the epoch."""


# Told of everything that happens; must not raise, nor take long.
