"""The signature: only what Logto signed gets through, and only that can be parsed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks.errors import SignatureRejected
from logto_webhooks.signing_keys import (
    FEW,
    HEADER,
    Keyring,
    VerifiedBody,
    WebhookKey,
    guess_webhook_ids,
    sign,
    trust,
    verify,
)
from tests.support import recorded

BODY = b'{"event":"User.Created"}'
GOOD = sign(BODY, "key").encode()


@pytest.mark.parametrize("delivery", recorded.deliveries(), ids=lambda each: each.name)
def test_it_is_logtos(delivery: recorded.Recorded) -> None:
    """`sign` gives what the recorded Logto sent; not where a header was set twice by hand."""
    [given_header] = [value for name, value in delivery.headers if name == HEADER]
    same = sign(delivery.body.encode(), delivery.signing_key) == given_header
    assert same != ("hooktest-multi" in delivery.name)


@given(body=st.binary(), key=st.text(min_size=1))
def test_what_is_signed_verifies(body: bytes, key: str) -> None:
    """Any bytes, any key, also beside other keys."""
    signature = sign(body, key).encode()
    assert verify(body, [signature], ["other", key]).content == body
    with pytest.raises(SignatureRejected, match="no known key"):
        verify(body + b"x", [signature], [key])


@pytest.mark.parametrize(
    ("signatures", "says"),
    [
        ([], "missing"),
        ([GOOD, GOOD], "twice"),
        ([GOOD[:-1]], "64 lowercase hex"),
        ([GOOD + b"0"], "64 lowercase hex"),
        ([GOOD + b"\n"], "64 lowercase hex"),
        ([GOOD.upper()], "64 lowercase hex"),
        ([b"\xa0" + GOOD], "64 lowercase hex"),
        ([b"\xff" * 64], "64 lowercase hex"),
        (["٠".encode() * 32], "64 lowercase hex"),
        ([b"0" * 64], "no known key"),
    ],
)
def test_anything_else_is_rejected(signatures: list[bytes], says: str) -> None:
    """With the reason, and never with another kind of error."""
    with pytest.raises(SignatureRejected, match=says):
        verify(BODY, signatures, ["key"])


@pytest.mark.parametrize("value", [b" " + GOOD, GOOD + b"\t", b"  " + GOOD + b" "])
def test_blanks_around_the_header_are_allowed(value: bytes) -> None:
    """As HTTP does, be the server's parser as it may."""
    assert verify(BODY, [value], ["key"]).content == BODY


def test_an_empty_key_verifies_nothing() -> None:
    """Anybody can sign with it; the keys beside it go on working."""
    with pytest.raises(SignatureRejected, match="no known key"):
        verify(BODY, [sign(BODY, "").encode()], ["", "key"])
    assert verify(BODY, [GOOD], ["", "key"]).key == "key"


def test_without_a_key_nothing_verifies() -> None:
    """Fail closed."""
    with pytest.raises(SignatureRejected, match="no signing key"):
        verify(BODY, [GOOD], [])


def test_a_verified_body_cannot_be_made_by_hand() -> None:
    """Its type proves that the bytes were verified, or that somebody vouched for them."""
    with pytest.raises(TypeError, match="verify"):
        VerifiedBody(BODY, object())
    assert trust(BODY).content == BODY


@pytest.mark.parametrize("inner", [0, 1, 3, 4, 5, 1_000])
def test_a_webhook_is_found_at_either_end_of_a_body(inner: int) -> None:
    """Whatever customData says; and a body that names thousands takes no longer than others."""
    junk = b'"data":[%b]' % b",".join(b'{"hookId":"inner-%d"}' % each for each in range(inner))
    for body in (b'{"hookId":"ours",%b}' % junk, b'{%b,"hookId" : "ours"}' % junk):
        named = guess_webhook_ids(body)
        assert "ours" in named
        assert len(named) == min(inner + 1, 8)


@pytest.mark.parametrize(
    "body", [b"", b'"hookId"', b'"hookId":', b'"hookId":7', b'"hookId":"a b"', b'"hookId":"unended']
)
def test_a_body_that_names_no_webhook(body: bytes) -> None:
    """Also one that ends within it."""
    assert guess_webhook_ids(body) == []


def test_the_keys_that_are_tried_first() -> None:
    """All if they are few. Of many, some configured ones, and those of the webhook that the body
    names, as Logto's API or an earlier delivery told; none that has ended."""

    def learn(number: int, until: int | None = None) -> WebhookKey:
        key = f"learnt-key-0123456789-{number}"
        return WebhookKey(webhook_id=f"h{number // 2}", key=key, learnt_at=1, until=until)

    ring = Keyring([f"configured-key-{number}" for number in range(FEW)])
    body = b'{"hookId":"h1"}'
    assert ring.guess(body, 1) == ring.at(1)
    learnt = [learn(number, until=5 if number == 3 else None) for number in range(1_000)]
    ring.learn(learnt, 1)
    configured = [f"configured-key-{number}" for number in range(FEW)]
    assert ring.guess(body, 4) == [*configured, learnt[2].key, learnt[3].key]
    assert ring.guess(body, 5) == [*configured, learnt[2].key]
    assert ring.guess(b"{}", 5) == configured
    ring.note_use(learnt[900].key, b'{"hookId":"unknown-to-the-api"}', 9_000)
    assert ring.guess(b'{"hookId":"unknown-to-the-api"}', 5) == [*configured, learnt[900].key]
    ring.learn([], 5)
    assert ring.guess(b'{"hookId":"unknown-to-the-api"}', 5) == ring.at(5) == tuple(configured)
