"""Pieces of an application of somebody's, to be put together in a file."""

# `began` and `ended` tell of each process that serves; an effect is a row, or a line of a file.
HEAD = """
import asyncio
import contextlib
import os
import sys
import threading
import time

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import Delivery, LogtoWebhooks, events

make_engine = create_async_engine if "asyncpg" in os.environ["APP_URL"] else sa.create_engine
engine = make_engine(os.environ["APP_URL"])
logto = LogtoWebhooks(
    signing_key=os.environ["APP_KEY"], engine=engine, schema=os.environ.get("APP_SCHEMA")
)
INSERT = sa.text(f"INSERT INTO {os.environ['APP_EFFECTS']} VALUES (:handler, :delivery, :pid)")


def effect(handler, delivery):
    return {"handler": handler, "delivery": delivery.id, "pid": os.getpid()}


def noted(handler, delivery):
    with open("effects", "a") as file:
        file.write(f"{handler} {delivery.id} {os.getpid()}\\n")


@contextlib.asynccontextmanager
async def telling(app):
    print("began", os.getpid(), flush=True)
    yield
    print("ended", os.getpid(), flush=True)
"""
AWAITED = """

@logto.on("User.Created", name="awaited")
async def awaited(event: events.UserCreated, delivery: Delivery, session: AsyncSession):
    await session.execute(INSERT, effect("awaited", delivery))
"""
PLAIN = """

@logto.on("User.Created", name="plain")
def plain(event: events.UserCreated, delivery: Delivery, session: Session):
    session.execute(INSERT, effect("plain", delivery))
"""
BESIDE = """

@logto.on("User.Created", name="beside")
def beside(event: events.UserCreated, delivery: Delivery):
    noted("beside", delivery)
"""
FASTAPI = """

from fastapi import FastAPI
from logto_webhooks.fastapi import router

api = FastAPI(lifespan=telling)
api.include_router(router(logto))
"""
STARLETTE = """

from starlette.applications import Starlette
from logto_webhooks.starlette import routes


@contextlib.asynccontextmanager
async def both(app):
    async with logto.lifespan(), telling(app):
        yield


api = Starlette(routes=routes(logto), lifespan=both)
"""

BARE = """

class Api:
    async def __call__(self, scope, receive, send):
        async def said(message):
            if message["type"] == "lifespan.startup.complete":
                print("began", os.getpid(), flush=True)
            await send(message)

        await logto(scope, receive, said)


api = Api()
"""
