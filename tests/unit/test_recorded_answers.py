"""What is odd about Logto's API, in its recorded answers, and what this package makes of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import pytest

from logto_webhooks.deliveries import identify
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.api_responses import PAGE, pairs_of_organization, pairs_of_user
from logto_webhooks.logto.webhooks import leads_here, parse_webhook
from logto_webhooks.records.record import membership
from logto_webhooks.signing_keys import trust
from tests.support import recorded

Json = dict[str, Any]


class Answer(msgspec.Struct):
    """A recorded answer."""

    request: Json
    status: int
    response_headers: list[tuple[str, str]]
    body_text: str

    @property
    def content(self) -> Any:
        """The decoded body."""
        return msgspec.json.decode(self.body_text)

    def headers(self, name: str) -> list[str]:
        """All headers of a name."""
        return [value for key, value in self.response_headers if key.lower() == name]


def load(name: str) -> Answer:
    file = recorded.FOLDER / "api" / f"{name}.json"
    return msgspec.json.decode(file.read_bytes(), type=Answer)


def test_the_link_header_is_wrong() -> None:
    """It lacks /api, so that whoever follows it gets a 404; the total is right."""
    page = load("users-p1-5")
    assert "/api/users" in page.request["url"]
    assert all("/users" in link and "/api/" not in link for link in page.headers("link"))
    assert int(page.headers("total-number")[0]) > len(page.content) == 5


def test_pages_have_at_most_a_hundred() -> None:
    """More is refused, and so is page 0; beyond the end there is nothing."""
    assert "page_size=101" in load("users-size101").request["url"]
    assert load("users-size101").status == load("users-page0").status == 400
    assert PAGE == 100
    assert load("users-p999").content == []


def test_users_are_listed_newest_first() -> None:
    """By offset: who signs up meanwhile shifts all others."""
    listed = load("users-p1-5").content + load("users-p2-5").content
    born = [each["createdAt"] for each in listed]
    assert born == sorted(born, reverse=True)


def test_an_unknown_organization_has_no_members() -> None:
    """Not 404: so an empty list deletes no organization."""
    assert (load("organization-users-404").status, load("organization-users-404").content) == (
        200,
        [],
    )
    assert load("organization-404").status == 404
    assert load("user-organizations-404").status == 404


@pytest.mark.parametrize("name", ["organization-users-p1-2", "user-organizations"])
def test_both_lists_of_memberships_tell_the_roles(name: str) -> None:
    """Of an organization, and of a user."""
    content = load(name).content
    assert all(each["organizationRoles"] == [] for each in content)
    role = {"id": "r1", "name": "owner"}
    content[0]["organizationRoles"] = [role]
    of = pairs_of_organization if "users" in name else pairs_of_user
    pair = membership(*(("x", content[0]["id"]) if "users" in name else (content[0]["id"], "x")))
    assert of("x", content)[pair] == {"r1": "owner"}


def test_a_webhook_shows_its_key() -> None:
    """By which it is known to point here."""
    webhook = parse_webhook(load("hook").content)
    assert webhook
    assert leads_here(webhook, set(), {webhook.signing_key}, None)
    assert not leads_here(webhook, set(), {"another"}, "http://127.0.0.1:1/")


def test_entries_are_stamped_at_their_end() -> None:
    """Newest first, and never before the delivery they tell of was sent."""
    page = load("hook-recent-logs-start-end")
    ended = [each["createdAt"] for each in page.content]
    assert ended == sorted(ended, reverse=True)
    for entry in page.content:
        sent = datetime.fromisoformat(entry["payload"]["hookRequest"]["body"]["createdAt"])
        assert entry["createdAt"] >= sent.timestamp() * 1000 - 1


def test_an_entry_is_its_delivery_in_another_order() -> None:
    """Of keys: what identifies it knows no order, and no webhook."""
    found = 0
    sent = {identify(trust(each.body.encode()), 0).digest for each in recorded.deliveries()}
    for name in ("hook-recent-logs-start-end", "hook-recent-logs-p2-3"):
        for entry in load(name).content:
            delivery = delivery_log.parse_delivery(entry, 0)
            assert delivery
            found += delivery.digest in sent
    assert found > 0


def test_tokens_last_an_hour() -> None:
    """And name no other scope than all."""
    token = load("oidc-token-basic").content
    assert (token["expires_in"], token["scope"]) == (3600, "all")
