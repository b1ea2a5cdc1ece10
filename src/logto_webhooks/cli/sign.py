"""What Logto would send, and where to: `sign`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from logto_webhooks.cli import options
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.signing_keys import sign as sign_body


def sign(
    file: Annotated[
        Path | None, typer.Argument(help="The file with the body; standard input if left out.")
    ] = None,
    signing_key: options.SigningKey = None,
    env_file: options.EnvFile = None,
) -> None:
    """Print the value of Logto's signature header for a body."""
    settings = options.settings(env_file, signing_key=signing_key)
    try:
        body = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise SettingInvalid(name=str(file), problem=str(error.strerror).lower()) from None
    print(sign_body(body, settings.signing_keys[0]))
