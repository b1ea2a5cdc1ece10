"""The fake Logto, beside what a real one answered and sent."""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import msgspec
import pytest
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from logto_webhooks.samples.history import NAMES, Name, load
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto, Faults, MadeUsers, log_entry
from logto_webhooks.testing.fake.app import serve
from tests.support.recorded import FOLDER, Recorded

Json = dict[str, Any]
RESOURCE = "https://default.logto.app/api"


class Asked(Struct):
    """A recorded request; `url` is one of the recorded Logto's."""

    method: str
    url: str
    json: Any = None
    form: dict[str, str] | None = None
    basic_auth: list[str] | None = None


class Answer(Struct):
    """A recorded answer."""

    request: Asked
    status: int
    response_headers: list[tuple[str, str]]
    body_text: str

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.response_headers if key.lower() == name]


class Receiver:
    """An application that takes webhooks, and answers `status`."""

    def __init__(self) -> None:
        self.status = 200
        self.received: list[tuple[dict[str, str], bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.received.append((dict(request.headers), await request.body()))
        await JSONResponse({"ok": True}, self.status)(scope, receive, send)

    @property
    def bodies(self) -> list[Json]:
        return [msgspec.json.decode(body) for _, body in self.received]

    @property
    def events(self) -> list[str]:
        return [body["event"] for body in self.bodies]


def recorded_answer(name: str) -> Answer:
    return msgspec.json.decode((FOLDER / "api" / f"{name}.json").read_bytes(), type=Answer)


def recorded_body(number: str) -> Json:
    [file] = (FOLDER / "deliveries").glob(f"{number}-*.json")
    recorded = msgspec.json.decode(file.read_bytes(), type=Recorded)
    body: Json = msgspec.json.decode(recorded.body)
    return body


def recorded_log(name: str) -> list[Json]:
    lines = (FOLDER / "logs" / f"{name}.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


def live(
    test: Callable[[FakeLogto, Receiver], Awaitable[None]], logto: FakeLogto | None = None
) -> None:
    """Run a test with a fake whose one webhook delivers to a receiver, in order."""

    async def main() -> None:
        receiver = Receiver()
        fake = logto or FakeLogto(now=FrozenClock().now, at_once=1)
        async with serve(receiver, 0) as url, fake:
            fake.add_hook(f"{url}/api/webhooks/logto")
            await test(fake, receiver)

    asyncio.run(main())


async def ask(logto: FakeLogto, path: str, method: str = "GET", **more: Any) -> httpx2.Response:
    """Ask the API as one who may."""
    async with httpx2.AsyncClient(base_url=logto.url) as client:
        form = {"grant_type": "client_credentials", "resource": RESOURCE, "scope": "all"}
        given = await client.post("/oidc/token", data=form, auth=(logto.app_id, logto.app_secret))
        token = given.json()["access_token"]
        headers = {"authorization": f"Bearer {token}"}
        return await client.request(method, path, headers=headers, **more)


def keys(value: Any) -> Any:
    """The keys of an object, or of the first of a list."""
    if isinstance(value, list):
        return [keys(each) for each in value[:1]]
    return list(value) if isinstance(value, dict) else type(value)


def relations(links: list[str], path: str) -> list[str]:
    assert all(f"{path}?" in link and "/api" not in link for link in links)
    return [link.partition('rel="')[2] for link in links]


def alike(answer: httpx2.Response, expected: Answer) -> None:
    """The status, the headers that matter and the keys; an error is the same to the letter."""
    assert answer.status_code == expected.status
    assert answer.headers.get_list("content-type") == expected.all("content-type")
    assert ("total-number" in answer.headers) == bool(expected.all("total-number"))
    path = httpx2.URL(expected.request.url).path.removeprefix("/api")
    ids = ("8gumlfbfvzrc", "3osnxqta4k8s", "3w77ey01k244", "eh3vfi7j8mnz3yzp6feu5")
    links, theirs = answer.headers.get_list("link"), expected.all("link")
    shown = path if not any(each in path for each in ids) else path.rpartition("/")[2]
    assert relations(links, shown) == relations(theirs, shown)
    assert "date" in answer.headers
    if expected.status >= 400:
        assert answer.text == expected.body_text
    else:
        assert keys(answer.json()) == keys(msgspec.json.decode(expected.body_text))


def peopled(logto: FakeLogto) -> dict[str, str]:
    """Make as many records as the recorded Logto had; gives the ids by those recorded."""
    users = [logto.create_user(username=f"u{number}")["id"] for number in range(18)]
    names = ("JIT Org", "JIT Org 2", "Min")
    made = [logto.create_organization(name=name)["id"] for name in names]
    logto.add_members(made[0], users)
    logto.add_members(made[1], users[:1])
    logto.assign_role(users[0], "default")
    for number in range(21):
        logto.add_hook(f"http://127.0.0.1:9/{number}", events=[])
    return {"8gumlfbfvzrc": users[0], "3osnxqta4k8s": users[0], "3w77ey01k244": made[0]}


ANSWERS = [
    "users-p1-5",
    "users-p999",
    "users-page0",
    "users-size101",
    "user",
    "user-404",
    "user-roles",
    "user-organizations",
    "user-organizations-404",
    "organizations-p1-2",
    "organization",
    "organization-404",
    "organization-users-p1-2",
    "organization-users-404",
    "hooks",
    "hooks-paged",
    "hook",
    "hook-404",
    "hook-recent-logs-p2-3",
    "hook-recent-logs-404hook",
    "hook-recent-logs-end-before-start",
    "hook-recent-logs-start-nonsense",
    "hook-recent-logs-size101",
    "err-404-route",
]


@pytest.mark.slow
def test_answers_as_recorded() -> None:
    """Every route answers as a real Logto did: status, headers, keys; errors to the letter."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        webhooks = (await ask(logto, "/api/hooks")).json()
        ids = peopled(logto) | {"eh3vfi7j8mnz3yzp6feu5": webhooks[0]["id"]}
        await logto.settle()
        for name in ANSWERS:
            expected = recorded_answer(name)
            path = httpx2.URL(expected.request.url).raw_path.decode()
            for theirs, ours in ids.items():
                path = path.replace(theirs, ours)
            alike(await ask(logto, path), expected)

    live(test)


def test_webhooks_are_made_changed_and_deleted() -> None:
    """As in a real Logto: `config` whole, a new key, no event that it doesn't know."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        [old] = (await ask(logto, "/api/hooks")).json()
        for name in ("noevents", "bad-event"):
            expected = recorded_answer(f"post-hook-{name}")
            refused = await ask(logto, "/api/hooks", "POST", json=expected.request.json)
            alike(refused, expected)
        wanted = {"name": "n", "events": ["User.Created"], "config": old["config"]}
        made = await ask(logto, "/api/hooks", "POST", json=wanted)
        assert (made.status_code, keys(made.json())) == (201, keys(old))
        webhook = made.json()
        assert webhook["signingKey"] != old["signingKey"]
        logto.create_user()
        await logto.settle()
        assert len(receiver.received) == 2
        path, config = f"/api/hooks/{webhook['id']}", {"url": "http://127.0.0.1:9/"}
        changed = await ask(logto, path, "PATCH", json={"config": config, "enabled": False})
        assert changed.json() == webhook | {"config": config, "enabled": False}
        assert (await ask(logto, path, "DELETE")).status_code == 204
        assert (await ask(logto, "/api/hooks")).json() == [old]
        for method in ("PATCH", "DELETE"):
            assert (await ask(logto, path, method, json={})).status_code == 404

    live(test)


def test_closed() -> None:
    """Without a token, with another kind and with a false one, the API says what is wrong."""
    given = {"no-token": {}, "basic": {"authorization": "Basic eDp5"}}
    given["bad-token"] = {"authorization": "Bearer nonsense"}

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        async with httpx2.AsyncClient(base_url=logto.url) as client:
            for name, headers in given.items():
                answer = await client.get("/api/users", headers=headers)
                alike(answer, recorded_answer(f"err-401-{name}"))

    live(test)


def test_tokens() -> None:
    """Tokens are given and refused as recorded, whichever way the secret comes."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        async with httpx2.AsyncClient(base_url=logto.url) as client:
            for name in ("basic", "post", "noscope", "badsecret", "badresource"):
                await like_recorded(client, logto, name)

    async def like_recorded(client: httpx2.AsyncClient, logto: FakeLogto, name: str) -> None:
        expected = recorded_answer(f"oidc-token-{name}")
        form = dict(expected.request.form or {})
        secret = "bad" if name == "badsecret" else logto.app_secret
        in_form = "client_secret" in form
        form |= {"client_id": logto.app_id, "client_secret": secret} if in_form else {}
        auth = httpx2.Auth() if in_form else httpx2.BasicAuth(logto.app_id, secret)
        given = await client.post("/oidc/token", data=form, auth=auth)
        alike(given, expected)
        assert given.headers["cache-control"] == "no-store"
        ours, theirs = given.headers.get_list("www-authenticate"), expected.all("www-authenticate")
        assert after_address(ours) == after_address(theirs)

    def after_address(values: list[str]) -> list[str]:
        return [each.partition("/oidc")[2] for each in values]

    live(test)


def test_a_token_ends() -> None:
    """A token opens the API for an hour, or until it is revoked; one without scope never."""
    clock = FrozenClock()

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        async with httpx2.AsyncClient(base_url=logto.url) as client:

            async def status(scope: str, then: Callable[[], None]) -> int:
                form = {"grant_type": "client_credentials", "resource": RESOURCE, "scope": scope}
                auth = (logto.app_id, logto.app_secret)
                given = (await client.post("/oidc/token", data=form, auth=auth)).json()
                then()
                headers = {"authorization": f"Bearer {given['access_token']}"}
                return (await client.get("/api/users", headers=headers)).status_code

            assert await status("all", lambda: clock.tick(3599)) == 200
            assert await status("all", lambda: clock.tick(3600)) == 401
            assert await status("all", logto.revoke_tokens) == 401
            assert await status("", lambda: None) == 403

    live(test, FakeLogto(now=clock.now))


CHANGES: dict[str, Callable[[FakeLogto, str, str], object]] = {
    "002": lambda logto, user, organization: logto.create_user(username="min"),
    "009": lambda logto, user, organization: logto.update_user(user, name="Other"),
    "011": lambda logto, user, organization: logto.update_user(user),
    "022": lambda logto, user, organization: logto.suspend(user),
    "067": lambda logto, user, organization: logto.delete_user(user),
    "083": lambda logto, user, organization: logto.sign_in(user),
    "039": lambda logto, user, organization: logto.create_organization(name="Min"),
    "040": lambda logto, user, organization: logto.update_organization(organization, name="N"),
    "068": lambda logto, user, organization: logto.delete_organization(organization),
    "043": lambda logto, user, organization: logto.add_members(organization, [user]),
    "047": lambda logto, user, organization: logto.remove_members(organization, [user]),
}


def test_each_change_sends_what_logto_sends() -> None:
    """Each change's webhook has the keys, the route and the status of a recorded one."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        for number, change in CHANGES.items():
            user, organization = logto.create_user()["id"], logto.create_organization()["id"]
            logto.kill()
            change(logto, user, organization)
            await logto.settle()
            like_recorded(receiver.bodies.pop(), recorded_body(number))
        assert len(receiver.received) == len(CHANGES)

    def like_recorded(sent: Json, expected: Json) -> None:
        assert sent.keys() == expected.keys()
        for name in ("event", "method", "status", "matchedRoute", "interactionEvent"):
            assert sent.get(name) == expected.get(name)
        for name in ("data", "user", "params", "application"):
            assert keys(sent.get(name)) == keys(expected.get(name))

    live(test)


def test_a_part() -> None:
    """Of the custom data and the profile only the part is sent, merged into what was there."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        user = logto.create_user(customData={"plan": "pro"})["id"]
        logto.set_custom_data(user, {"id": "x"})
        logto.set_profile(user, {"nickname": "N"})
        await logto.settle()
        _, custom_data, profile = receiver.bodies
        assert custom_data["data"] == {"plan": "pro", "id": "x"}
        assert profile["data"] == {"nickname": "N"}
        for sent, number in ((custom_data, "015"), (profile, "019")):
            assert keys(sent) == keys(recorded_body(number))
            assert sent["matchedRoute"] == recorded_body(number)["matchedRoute"]

    live(test)


def test_a_sign_up_just_in_time() -> None:
    """A sign-up sends the memberships first, then the user, all with one createdAt."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        organizations = [logto.create_organization()["id"] for _ in range(2)]
        logto.kill()
        user = logto.sign_up(organizations, primaryEmail="jit@example.com")
        await logto.settle()
        one, two, created, registered = receiver.bodies
        assert [one["organizationId"], two["organizationId"]] == organizations
        assert one["addedUserIds"] == [user["id"]]
        assert one["createdAt"] == two["createdAt"] == created["createdAt"]
        for sent, number in ((one, "088"), (created, "090"), (registered, "091")):
            assert keys(sent) == keys(recorded_body(number))
        assert keys(created["data"]) == keys(recorded_body("090")["data"])
        assert created["data"]["lastSignInAt"] is None
        assert registered["user"]["lastSignInAt"] is not None

    live(test)


def test_members() -> None:
    """Members who are there already aren't sent, absent lists are absent, 5,000 are the most."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        users = [logto.create_user()["id"] for _ in range(5002)]
        organization = logto.create_organization()["id"]
        logto.kill()
        logto.add_members(organization, users[:1])
        logto.add_members(organization, users[:1])
        logto.add_members(organization, users)
        logto.replace_members(organization, users[:1])
        await logto.settle()
        first, again, many, fewer = receiver.bodies
        assert first["addedUserIds"] == users[:1]
        assert "addedUserIds" not in again
        assert many["addedUserIds"] == users[1:5001]
        assert len(fewer["removedUserIds"]) == 5000
        assert "addedUserIds" not in fewer
        listed = await ask(logto, f"/api/organizations/{organization}/users")
        assert [each["id"] for each in listed.json()] == users[:1]

    live(test)


def test_silent_changes() -> None:
    """Roles, organization roles and identities change without a webhook; the API tells them."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        user = logto.create_user()["id"]
        organization = logto.create_organization()["id"]
        logto.add_members(organization, [user])
        logto.kill()
        logto.assign_role(user, "admin")
        logto.assign_organization_role(organization, user, "editor")
        logto.set_identities(user, {"google": {"userId": "g"}})
        await logto.settle()
        assert not receiver.received
        [role] = (await ask(logto, f"/api/users/{user}/roles")).json()
        assert role["name"] == "admin"
        [there] = (await ask(logto, f"/api/users/{user}/organizations")).json()
        [member] = (await ask(logto, f"/api/organizations/{organization}/users")).json()
        assert there["organizationRoles"] == member["organizationRoles"]
        assert [role["name"] for role in member["organizationRoles"]] == ["editor"]
        assert (await ask(logto, f"/api/users/{user}")).json()["identities"]

    live(test)


def test_signed() -> None:
    """A webhook has Logto's headers, and a lowercase signature of the raw body."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        logto.create_user()
        await logto.settle()
        [(headers, body)] = receiver.received
        expected = hmac.digest(logto.signing_key.encode(), body, "sha256").hex()
        assert headers["logto-signature-sha-256"] == expected
        assert headers["user-agent"] == "Logto (https://logto.io/)"
        assert headers["content-type"] == "application/json"

    live(test)


def test_a_new_key_at_once() -> None:
    """A rotated key signs what comes after; what was queued before keeps the old one."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        [webhook] = (await ask(logto, "/api/hooks")).json()
        rotated = await ask(logto, f"/api/hooks/{webhook['id']}/signing-key", "PATCH")
        assert keys(rotated.json()) == keys(webhook)
        logto.create_user()
        await logto.settle()
        [(headers, body)] = receiver.received
        expected = hmac.digest(rotated.json()["signingKey"].encode(), body, "sha256").hex()
        assert headers["logto-signature-sha-256"] == expected
        assert (await ask(logto, "/api/hooks/nope/signing-key", "PATCH")).status_code == 404

    live(test)


@pytest.mark.parametrize(("event", "number"), [("User.Created", "104"), ("PostSignIn", "101")])
def test_test_payloads(event: str, number: str) -> None:
    """A test payload is sent to the address in the request, has fake ids, and isn't logged."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        [webhook] = (await ask(logto, "/api/hooks")).json()
        path, wanted = (
            f"/api/hooks/{webhook['id']}",
            {"events": [event], "config": webhook["config"]},
        )
        assert (await ask(logto, f"{path}/test", "POST", json=wanted)).status_code == 204
        [sent], expected = receiver.bodies, recorded_body(number)
        assert keys(sent) == keys(expected)
        assert keys(sent.get("user")) == keys(expected.get("user"))
        assert sent.get("data") == expected.get("data")
        assert (await ask(logto, f"{path}/recent-logs")).json() == []
        receiver.status = 500
        refused = await ask(logto, f"{path}/test", "POST", json=wanted)
        assert refused.status_code == 422
        assert refused.json()["data"]["responseStatus"] == 500

    live(test)


def test_the_log() -> None:
    """Every attempt is logged when it ends, the newest first, in the shape of recorded ones."""
    clock = FrozenClock()

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        [webhook] = (await ask(logto, "/api/hooks")).json()
        log = f"/api/hooks/{webhook['id']}/recent-logs"
        start = clock.now()
        for status in (200, 500):
            receiver.status = status
            logto.create_user()
            clock.tick(1)
            await logto.settle()
        logto.faults = Faults(lost=1)
        logto.create_user()
        await logto.settle()
        lost, failed, fine = (await ask(logto, log)).json()
        recorded = {each["payload"]["result"]: each for each in recorded_log("lossy")}
        for ours, result in ((failed, "Error"), (fine, "Success")):
            assert keys(ours) == keys(recorded[result])
            assert keys(ours["payload"]) == keys(recorded[result]["payload"])
            assert ours["payload"]["result"] == result
        assert fine["payload"]["response"] == {"body": {"ok": True}, "statusCode": 200}
        assert failed["payload"]["error"].startswith("HTTPError: {")
        assert lost["payload"]["error"].startswith("TypeError: {")
        assert "response" not in lost["payload"]
        assert fine["payload"]["hookRequest"]["body"] == receiver.bodies[0]
        assert (fine["createdAt"], failed["createdAt"]) == (start + 1000, start + 2000)
        window = await ask(logto, f"{log}?start_time={start + 1000}&end_time={start + 2000}")
        assert window.json() == [fine]
        clock.tick(86_400)
        assert len((await ask(logto, log)).json()) == 2
        assert len((await ask(logto, f"{log}?start_time=0")).json()) == 3

    live(test, FakeLogto(now=clock.now, at_once=1))


def test_a_log_of_a_million() -> None:
    """A million entries and users are served without being held."""
    clock = FrozenClock()
    payload = {"event": "User.Created", "hookId": "h"}

    def made(number: int) -> Json:
        return log_entry(f"e{number}", payload, clock.now() - 1000 - number, None, "lost")

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        [webhook] = (await ask(logto, "/api/hooks")).json()
        logto.populate_log(webhook["id"], MadeUsers(1_000_000, made))
        logto.create_user()
        await logto.settle()
        start, end = clock.now() - 600_000, clock.now() - 500_000
        log = f"/api/hooks/{webhook['id']}/recent-logs?start_time={start}&page_size=2"
        answer = await ask(logto, log)
        assert answer.headers["total-number"] == str(599_001 + 1)
        assert [each["id"][:2] for each in answer.json()][1] == "e0"
        answer = await ask(logto, f"{log}&end_time={end}")
        assert answer.headers["total-number"] == "100000"
        assert answer.json()[0]["createdAt"] == end - 1

    live(test, FakeLogto(now=clock.now))


def test_users_of_a_million() -> None:
    """A million users are listed behind those who came since; they change and go as any."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        logto.populate(1_000_000)
        new = logto.create_user()["id"]
        logto.delete_user("user00999998")
        logto.update_user("user00999997", name="Other")
        answer = await ask(logto, "/api/users?page_size=3")
        assert answer.headers["total-number"] == "1000000"
        assert [each["id"] for each in answer.json()] == [new, "user00999999", "user00999997"]
        assert answer.json()[2]["name"] == "Other"
        [last] = (await ask(logto, "/api/users?page=1000000&page_size=1")).json()
        assert last["id"] == "user00000000"
        assert (await ask(logto, "/api/users/user00999998")).status_code == 404
        assert (await ask(logto, "/api/users/user00000005")).json()["name"] == "user00000005"

    live(test)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_history(name: Name) -> None:
    """At the end of a recorded history, the API says what was recorded, the log included."""
    final, log = load(name).final, recorded_log(name)

    async def main() -> None:
        async with FakeLogto.from_history(name, log=log) as logto:
            [webhook] = (await ask(logto, "/api/hooks")).json()
            for user in final.users[:3]:
                assert (await ask(logto, f"/api/users/{user['id']}")).json() == user
            assert (await ask(logto, "/api/organizations?page_size=100")).json() == sorted(
                final.organizations, key=lambda each: str(each["id"])
            )
            for organization, members in final.members.items():
                path = f"/api/organizations/{organization}/users?page_size=100"
                listed = (await ask(logto, path)).json()
                assert {each["id"] for each in listed} == {each["id"] for each in members}
            path = f"/api/hooks/{webhook['id']}/recent-logs?page_size=100&page=2"
            assert (await ask(logto, path)).json() == log[100:200]

    asyncio.run(main())


def test_a_history_without_its_log() -> None:
    """Without the recorded log, one is made of the deliveries: the same bodies and results."""

    async def main() -> None:
        async with FakeLogto.from_history("lossy") as logto:
            [webhook] = (await ask(logto, "/api/hooks")).json()
            path = f"/api/hooks/{webhook['id']}/recent-logs?page_size=100&page="
            pages = [(await ask(logto, f"{path}{number}")).json() for number in range(1, 7)]
        assert told(entry for page in pages for entry in page) == told(recorded_log("lossy"))

    def told(entries: Any) -> list[bytes]:
        payloads = [each["payload"] for each in entries]
        kept = [(each["result"], each["hookRequest"], each["response"]) for each in payloads]
        return sorted(msgspec.json.encode(each, order="sorted") for each in kept)

    asyncio.run(main())


def test_ties() -> None:
    """With ties, updatedAt is a little older than the dispatch, ties, and goes back."""
    clock = FrozenClock()

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        user = logto.create_user()["id"]
        stamps = []
        for _ in range(40):
            clock.tick(0.005)
            stamps.append(logto.update_user(user)["updatedAt"])
            assert 0 <= clock.now() - stamps[-1] <= 20
        steps = [after - before for before, after in itertools.pairwise(stamps)]
        assert 0 in steps
        assert min(steps) < 0

    live(test, FakeLogto(now=clock.now, ties=True))


def outcome(faults: Faults, seed: int = 0) -> tuple[list[str], list[str]]:
    """What arrives of twenty users made under faults, and what is logged."""
    arrived: list[str] = []
    logged: list[str] = []

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        logto.faults = faults
        for number in range(20):
            logto.create_user(username=f"{number:02}")
        logto.faults = Faults()
        await logto.settle()
        arrived.extend(body["data"]["username"] for body in receiver.bodies)
        [webhook] = (await ask(logto, "/api/hooks")).json()
        entries = (await ask(logto, f"/api/hooks/{webhook['id']}/recent-logs?page_size=100")).json()
        logged.extend(each["payload"]["result"] for each in entries)

    live(test, FakeLogto(now=FrozenClock().now, at_once=1, seed=seed))
    return arrived, logged


EVERY = [f"{number:02}" for number in range(20)]


def test_no_fault() -> None:
    """Without faults each arrives once, in order if one is sent at a time, and is logged."""
    assert outcome(Faults()) == (EVERY, ["Success"] * 20)


def test_lost() -> None:
    """A lost webhook doesn't arrive, and is logged as failed; the same ones for a seed."""
    arrived, logged = outcome(Faults(lost=0.3), seed=3)
    assert 0 < logged.count("Error") == 20 - len(arrived) < 20
    assert outcome(Faults(lost=0.3), seed=3)[0] == arrived
    assert outcome(Faults(lost=0.3), seed=4)[0] != arrived


def test_silent() -> None:
    """A silent one is neither sent nor logged."""
    arrived, logged = outcome(Faults(silent=0.5))
    assert 0 < len(arrived) == len(logged) < 20


def test_doubled() -> None:
    """A doubled one arrives twice, and is logged once."""
    arrived, logged = outcome(Faults(doubled=1))
    assert sorted(arrived) == sorted(EVERY * 2)
    assert len(logged) == 20


def test_reordered() -> None:
    """Reordered ones arrive all, in another order."""
    arrived, _ = outcome(Faults(reordered=0.5, delay_ms=(0, 1)))
    assert arrived != EVERY
    assert sorted(arrived) == EVERY


def test_killed() -> None:
    """Killed, Logto has the change, and sends and logs nothing of it, held back or not."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        logto.faults = Faults(delay_ms=(1, 1))
        user = logto.create_user()["id"]
        await asyncio.sleep(0)
        logto.create_user()
        logto.kill()
        await logto.settle()
        assert not receiver.received
        assert (await ask(logto, f"/api/users/{user}")).status_code == 200
        [webhook] = (await ask(logto, "/api/hooks")).json()
        assert (await ask(logto, f"/api/hooks/{webhook['id']}/recent-logs")).json() == []

    live(test)


def test_a_faulty_api() -> None:
    """The API can be busy, saying for how long or not, or broken."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        async with httpx2.AsyncClient(base_url=logto.url) as client:
            logto.faults = Faults(status_429=1, retry_after_s=2)
            busy = await client.get("/api/users")
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "2")
            logto.faults = Faults(status_500=1, slow_ms=1)
            assert (await client.get("/api/users")).status_code == 500
            logto.faults = Faults()
            assert (await client.get("/api/users")).status_code == 401

    live(test)


def test_only_what_a_webhook_wants() -> None:
    """Each subscribed webhook gets its own copy, with its own id and key; others get nothing."""

    async def test(logto: FakeLogto, receiver: Receiver) -> None:
        [webhook] = (await ask(logto, "/api/hooks")).json()
        url = webhook["config"]["url"]
        second = logto.add_hook(url, events=["User.Created"], signing_key="other")
        logto.add_hook(url, events=["User.Deleted"])
        logto.create_user()
        await logto.settle()
        assert receiver.events == ["User.Created"] * 2
        assert [body["hookId"] for body in receiver.bodies] == [webhook["id"], second["id"]]
        first, other = (headers["logto-signature-sha-256"] for headers, _ in receiver.received)
        assert first != other

    live(test)


def test_restarted() -> None:
    """Entered again, it has the same address and records."""

    async def main() -> None:
        logto = FakeLogto()
        async with logto:
            url, user = logto.url, logto.create_user()["id"]
        async with logto:
            assert logto.url == url
            assert (await ask(logto, f"/api/users/{user}")).status_code == 200

    asyncio.run(main())


def test_unknown() -> None:
    """An unknown record is a KeyError, an unknown field a TypeError; nothing changes."""
    logto = FakeLogto()
    with pytest.raises(KeyError):
        logto.update_user("nobody")
    with pytest.raises(TypeError, match="colour"):
        logto.create_user(colour="red")
