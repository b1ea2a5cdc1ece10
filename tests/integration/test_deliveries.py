"""What each recorded delivery of a real Logto does to the mirror, stated by hand."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
from msgspec import Struct

from logto_webhooks.database.records import FoundRow
from logto_webhooks.testing import App, SignedRequest, make
from tests.support import recorded

Row = dict[str, Any]
Kind = Literal["user", "organization"]


class Effect(Struct, frozen=True, kw_only=True):
    """What one delivery does, alone in an empty mirror: these rows, and no others."""

    status: int = 200
    outcome: str | None = "applied"
    state: str | None = "done"
    users: list[Row] = []
    organizations: list[Row] = []
    waiting: list[tuple[str, str, str]] = []


class Part(Effect, frozen=True, kw_only=True):
    """One column of a user."""

    user: str
    column: str
    value: Row
    at: int


class Members(Effect, frozen=True, kw_only=True):
    """Who came into an organization, and who left it; `needs` is what only Logto can tell."""

    organization: str
    added: list[str] = []
    removed: list[str] = []
    needs: str | None = None


class Deleted(Effect, frozen=True, kw_only=True):
    """The end of a user or an organization: a tombstone, and no row if there was none."""

    kind: Kind
    id: str
    at: int


def user(id: str, *, custom_data: Row | None = None, **columns: Any) -> Effect:
    """A whole user; columns that aren't named are empty."""
    row: Row = {
        "logto_user_id": id,
        **dict.fromkeys(("username", "email", "phone", "name", "avatar")),
        "identities": {},
        "profile": {},
        "custom_data": {**(custom_data or {}), "logtoUserId": id},
        "is_suspended": False,
        "last_sign_in_at": None,
        "deleted_at": None,
    }
    return Effect(users=[row | columns])


def created(id: str, at: int, **columns: Any) -> Effect:
    """A user who was created at this moment."""
    return user(id, created_at=at, updated_at=at, **columns)


def organization(id: str, **columns: Any) -> Effect:
    """A whole organization."""
    return Effect(organizations=[{"logto_organization_id": id, "deleted_at": None} | columns])


def custom_data(user: str, value: Row, *, at: int) -> Part:
    """A user's customData, to which the mirror adds the id."""
    return part(user, "custom_data", {**value, "logtoUserId": user}, at)


def profile(user: str, value: Row, *, at: int) -> Part:
    """A user's profile."""
    return part(user, "profile", value, at)


def part(user: str, column: str, value: Row, at: int) -> Part:
    """A part alone makes no row: the rest of the user is asked for."""
    waiting = [("user", user, "incomplete")]
    return Part(user=user, column=column, value=value, at=at, waiting=waiting)


def members(id: str, *, added: list[str], removed: list[str] | None = None) -> Members:
    """Users came and left; of nobody is more known than that, and all are asked for."""
    users = sorted(added + (removed or []))
    waiting = [
        ("organization", id, "incomplete"),
        *(("user", user, "incomplete") for user in users),
    ]
    return Members(organization=id, added=added, removed=removed or [], waiting=waiting)


def asks(id: str, needs: str) -> Members:
    """What changed isn't told."""
    waiting = [("organization", id, f"incomplete; {needs}")]
    return Members(organization=id, needs=needs, outcome="asks", waiting=waiting)


def applications(id: str) -> Members:
    """Applications came or left; the mirror holds none."""
    return Members(organization=id, outcome="nothing")


def deleted(kind: Kind, id: str, *, at: int) -> Deleted:
    """A user or an organization is gone."""
    return Deleted(kind=kind, id=id, at=at)


def nothing() -> Effect:
    """The event is of no record."""
    return Effect(outcome="nothing")


def console() -> Effect:
    """A test payload, which touches nothing."""
    return Effect(outcome="test", state="ignored")


def rejected() -> Effect:
    """The signature is wrong; nothing is kept."""
    return Effect(status=401, outcome=None, state=None)


ALICE, NUMS, ECD = "4dgc0qmnfiko", "ma7tamed24n1", "8gumlfbfvzrc"
ACME, CORP = "fgiji7zywyht", "3w77ey01k244"
alice = partial(user, ALICE, created_at=1795485335917, email="alice@example.com")
alice2 = partial(alice, username="alice2")
alice_new = partial(alice2, email="alice.new@example.com", name="Alice 🐇")
ecd = partial(user, ECD, username="ecd", created_at=1795485455520, profile={"nickname": "N"})
reg = partial(user, "bsn2bche3tkn", username="reg_994932", created_at=1795485562263)
self_named = partial(reg, name="Self Näme", custom_data={"pref": "dark"})
jit = partial(user, "3osnxqta4k8s", created_at=1795485603033)
jit_old = partial(jit, email="jit_5fb696@corp-5fb696.example")
acme = partial(organization, ACME, created_at=1795485368446, description='desc "q"')
acme_ltd = partial(acme, name="Acme Ltd")

PRO = {"n": 1, "plan": "pro"}
QUEEN = {"formatted": "1 Queen St\nAuckland", "country": "NZ"}
LIDDELL = {"familyName": "Liddell", "givenName": "Alice", "address": QUEEN}
AL = {"nickname": "Al", "website": "https://a.example", "gender": "x", "birthdate": "1990-01-01"}
PARIS = LIDDELL | AL | {"address": {"locality": "Paris"}}
ZZZ = {"blob": "z" * 200_000, "deep": {"c": 1}, "only": "this", "plan": "free"}
SOCIAL = {"mock-social-target": {"userId": "soc-1", "details": {"name": "S"}}}
ODD_TEXT = {
    "rtl": "שלום",
    "nul-ish": "\u0001",
    'quote"key': "'\"\\",
    "emoji 🦊": "ß",
    "surrogate-esc": "🦊",
}
NUMBERS = {
    **{"1": "one", "2": "two", "10": "ten", "-1": "neg", "01": "lead"},
    **{"a": "z", "e": 1, "t": True, "nul": None, "neg0": 0, "exp": 1000, "int53": 2**53},
    **{"big": 1e21, "small": 1e-7, "tenth": 0.1},
    "nested": {"": "empty", "a": [1, None, {"3": 2, "9": 1}], "b": 1},
}
HUGE = {
    "f": 12345678.12345679,
    "huge": 1.7976931348623157e308,
    "tiny": 5e-324,
    "bigint": 1.2345678901234568e29,
}

EFFECTS: dict[str, Effect] = {
    # Users, by the Management API.
    "001-User.Created-post-full": alice(
        username="alice",
        phone="15551234567",
        name="Alice Liddell",
        avatar="https://example.com/a.png",
        custom_data=PRO,
        profile=LIDDELL,
        updated_at=1795485335917,
    ),
    "002-User.Created-post-min": created("k6869513eyo7", 1795485336143, username="min_user"),
    "003-User.Created-post-empty": created("jbpde37rbjty", 1795485336365),
    "004-User.Created-post-nonascii": created(
        "n9b33d5izss7",
        1795485336592,
        username="zoe_n",
        name='Zoë "Q\\uote" 王小明 🦊👩\u200d👩\u200d👧 \u2028\u2029 </script> \u0001 \u007f é',
        custom_data=ODD_TEXT,
    ),
    "005-User.Created-post-lone-surrogate": created(
        "ps4hmmqhkcm2", 1795485336815, username="lone1", name="lone \ufffd end"
    ),
    "006-User.Created-post-dupkeys": created(
        "pv5xan42u20r", 1795485338754, username="dups1", custom_data={"a": 3, "b": 2}
    ),
    "007-User.Created-post-200kB": created(
        "824asrg0jrhv",
        1795485339148,
        username="big1",
        custom_data={"uni": "é🦊" * 4000, "blob": "x" * 150_000, "list": list(range(5000))},
    ),
    "008-User.Created-post-1MB": created(
        "ppbz5lgxtwyl", 1795485339466, username="big2", custom_data={"blob": "y" * 900_000}
    ),
    "009-User.Data.Updated-patch-user": alice2(
        phone="15551234567",
        name="Alice Pleasance",
        avatar="https://example.com/a.png",
        custom_data=PRO,
        profile=LIDDELL,
        updated_at=1795485341441,
    ),
    "010-User.Data.Updated-patch-user-nulls": alice2(
        custom_data=PRO, profile=LIDDELL, updated_at=1795485341662
    ),
    "011-User.Data.Updated-patch-user-noop": alice2(
        custom_data=PRO, profile=LIDDELL, updated_at=1795485341885
    ),
    "013-User.Data.Updated-patch-user-email2": alice_new(
        custom_data=PRO, profile=LIDDELL, updated_at=1795485344058
    ),
    "014-User.Data.Updated-patch-user-customData-replace": alice_new(
        custom_data={"only": "this"}, profile=LIDDELL, updated_at=1795485344272
    ),
    "015-User.Data.Updated-patch-custom-data": custom_data(
        ALICE,
        {"deep": {"a": [1, 2, {"b": None}]}, "only": "this", "plan": "free"},
        at=1795485344499,
    ),
    "017-User.Data.Updated-patch-custom-data-200kB": custom_data(ALICE, ZZZ, at=1795485344950),
    "018-User.Data.Updated-patch-custom-data-numbers": custom_data(
        "n9b33d5izss7", ODD_TEXT | {"2": 2, "10": 1, "big": 1e21, "tenth": 0.1}, at=1795485345176
    ),
    "019-User.Data.Updated-patch-profile": profile(ALICE, LIDDELL | AL, at=1795485345403),
    "021-User.Data.Updated-patch-password": alice_new(
        custom_data=ZZZ, profile=PARIS, updated_at=1795485345891
    ),
    "022-User.SuspensionStatus.Updated-suspend": alice_new(
        custom_data=ZZZ,
        profile=PARIS,
        identities=SOCIAL,
        is_suspended=True,
        updated_at=1795485351289,
    ),
    "025-User.Data.Updated-put-logto-config": alice_new(
        custom_data=ZZZ, profile=PARIS, identities=SOCIAL, updated_at=1795485351991
    ),
    # Roles and scopes: the mirror holds none.
    "026-Role.Created-role-create": nothing(),
    "027-Role.Created-role-create-m2m": nothing(),
    "028-Role.Data.Updated-role-patch": nothing(),
    "029-Scope.Created-scope-create": nothing(),
    "030-Scope.Created-scope-create2": nothing(),
    "031-Role.Scopes.Updated-role-scope-add": nothing(),
    "032-Role.Scopes.Updated-role-scope-del": nothing(),
    "033-Role.Scopes.Updated-role-create-with-scopes": nothing(),
    "034-Role.Created-role-create-with-scopes": nothing(),
    "035-Scope.Data.Updated-scope-patch": nothing(),
    "037-Role.Deleted-role-delete": nothing(),
    # Organizations and their members.
    "038-Organization.Created-org-create": acme(
        name="Acmé 🏭", custom_data={"0": "y", "1": "x", "tier": 1e21}, updated_at=1795485368450
    ),
    "039-Organization.Created-org-create-min": organization(
        "ipuq330o1erh",
        name="Min",
        description=None,
        custom_data={},
        created_at=1795485368666,
        updated_at=1795485368670,
    ),
    "040-Organization.Data.Updated-org-patch": acme_ltd(
        custom_data={"0": "y", "1": "x", "tier": 1e21}, updated_at=1795485368892
    ),
    "041-Organization.Data.Updated-org-patch-customdata": acme_ltd(
        custom_data={"a": None, "b": [1]}, updated_at=1795485369111
    ),
    "042-Organization.Data.Updated-org-patch-noop": acme_ltd(
        custom_data={"a": None, "b": [1]}, updated_at=1795485369331
    ),
    "043-Organization.Membership.Updated-org-users-add": members(
        ACME, added=["3i8hs2jo9plj", "hacunysdrp2e", "i8anf8lsg6vc"]
    ),
    "044-Organization.Membership.Updated-org-users-add-dup": asks(ACME, "members"),
    "046-Organization.Membership.Updated-org-users-put": members(
        ACME,
        added=["armhxkmrlqte", "ekyj8brepl1a"],
        removed=["4dgc0qmnfiko", "hacunysdrp2e", "i8anf8lsg6vc"],
    ),
    "047-Organization.Membership.Updated-org-users-put-same": asks(ACME, "members"),
    "049-Organization.Membership.Updated-org-apps-add": applications(ACME),
    "050-Organization.Membership.Updated-org-apps-put-empty": applications(ACME),
    "051-Organization.Membership.Updated-org-apps-add2": applications(ACME),
    "052-Organization.Membership.Updated-org-app-delete": applications(ACME),
    "053-OrganizationRole.Created-orgrole-create": nothing(),
    "054-OrganizationRole.Data.Updated-orgrole-patch": nothing(),
    "055-OrganizationScope.Created-orgscope-create": nothing(),
    "056-OrganizationScope.Created-orgscope-create2": nothing(),
    "057-OrganizationScope.Data.Updated-orgscope-patch": nothing(),
    "058-OrganizationRole.Scopes.Updated-orgrole-scopes-post": nothing(),
    "059-OrganizationRole.Scopes.Updated-orgrole-scopes-put": nothing(),
    "060-OrganizationRole.Scopes.Updated-orgrole-scope-delete": nothing(),
    "062-OrganizationRole.Created-orgrole-create-with-scopes": nothing(),
    "063-User.Created-user-invitee": created(
        "vlc19foxhcjb", 1795485386391, email="inv@example.com", name="Invitee"
    ),
    "064-Organization.Membership.Updated-invitation-accept": members(ACME, added=["vlc19foxhcjb"]),
    "065-OrganizationScope.Deleted-orgscope-delete": nothing(),
    "066-OrganizationRole.Deleted-orgrole-delete": nothing(),
    "067-User.Deleted-delete-org-member-user": deleted("user", "ekyj8brepl1a", at=1795485387296),
    "068-Organization.Deleted-delete-org-with-members": deleted(
        "organization", ACME, at=1795485387520
    ),
    # Users with odd content.
    "071-User.Created-post-numbers": created(
        NUMS, 1795485454626, username="nums1", custom_data=NUMBERS
    ),
    "072-User.Created-post-numbers-huge": created(
        "kh40y40tpw6u", 1795485454854, username="nums2", custom_data=HUGE
    ),
    "073-User.Data.Updated-patch-custom-data-spoof-id": custom_data(
        NUMS,
        {
            **NUMBERS,
            "id": "otheruser123",
            "username": "spoof",
            "updatedAt": 99,
            "customData": {"x": 1},
        },
        at=1795485455079,
    ),
    "074-User.Data.Updated-patch-custom-data-empty": custom_data(
        "kh40y40tpw6u", HUGE, at=1795485455300
    ),
    "075-User.Created-post-empty-cd": created(ECD, 1795485455520, username="ecd"),
    "076-User.Data.Updated-patch-custom-data-empty-result": custom_data(ECD, {}, at=1795485455744),
    "077-User.Data.Updated-patch-profile-empty-result": profile(ECD, {}, at=1795485455964),
    "078-User.Data.Updated-patch-user-profile": ecd(updated_at=1795485456184),
    "079-User.Data.Updated-patch-user-UA-nonascii": ecd(name="ua", updated_at=1795485456404),
    "080-User.Data.Updated-patch-user-longname128": ecd(name="é" * 128, updated_at=1795485456624),
    # Sign-ups, sign-ins and the account page.
    "081-User.Created-signup-username": reg(updated_at=1795485562263),
    "082-PostRegister-signup-username": reg(
        last_sign_in_at=1795485562287, updated_at=1795485562287
    ),
    "083-PostSignIn-signin-username": reg(last_sign_in_at=1795485564130, updated_at=1795485564130),
    "084-User.Data.Updated-my-account-patch": self_named(
        last_sign_in_at=1795485564130, updated_at=1795485566640
    ),
    "086-User.Data.Updated-my-account-profile": self_named(
        avatar="https://e.example/ü.png",
        profile={"nickname": "selfie"},
        last_sign_in_at=1795485564130,
        updated_at=1795485567292,
    ),
    "087-User.Data.Updated-my-account-password": self_named(
        avatar="https://e.example/ü.png",
        profile={"nickname": "selfie"},
        last_sign_in_at=1795485564130,
        updated_at=1795485569356,
    ),
    "088-Organization.Membership.Updated-signup-email-jit": members(CORP, added=["3osnxqta4k8s"]),
    "090-User.Created-signup-email-jit": jit_old(updated_at=1795485603033),
    "091-PostRegister-signup-email-jit": jit_old(
        last_sign_in_at=1795485603066, updated_at=1795485603066
    ),
    "092-PostSignIn-signin-email-password": jit_old(
        last_sign_in_at=1795485603551, updated_at=1795485603551
    ),
    "094-User.Data.Updated-forgot-password": jit_old(
        last_sign_in_at=1795485604168, updated_at=1795485604884
    ),
    "095-PostResetPassword-forgot-password": jit_old(
        last_sign_in_at=1795485604168, updated_at=1795485604884
    ),
    "096-User.Data.Updated-my-account-primary-email": jit(
        email="new_jit_5fb696@corp-5fb696.example",
        last_sign_in_at=1795485604168,
        updated_at=1795485605603,
    ),
    "097-Identifier.Lockout-lockout": nothing(),
    "098-Identifier.Lockout-lockout": nothing(),
    "099-Identifier.Lockout-lockout": nothing(),
    # "Send test payload" of Logto's console.
    "100-PostRegister-hooktest": console(),
    "101-PostSignIn-hooktest": console(),
    "102-PostResetPassword-hooktest": console(),
    "103-PostSignInAdaptiveMfaTriggered-hooktest": console(),
    "104-User.Created-hooktest": console(),
    "105-User.Data.Updated-hooktest": console(),
    "106-User.Deleted-hooktest": console(),
    "107-User.SuspensionStatus.Updated-hooktest": console(),
    "108-Organization.Membership.Updated-hooktest": console(),
    "109-Organization.Created-hooktest": console(),
    "110-Identifier.Lockout-hooktest": console(),
    "111-Message.RateLimited-hooktest": console(),
    "112-Grant.LimitExceeded-hooktest": console(),
    "113-User.Created-hooktest-multi": rejected(),
    "114-User.Deleted-hooktest-multi": rejected(),
    "115-Organization.Deleted-hooktest-multi": rejected(),
    "116-User.Created-hooktest-201": console(),
    "127-User.Created-hooktest-timeout12": console(),
    "128-User.Created-hooktest-ua": console(),
    # Odd requests to the Management API.
    "129-User.Created-post-no-user-agent": created(
        "lhl2bwg1u014", 1795486300340, username="noua_1795486300"
    ),
    "130-User.Created-post-utf8-user-agent": created(
        "qd71s5cqtk2s", 1795486300667, username="ua8_1795486300"
    ),
    "131-User.Created-post-xff": created("bbdyt871i1zs", 1795486300990, username="xff_1795486300"),
    "133-User.Created-post-after-restart": created(
        "2po5lryivxlx", 1795486414146, username="after_restart_1795486414"
    ),
}

DELIVERIES = {each.name: each.signed for each in recorded.deliveries()}
PARTS = {name: each for name, each in EFFECTS.items() if isinstance(each, Part)}
MEMBERS = {name: each for name, each in EFFECTS.items() if isinstance(each, Members)}
DELETED = {name: each for name, each in EFFECTS.items() if isinstance(each, Deleted)}

EARLIER: dict[str, Any] = {"at": 1795480000000, "key": recorded.KEYS[0]}  # than all recorded
a_user = partial(
    make.user_created, **EARLIER, customData={"old": True}, profile={"nickname": "Old"}
)
an_organization = partial(make.organization_created, **EARLIER)


def joined(organization: str, users: list[str]) -> SignedRequest:
    return make.organization_membership_updated(id=organization, addedUserIds=users, **EARLIER)


@pytest.fixture
def app() -> App:
    return App(keys=recorded.KEYS)


def rows(found: list[FoundRow]) -> list[Row]:
    """Without the local id, which is made up here."""
    return [{name: each.row[name] for name in each.row if name != "id"} for each in found]


def by_id(found: list[FoundRow]) -> dict[str, FoundRow]:
    names = ("logto_user_id", "logto_organization_id")
    return {each.row[name]: each for each in found for name in names if name in each.row}


def changed(before: list[FoundRow], after: list[FoundRow]) -> dict[str, Row]:
    """By Logto's id: the columns that aren't what they were, of the rows where there are any."""
    old, new = by_id(before), by_id(after)
    assert old.keys() == new.keys()
    columns = {
        id: {name: value for name, value in new[id].row.items() if value != old[id].row[name]}
        for id in new
    }
    return {id: row for id, row in columns.items() if row}


def memberships(found: list[FoundRow]) -> dict[str, list[str]]:
    return {id: each.memberships for id, each in by_id(found).items()}


def test_every_recorded_delivery_is_in_the_table_and_nothing_else() -> None:
    """The table and the folder name the same deliveries."""
    assert list(EFFECTS) == list(DELIVERIES)


@pytest.mark.parametrize("name", DELIVERIES)
def test_a_delivery_alone_makes_the_rows_that_it_tells_of(app: App, name: str) -> None:
    """It is answered, has its outcome, and leaves exactly the rows and needs of the table."""
    effect = EFFECTS[name]
    delivered = app.deliver(DELIVERIES[name])
    assert (delivered.status, delivered.outcome) == (effect.status, effect.outcome)
    assert rows(app.users()) == effect.users
    assert rows(app.organizations()) == effect.organizations
    # A batch is written by several statements, so the rows may wait since different milliseconds.
    waiting = [(*need.key, need.reason) for need in app.waiting()]
    assert sorted(waiting) == sorted(effect.waiting)
    kept = [effect.state] if effect.state else []
    assert [state for state, n in app.status().deliveries.items() if n] == kept
    assert not any(each.memberships for each in app.users() + app.organizations())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_changes_its_column_alone(app: App, name: str) -> None:
    """After the whole user, customData or profile replaces that column and nothing else."""
    part = PARTS[name]
    app.deliver(a_user(id=part.user))
    before = app.users()
    assert app.deliver(DELIVERIES[name]).outcome == "applied"
    new = {part.column: part.value, "updated_at": part.at}
    assert changed(before, app.users()) == {part.user: new}
    assert app.waiting() == []


def test_a_forged_id_in_custom_data_touches_nobody_else(app: App) -> None:
    """`id`, `username` and `updatedAt` in customData are content: `params.userId` says whose."""
    name = "073-User.Data.Updated-patch-custom-data-spoof-id"
    app.deliver(a_user(id="otheruser123"), a_user(id=NUMS))
    before = app.users()
    app.deliver(DELIVERIES[name])
    mine = {"custom_data": PARTS[name].value, "updated_at": 1795485455079}
    assert changed(before, app.users()) == {NUMS: mine}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_come_and_go_and_the_others_stay(app: App, name: str) -> None:
    """In a known organization the added are in, the removed are out, and nobody else moves."""
    effect = MEMBERS[name]
    id = effect.organization
    app.deliver(an_organization(id=id), joined(id, ["stays", *effect.removed]))
    [before] = app.organizations()
    assert before.memberships == sorted(["stays", *effect.removed])
    assert app.deliver(DELIVERIES[name]).outcome == effect.outcome
    [after] = app.organizations()
    assert after.memberships == sorted(["stays", *effect.added])
    assert (after.row, after.waiting_for) == (before.row, effect.needs)
    assert app.users() == []


@pytest.mark.parametrize("name", MEMBERS)
def test_members_are_kept_until_their_users_and_organization_come(app: App, name: str) -> None:
    """Memberships before their ends, and an older "added" after "removed", end the same."""
    effect = MEMBERS[name]
    id, users = effect.organization, [*effect.added, *effect.removed]
    app.deliver(DELIVERIES[name], joined(id, ["stays", *effect.removed]))
    assert app.users() + app.organizations() == []
    app.deliver(an_organization(id=id), *(a_user(id=each) for each in users))
    is_in = {each: [id] for each in effect.added} | {each: [] for each in effect.removed}
    assert memberships(app.users()) == is_in
    assert memberships(app.organizations()) == {id: sorted(["stays", *effect.added])}


def past(gone: Deleted) -> list[SignedRequest]:
    """An organization and its member, of which one will be gone."""
    organization = gone.id if gone.kind == "organization" else "some-organization"
    user = gone.id if gone.kind == "user" else "some-user"
    return [an_organization(id=organization), a_user(id=user), joined(organization, [user])]


@pytest.mark.parametrize("name", DELETED)
def test_a_deletion_marks_its_row_and_takes_the_memberships(app: App, name: str) -> None:
    """The row stays as it was with `deleted_at` set; of the other end only the member goes."""
    gone = DELETED[name]
    app.deliver(*past(gone))
    before = app.users() + app.organizations()
    assert all(each.memberships for each in before)
    assert app.deliver(DELIVERIES[name]).outcome == "applied"
    after = app.users() + app.organizations()
    assert changed(before, after) == {gone.id: {"deleted_at": gone.at}}
    assert not any(each.memberships for each in after)
    assert app.waiting() == []


@pytest.mark.parametrize("name", DELETED)
def test_what_comes_after_a_deletion_revives_nothing(app: App, name: str) -> None:
    """Whoever is told of late is deleted from the start, and nobody's member."""
    gone = DELETED[name]
    app.deliver(DELIVERIES[name], *past(gone))
    found = by_id(app.users() + app.organizations())
    assert len(found) == 2
    deleted_at = {id: each.row["deleted_at"] for id, each in found.items()}
    assert deleted_at == dict.fromkeys(found) | {gone.id: gone.at}
    assert not any(each.memberships for each in found.values())
    assert app.waiting() == []
