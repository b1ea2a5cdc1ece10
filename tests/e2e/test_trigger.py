"""Playing Logto: what scenarios tell, what faults do to it, and what is left of both in the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterator
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from logto_webhooks import testing
from logto_webhooks.cli import app as cli
from logto_webhooks.cli.trigger import send_requests
from logto_webhooks.events import BY_NAME
from logto_webhooks.samples.request import (
    FAULTS,
    PIECES,
    Fault,
    SignedRequest,
    Step,
    plan_faults,
    sign_request,
)
from logto_webhooks.samples.scenarios import SCENARIOS, scenario
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.service import PATH, Service, wait_until_done

HARMLESS: tuple[Fault, ...] = ("duplicates", "reordering", "wrong-signatures", "slow-sending")
AT = 1_795_485_335_000
SEEDS = range(12)


def story(name: str) -> list[Json]:
    return scenario(name, at=AT, rng=random.Random(1), id="ana")


def deliveries(name: str) -> list[SignedRequest]:
    return [sign_request(each, SIGNING_KEY) for each in story(name)]


def many() -> list[SignedRequest]:
    return [make.user_created(id=f"u{number}", at=AT) for number in range(40)]


def struck(steps: list[Step], fault: Fault) -> list[Step]:
    return [each for each in steps if fault in each.faults]


def true_ones(steps: list[Step]) -> list[int]:
    """The numbers of the deliveries themselves, in the order of sending."""
    beside = {"duplicates", "wrong-signatures", "loss"}
    return [each.number for each in steps if not beside & set(each.faults)]


class TestScenarios:
    def test_a_sign_up_brings_the_membership_first(self) -> None:
        """In Logto's order, of one moment; then the interaction's event."""
        _, joined, created, registered = story("sign-up")
        names = [each["event"] for each in (joined, created, registered)]
        assert names == ["Organization.Membership.Updated", "User.Created", "PostRegister"]
        assert joined["createdAt"] == created["createdAt"]
        assert joined["addedUserIds"] == [created["data"]["id"]] == [registered["userId"]]

    def test_a_burst_ties_and_goes_back(self) -> None:
        """In updatedAt, while what is sent later was made later."""
        _, *changes = story("burst")
        stamps = [each["data"]["updatedAt"] for each in changes]
        assert len(set(stamps)) < len(stamps)
        assert stamps != sorted(stamps)
        assert (sent := [each["createdAt"] for each in changes]) == sorted(sent)

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_each_names_known_events_of_one_person(self, name: str) -> None:
        """And tells the same again, of the same seed."""
        told = story(name)
        assert {each["event"] for each in told} <= set(BY_NAME)
        people = [each.get("user") or each.get("data", {"id": "ana"}) for each in told[1:]]
        assert {each["id"] for each in people} == {"ana"}
        assert story(name) == told


class TestFaults:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_plan_follows_from_its_seed(self, seed: int) -> None:
        """Another seed is another plan; no fault changes nothing."""
        sent = many()
        assert plan_faults(sent, FAULTS, seed) == plan_faults(sent, FAULTS, seed)
        assert plan_faults(sent, FAULTS, seed) != plan_faults(sent, FAULTS, seed + 1)
        assert [(each.body, each.faults) for each in plan_faults(sent, (), seed)] == [
            (each.body, ()) for each in sent
        ]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", SCENARIOS)
    def test_each_strikes(self, name: str, seed: int) -> None:
        """At least one delivery; nothing else befalls what is lost."""
        steps = plan_faults(deliveries(name), HARMLESS, seed)
        assert all(struck(steps, each) for each in HARMLESS)
        steps = plan_faults(deliveries(name), FAULTS, seed)
        lost = {each.number for each in struck(steps, "loss")}
        assert lost
        assert lost.isdisjoint(each.number for each in steps if not each.lost)
        assert len(lost) == len(struck(steps, "loss"))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_only_loss_keeps_a_delivery_away(self, seed: int) -> None:
        """Each goes out once by itself, copies are beside it."""
        steps = plan_faults(many(), FAULTS, seed)
        lost = [each.number for each in struck(steps, "loss")]
        assert sorted(true_ones(steps) + lost) == list(range(1, 41))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_what_is_out_of_order_was_overtaken(self, seed: int) -> None:
        """Those that aren't struck keep theirs."""
        steps = plan_faults(many(), ["reordering"], seed)
        numbers = [each.number for each in steps]
        assert numbers != sorted(numbers)
        assert (kept := [each.number for each in steps if not each.faults]) == sorted(kept)

    def test_a_wrong_signature_is_refused_and_a_slow_body_is_whole(self) -> None:
        """A copy of the first is signed by nobody's key; the second comes in pieces."""
        app = testing.App()
        steps = plan_faults(many(), ["wrong-signatures", "slow-sending"], 1)
        assert {each.pieces for each in struck(steps, "slow-sending")} == {PIECES}
        for each in steps:
            assert app.deliver(each).status == each.expected

    def test_a_slow_body_comes_in_pieces(self) -> None:
        """Of an announced length, as Logto's always is."""
        [step] = plan_faults([make.user_created(id="ana")], ["slow-sending"], 1)
        head, pieces = asyncio.run(read_while_sending(step))
        assert f"content-length: {len(step.body)}\r\n" in head
        assert "transfer-encoding" not in head
        assert b"".join(pieces) == step.body
        assert len(pieces) > 1

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_without_loss_all_ends_the_same(self, name: str) -> None:
        """Whatever the seed: the rows, and what is in doubt."""
        expected = end_of(deliveries(name))
        for seed in SEEDS:
            assert end_of(plan_faults(deliveries(name), HARMLESS, seed)) == expected


async def read_while_sending(step: Step) -> tuple[str, list[bytes]]:
    """What a server reads: the head, and each piece of the body."""
    head, pieces = b"", list[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal head
        head = await reader.readuntil(b"\r\n\r\n")
        while sum(map(len, pieces)) < len(step.body):
            pieces.append(await reader.read(2**16))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await send_requests(f"http://127.0.0.1:{port}", [step], lambda step, answer: None)
    return head.decode().lower(), pieces


def end_of(sent: Collection[SignedRequest]) -> list[Any]:
    app = testing.App()
    for each in sent:
        app.deliver(each)
    rows = [*app.users(), *app.organizations()]
    known = [({**each.row, "id": None}, each.memberships) for each in rows]
    return [known, app.waiting()]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real one, on a database of its own, in whose folder the commands are run."""
    folder = tmp_path_factory.mktemp("service")
    with Service(folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield running


class TestTheCommand:
    """Over real sockets, to a real service."""

    def test_each_scenario_ends_as_it_must(self, service: Service) -> None:
        """With all that goes wrong and loses nothing; the answers are as they must be."""
        before = service.stored()
        for name in SCENARIOS:
            told = trigger(service, "--scenario", name, "--id", name)
            assert told.exit_code == 0, told.output
        wait_until_done(service)
        assert service.stored() - before == sum(len(story(name)) for name in SCENARIOS)
        future = "SELECT event FROM logto_deliveries WHERE occurred_at > received_at"
        assert service.rows(future) == []
        query = "SELECT logto_user_id, name, is_suspended, deleted_at IS NULL FROM logto_users"
        users = {row[0]: row[1:] for row in service.rows(query) if row[0] in SCENARIOS}
        assert users.keys() == set(SCENARIOS)
        assert users["burst"][0] == "Fay", "of the greatest updatedAt"
        assert users["suspension"][1]
        assert [name for name, row in users.items() if not row[-1]] == ["deletion"]
        members = "SELECT logto_user_id FROM logto_organization_members"
        assert service.rows(members) == [("sign-up",)]
        doubtful = "SELECT logto_id FROM logto_records WHERE doubtful AND kind = 'user'"
        assert ("burst",) in service.rows(doubtful)

    def test_the_same_seed_does_the_same(self, service: Service) -> None:
        """Also one that was chosen, and told; JSON says what befell each."""
        words = ["--scenario", "suspension", "--faults", "all"]
        summary = trigger(service, *words, seed=None).stdout.splitlines()[-1]
        seed = int(summary.partition(":")[0].removeprefix("seed "))
        first, second = (
            msgspec.json.decode(trigger(service, *words, "--json", seed=seed).stdout)
            for _ in range(2)
        )
        assert first["seed"] == seed
        assert f"{first['sent']} sent" in summary
        assert f"{first['lost']} lost on purpose" in summary
        assert without_answers(first) == without_answers(second)
        statuses = [each["status"] for each in first["deliveries"]]
        counted = {str(status): statuses.count(status) for status in {200, 401} & set(statuses)}
        assert first["answered"] == counted
        assert statuses.count(None) == first["lost"] > 0

    def test_an_answer_that_must_not_be_is_exit_code_1(self, service: Service) -> None:
        """As when the service has another key."""
        told = trigger(service, "--scenario", "sso", "--signing-key", "another-key-0123456789")
        assert told.exit_code == 1
        assert " answered 200" not in told.stdout

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--scenario", "brust"], "the closest is burst"),
            (["--scenario", "xyz"], "use one of sign-up, burst"),
            (["--scenario", "sso", "PostSignIn"], "use either a scenario or an event"),
            ([], "Give an event, such as User.Created, or --scenario NAME."),
            (["--scenario", "sso", "--data", "name=x"], "it needs an event, not a scenario"),
            (["PostSignIn", "--faults", "loss,duplicate"], "the closest is duplicates"),
            (["User.Created", "--data", 'customData={"a": 1'], "customData isn't valid JSON; put"),
            (["User.Created", "--data", "naem=x"], "the closest is name."),
            (["User.Created", "--data", "name.x=1"], "the field 'name.x' can't be used: name has"),
        ],
    )
    def test_what_it_does_not_know_is_refused(self, arguments: list[str], says: str) -> None:
        """With the nearest that it knows."""
        told = CliRunner().invoke(cli, ["trigger", *arguments, "--signing-key", SIGNING_KEY])
        assert says in str(told.exception)


def trigger(service: Service, *arguments: str, seed: int | None = 7) -> Result:
    """Without `faults`, those that lose nothing."""
    url = f"{service.url}{PATH}"
    words = ["--to", url, "--signing-key", SIGNING_KEY, *arguments]
    if "--faults" not in arguments:
        words += ["--faults", ",".join(HARMLESS)]
    if seed is not None:
        words += ["--seed", str(seed)]
    return CliRunner().invoke(cli, ["trigger", *words])


def without_answers(told: Json) -> list[Json]:
    """The ids in the inbox differ."""
    return [{name: each[name] for name in each if name != "answer"} for each in told["deliveries"]]
