"""Options that several commands share: each is a setting, and wins over its variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from logto_webhooks.cli import envfile, output
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.settings import FILE, FILE_VARIABLES, VARIABLES, Settings, from_env


def _setting(field: str, text: str) -> Any:
    return typer.Option(help=f"{text} [{', '.join(VARIABLES[field])}]", show_default=False)


SigningKey = Annotated[
    str | None, _setting("signing_key", "The hook's signing key; several separated by commas.")
]
DatabaseUrl = Annotated[
    str | None, _setting("database_url", "Where the data is; sqlite:///logto-webhooks.db if unset.")
]
Schema = Annotated[
    str | None, _setting("schema", "PostgreSQL's schema with the tables; the default if unset.")
]
WithWorker = Annotated[
    bool | None,
    typer.Option(
        "--worker/--no-worker",
        help="Apply in this process, too; yes if unset. [LOGTO_WEBHOOKS_WORKER]",
        show_default=False,
    ),
]
Host = Annotated[str | None, _setting("host", "The address to listen on; 127.0.0.1 if unset.")]
Port = Annotated[int | None, _setting("port", "The port to listen on; 8787 if unset.")]
Path_ = Annotated[str | None, _setting("path", "The webhook's path; /api/webhooks/logto if unset.")]
MaxBody = Annotated[int | None, _setting("max_body_bytes", "The largest body; 8 MiB if unset.")]
MaxAttempts = Annotated[
    int | None, _setting("max_attempts", "How often a failing delivery is tried; 8 if unset.")
]
LagMs = Annotated[
    int | None,
    _setting(
        "lag_ms",
        "How much older than its dispatch a change can be, in milliseconds; 100 if unset.",
    ),
]
ReplayWindow = Annotated[
    int | None,
    _setting(
        "replay_window_s",
        "How old a delivery to the webhook may be and run handlers, in seconds; 604800 if unset, 0 "
        "is no limit.",
    ),
]
Endpoint = Annotated[
    str | None, _setting("endpoint", "Logto's address, such as https://auth.example.com.")
]
AppId = Annotated[str | None, _setting("app_id", "The machine-to-machine application's id.")]
AppSecret = Annotated[str | None, _setting("app_secret", "Its secret.")]
ApiResource = Annotated[
    str | None, _setting("api_resource", "The Management API's identifier; derived if unset.")
]
ApiBudget = Annotated[
    float | None, _setting("api_budget", "How many requests a second Logto gets; 15 if unset.")
]
RecoverEvery = Annotated[
    int | None,
    _setting("recover_every_s", "How often Logto's log is asked, in seconds; 300 if unset."),
]
ReconcileEvery = Annotated[
    int | None,
    _setting(
        "reconcile_every_s",
        "How often all is compared with Logto, in seconds; 86400 if unset, 0 is never.",
    ),
]
SilenceAfter = Annotated[
    int | None,
    _setting(
        "silence_after_s",
        "How long nothing may come, in seconds; learnt from what is usual if unset, 0 is for ever.",
    ),
]
PublicUrl = Annotated[
    str | None, _setting("public_url", "The URL at which Logto reaches the webhook.")
]
SpoolDir = Annotated[
    str | None,
    _setting(
        "spool_dir",
        "A directory for deliveries that the database doesn't take in time; none if unset.",
    ),
]
App = Annotated[
    str | None,
    _setting("app", "Where the handlers are, as module:name of a LogtoWebhooks."),
]
LogFormat = Annotated[str | None, _setting("log_format", "text or json; text if unset.")]
LogLevel = Annotated[
    str | None, _setting("log_level", "debug, info, warning or error; info if unset.")
]
EnvFile = Annotated[
    Path | None,
    typer.Option(help="Read settings from this file; .env if there is one.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings(env_file: Path | None, **given: Any) -> Settings:
    """Read the settings: options, then the environment, then the file. Raises SettingInvalid."""
    if env_file is not None and not env_file.is_file():
        raise SettingInvalid(name="--env-file", problem=f"there is no file {env_file}")
    file = env_file or Path(".env")
    values = envfile.read(file) if file.is_file() else {}
    environment = {name: value for name, value in os.environ.items() if value}
    # Where the environment has a secret, be it by a file, the line of `.env` gives way.
    for by_file, name in FILE_VARIABLES.items():
        if name in environment or by_file in environment:
            values = {key: value for key, value in values.items() if key not in (name, by_file)}
    places = {name: str(file) for name in values.keys() - environment.keys()}
    settings = from_env(values | environment, places=places, option=True, **given)
    _warn_of_secrets(given)
    return settings


def _warn_of_secrets(given: dict[str, Any]) -> None:
    """Say that what is secret can be seen in the list of processes."""
    shown = [name for name in ("signing_key", "app_secret") if given.get(name)]
    for name in shown:
        variable = VARIABLES[name][0]
        output.warn(
            f"--{name.replace('_', '-')} on a command line can be read by everybody on this machine"
            f" (ps shows it). Set {variable}, or {variable}{FILE} to a file that holds it."
        )
