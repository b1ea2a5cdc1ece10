"""A FakeLogto in a process of its own: `python -m bench.logto --users N --entries N`.

It prints one line of JSON, where to reach it, and serves until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import UTC, datetime

import msgspec

from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake import FakeLogto, MadeUsers

GAP_MS = 400  # between two entries of the log


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=0)
    parser.add_argument("--entries", type=int, default=0)
    given = parser.parse_args()
    asyncio.run(_serve(given.users, given.entries))


async def _serve(users: int, entries: int) -> None:
    async with FakeLogto() as logto:
        logto.populate(users)
        webhook = logto.add_hook("http://127.0.0.1:9/webhook")
        now = int(webhook["createdAt"])
        logto.populate_log(webhook["id"], MadeUsers(entries, lambda number: _entry(number, now)))
        told = {
            "LOGTO_ENDPOINT": logto.url,
            "LOGTO_M2M_APP_ID": logto.app_id,
            "LOGTO_M2M_APP_SECRET": logto.app_secret,
            "LOGTO_WEBHOOK_SIGNING_KEY": logto.signing_key,
        }
        sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def _entry(number: int, now: int) -> Json:
    at = now - 1000 - number * GAP_MS
    moment = datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds")
    user = f"user{number % 5000:08}"
    body = {
        "event": "User.Data.Updated",
        "createdAt": moment.replace("+00:00", "Z"),
        "hookId": "bench",
        "params": {"userId": user},
        "matchedRoute": "/users/:userId/custom-data",
        "data": {"number": number},
    }
    payload = {"result": "Error", "error": "timed out", "hookRequest": {"body": body}}
    return {"id": str(number), "payload": payload, "createdAt": at}


if __name__ == "__main__":
    main()
