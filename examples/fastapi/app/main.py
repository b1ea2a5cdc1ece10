"""The application: its own lifespan and endpoints, and Logto's webhook beside them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from app.auth import Claims
from app.database import InSession, engine
from app.logto import logto
from app.models import Greeting, Note, SignIn, Workspace, logto_users
from logto_webhooks import UserIsDeletedError
from logto_webhooks.fastapi import router

logger = logging.getLogger("uvicorn.error")


class NewNote(BaseModel):
    """The body of POST /notes."""

    text: str


class Written(BaseModel):
    """The response to POST /notes."""

    id: int
    author: str


class Mine(BaseModel):
    """A user's workspace, with the user's data from Logto."""

    title: str
    name: str | None
    email: str | None
    sign_ins: int
    greetings: list[str]
    notes: list[str]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Start and stop the application. The router's lifespan starts after this, and ends before."""
    logger.info("The application has started")
    yield
    await engine.dispose()
    logger.info("The application has stopped")


app = FastAPI(title="An application with users of Logto", lifespan=lifespan)
app.include_router(router(logto))  # POST /api/webhooks/logto


@app.exception_handler(UserIsDeletedError)
async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Refuse a user who was deleted after the token was issued."""
    return JSONResponse({"detail": "this user was deleted"}, 403)


@app.post("/notes", status_code=201)
async def write_note(new: NewNote, claims: Claims, session: InSession) -> Written:
    """Store a note, and its author if no webhook has arrived yet, in one transaction."""
    user = await logto.ensure_user(claims, session=session)
    note = Note(author=user.logto_user_id, text=new.text)
    session.add(note)
    await session.commit()
    return Written(id=note.id, author=note.author)


@app.get("/workspace")
async def show_workspace(claims: Claims, session: InSession) -> Mine:
    """Show the user's workspace, from our own tables joined with Logto's."""
    me = claims["sub"]
    mine = (
        sa.select(Workspace.title, logto_users.c.name, logto_users.c.email)
        .join(logto_users, logto_users.c.logto_user_id == Workspace.owner)
        .where(Workspace.owner == me, logto_users.c.deleted_at.is_(None))
    )
    found = (await session.execute(mine)).one_or_none()
    if found is None:
        raise HTTPException(404, "there is no workspace (yet)")
    sign_ins = sa.select(sa.func.count()).select_from(SignIn).where(SignIn.logto_user_id == me)
    greetings = sa.select(Greeting.text).where(Greeting.logto_user_id == me)
    notes = sa.select(Note.text).where(Note.author == me).order_by(Note.id)
    return Mine(
        title=found.title,
        name=found.name,
        email=found.email,
        sign_ins=(await session.scalars(sign_ins)).one(),
        greetings=list(await session.scalars(greetings)),
        notes=list(await session.scalars(notes)),
    )
