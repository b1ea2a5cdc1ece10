"""What the product is measured against: a server that only verifies, and the usual view."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, HTTPException, Request
from starlette.types import Receive, Scope, Send

KEY = "bench"
HEADER = b"logto-signature-sha-256"


def _signed(body: bytes, signature: bytes) -> bool:
    expected = hmac.new(KEY.encode(), body, hashlib.sha256).hexdigest().encode()
    return hmac.compare_digest(signature, expected)


async def verify_only(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body, check the HMAC, answer 200: nothing is kept."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    good = _signed(body, dict(scope["headers"]).get(HEADER, b""))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    start = {"type": "http.response.start", "status": 200 if good else 401, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": b"{}"})


def tutorial() -> FastAPI:
    """Await the body, check the HMAC, parse, select the user, insert or update, commit."""
    engine = sa.create_engine(os.environ["BENCH_DATABASE_URL"])
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _durable)
    users = sa.Table(
        "tutorial_users",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text, unique=True),
        sa.Column("email", sa.Text),
        sa.Column("name", sa.Text),
        sa.Column("custom_data", sa.JSON),
    )
    users.create(engine, checkfirst=True)
    app = FastAPI()

    @app.post("/api/webhooks/logto")
    async def webhook(request: Request) -> dict[str, bool]:
        body = await request.body()
        if not _signed(body, request.headers["logto-signature-sha-256"].encode()):
            raise HTTPException(401)
        payload = json.loads(body)
        user = payload.get("data") or payload["user"]
        values = {name: user[key] for name, key in _COLUMNS.items()}
        with engine.begin() as connection:
            mine = users.c.logto_id == user["id"]
            if connection.execute(sa.select(users.c.id).where(mine)).first():
                connection.execute(sa.update(users).where(mine).values(values))
            else:
                connection.execute(sa.insert(users).values(logto_id=user["id"], **values))
        return {"ok": True}

    return app


_COLUMNS = {"email": "primaryEmail", "name": "name", "custom_data": "customData"}


def _durable(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
