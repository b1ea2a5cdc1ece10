"""Which webhook is meant, and to what one must listen. Pure."""

from __future__ import annotations

import pytest

from logto_webhooks.errors import WebhookUnknown
from logto_webhooks.logto.webhooks import (
    Webhook,
    find_our_webhook,
    find_webhook,
    parse_webhook,
    subscription,
)
from logto_webhooks.validation import is_url

SYNC = subscription()
A = Webhook(id="a", name="main", config={"url": "https://a.example/x"}, signing_key="key-a")
B = Webhook(id="b", name="twin", config={"url": "https://b.example/x/"}, signing_key="key-b")
C = Webhook(id="c", name="twin", config={"url": "https://c.example/x"}, signing_key="key-c")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("https://a.example/x", True),
        ("http://127.0.0.1:8000", True),
        ("HTTPS://ä.example/x?y=1", True),
        (" https://a.example/x", False),
        ("https://a.example/x\n", False),
        ("https://a.example/x y", False),
        ("https://a.ex\u200bample/x", False),
        ("ftp://a.example/x", False),
        ("https://:80/", False),
        ("https://a.example:99999/", False),
        ("http://[::1/x", False),
    ],
)
def test_what_is_pasted_must_be_an_address(text: str, is_one: bool) -> None:
    """With nothing before or behind it: Logto would take it as it is, and reach nobody."""
    assert is_url(text) is is_one


def test_the_sync_needs_users_organizations_and_sign_ins() -> None:
    """No role, no scope, and nothing that only this package makes."""
    assert {each.partition(".")[0] for each in SYNC} == {
        "User",
        "Organization",
        "PostRegister",
        "PostSignIn",
        "PostSignInAdaptiveMfaTriggered",
        "PostResetPassword",
    }
    assert not any(each.startswith("Organization.User") for each in SYNC)


@pytest.mark.parametrize(
    ("patterns", "more"),
    [
        (["LocalUserCreated", "Organization.User.Added", "User.Created"], set()),
        (["Role.Created"], {"Role.Created"}),
        (["Trusted*", "PostSignIn*"], set()),
        (["TrustedDevice.Created"], {"TrustedDevice.Created"}),
        (["Of.Tomorrow"], {"Of.Tomorrow"}),
    ],
)
def test_handlers_add_what_they_ask_for(patterns: list[str], more: set[str]) -> None:
    """By name even what no released Logto has; by a star only what one has."""
    assert set(subscription(patterns)) - set(SYNC) == more


def test_a_star_is_all_that_a_released_logto_sends() -> None:
    """Roles, scopes and limits, too."""
    everything = subscription(["*"])
    assert {"Role.Scopes.Updated", "Identifier.Lockout", "OrganizationScope.Deleted"} < set(
        everything
    )
    assert not {"TrustedDevice.Created", "TrustedDevice.Deleted"} & set(everything)


def test_one_is_named_by_id_name_or_url() -> None:
    """What names none, or several, is refused, with all there are."""
    assert find_webhook([A, B, C], "b") == B
    assert find_webhook([A, B, C], "main") == A
    assert find_webhook([A, B, C], "https://b.example/x") == B
    for query, says in (("twin", "several webhooks have"), ("nobody", "no webhook has")):
        with pytest.raises(WebhookUnknown, match=rf"{says} the name or URL '{query}'\. .*twin"):
            find_webhook([A, B, C], query)


def test_ours_has_our_key_or_url() -> None:
    """If none has, only what is harmless takes the only one."""
    assert find_our_webhook([A, B], ["key-b"], None) == B
    assert find_our_webhook([A, B], ["other"], "https://a.example/x/") == A
    assert find_our_webhook([A], ["other"], None, or_only=True) == A
    # Rotating the key of another application's webhook would lose its deliveries.
    with pytest.raises(WebhookUnknown, match="the signing key or URL in the settings"):
        find_our_webhook([A], ["other"], None)
    for webhooks, keys, says in (
        ([A, B], ["other"], "no webhook has the signing key or URL in the settings. Use an ID"),
        ([A, B, C], ["key-a", "key-b"], "several webhooks have the signing key or URL"),
        ([], ["key-a"], "Logto has no webhooks. Create one: logto-webhooks endpoint create"),
    ):
        with pytest.raises(WebhookUnknown, match=says):
            find_our_webhook(webhooks, keys, None)


def test_no_key_is_shown() -> None:
    """Nor a header; what is no webhook is none."""
    webhook = parse_webhook(
        {"id": "a", "signingKey": "k-e-y", "config": {"headers": {"x": "s-e-c"}}}
    )
    assert webhook is not None
    assert webhook.signing_key == "k-e-y"
    assert "k-e-y" not in repr(webhook)
    assert "s-e-c" not in repr(webhook)
    assert parse_webhook({"id": 5}) is None
