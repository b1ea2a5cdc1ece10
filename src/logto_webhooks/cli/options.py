"""The options of commands: one for each setting, and parsers of what people give to others."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Concatenate, Final, cast

import typer

from logto_webhooks.cli import envfile, output
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.events import BY_NAME
from logto_webhooks.events.base import to_millis
from logto_webhooks.events.local import LOCAL
from logto_webhooks.settings import FILE, FILE_VARIABLES, VARIABLES, Settings, from_env
from logto_webhooks.validation import check_text, is_url, nearest

Command = Callable[Concatenate[Settings, ...], None]


def _check_file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise SettingInvalid(name="--env-file", problem=f"there is no file {path}")
    return path


EnvFile = Annotated[
    Path | None,
    typer.Option(
        help="Read settings from this file. Default: .env, if it exists.", callback=_check_file
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option(min=1, help="Show at most this many.")]


def _option(type: Any, field: str, text: str, *flags: str) -> Any:
    help = f"{text} [{', '.join(VARIABLES[field])}]"
    return Annotated[type | None, typer.Option(*flags, help=help, show_default=False)]


OPTIONS: Final[dict[str, Any]] = {
    "signing_key": _option(
        str, "signing_key", "The webhook's signing key. Separate several with commas."
    ),
    "database_url": _option(
        str, "database_url", "The database's URL. Default: sqlite:///logto-webhooks.db."
    ),
    "schema": _option(
        str, "schema", "The PostgreSQL schema of the tables. Default: the connection's."
    ),
    "worker": _option(
        bool, "worker", "Apply deliveries in this process. Default: yes.", "--worker/--no-worker"
    ),
    "host": _option(str, "host", "The address to listen on. Default: 127.0.0.1."),
    "port": _option(int, "port", "The port to listen on. Default: 8787."),
    "path": _option(str, "path", "The webhook's path. Default: /api/webhooks/logto."),
    "max_body_bytes": _option(
        int, "max_body_bytes", "The largest request body, in bytes. Default: 8388608 (8 MiB)."
    ),
    "max_attempts": _option(
        int, "max_attempts", "Attempts before a failing delivery is dead. Default: 8."
    ),
    "lag_ms": _option(
        int,
        "lag_ms",
        "How long before its webhook a change may have happened, in milliseconds. Default: 100.",
    ),
    "replay_window_s": _option(
        int,
        "replay_window_s",
        "Run no handlers for deliveries older than this, in seconds. Default: 604800 (a week). 0 "
        "disables the limit.",
    ),
    "endpoint": _option(str, "endpoint", "Logto's address, such as https://auth.example.com."),
    "app_id": _option(str, "app_id", "The ID of the machine-to-machine application."),
    "app_secret": _option(str, "app_secret", "The secret of the machine-to-machine application."),
    "api_resource": _option(
        str,
        "api_resource",
        "The Management API's resource indicator. Default: derived from --endpoint.",
    ),
    "api_budget": _option(
        float, "api_budget", "Requests per second to the Management API. Default: 15."
    ),
    "recover_every_s": _option(
        int, "recover_every_s", "Seconds between two reads of Logto's log. Default: 300."
    ),
    "reconcile_every_s": _option(
        int,
        "reconcile_every_s",
        "Seconds between two comparisons of all records with Logto. Default: 86400 (a day). 0 "
        "disables them.",
    ),
    "silence_after_s": _option(
        int,
        "silence_after_s",
        "Seconds without a delivery before the silence alarm. Default: learned from usual traffic. "
        "0 disables the alarm.",
    ),
    "public_url": _option(str, "public_url", "The URL at which Logto reaches the webhook."),
    "spool_dir": _option(
        str,
        "spool_dir",
        "A directory for deliveries that the database can't take in time. Default: none.",
    ),
    "app": _option(str, "app", "Your LogtoWebhooks object, as module:name. Its handlers run."),
    "log_format": _option(str, "log_format", "text or json. Default: text."),
    "log_level": _option(str, "log_level", "debug, info, warning or error. Default: info."),
}
DATABASE: Final = ("database_url", "schema")
LOGTO_API: Final = ("endpoint", "app_id", "app_secret", "api_resource")


def with_settings(*fields: str) -> Callable[[Command], Callable[..., None]]:
    """Add an option for each of these settings to a command, and `--env-file`.

    The command gets the `Settings` first, then its own arguments. `--env-file` is passed on only
    if the command has a parameter `env_file` itself.
    """

    def add_options(command: Command) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        annotations = {field: OPTIONS[field] for field in fields}
        if not any(parameter.name == "env_file" for parameter in own):
            annotations["env_file"] = EnvFile
        added = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            settings = read_settings(values["env_file"], **{name: values[name] for name in fields})
            command(settings, **{parameter.name: values[parameter.name] for parameter in own})

        cast(Any, run).__signature__ = Signature([*own, *added])
        return run

    return add_options


def read_settings(env_file: Path | None, **options: Any) -> Settings:
    """Read the settings: options, then the environment, then the file. Raises SettingInvalid."""
    file = env_file or Path(".env")
    values = envfile.read(file) if file.is_file() else {}
    environment = {name: value for name, value in os.environ.items() if value}
    # A secret in the environment, or in a file that it names, wins over the line in `.env`.
    for file_variable, name in FILE_VARIABLES.items():
        if name in environment or file_variable in environment:
            values = {
                key: value for key, value in values.items() if key not in (name, file_variable)
            }
    places = {name: str(file) for name in values.keys() - environment.keys()}
    settings = from_env(values | environment, places=places, option=True, **options)
    _warn_of_secrets(options)
    return settings


def _warn_of_secrets(options: dict[str, Any]) -> None:
    """Warn that the list of processes shows options."""
    for name in ("signing_key", "app_secret"):
        if options.get(name):
            variable = VARIABLES[name][0]
            output.warn(
                f"everybody on this machine can read --{name.replace('_', '-')} with `ps`. Set "
                f"{variable} instead, or set {variable}{FILE} to a file that holds it."
            )


_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_moment(name: str, value: str | None, now: datetime) -> int | None:
    """Parse a time, or how long ago it was, to Unix milliseconds. Raises SettingInvalid."""
    if value is None:
        return None
    ago = re.fullmatch(r"(\d{1,6})([mhd])", value)
    try:
        if ago:
            return to_millis(now - timedelta(**{_UNITS[ago[2]]: int(ago[1])}))
        return to_millis(datetime.fromisoformat(value))
    except (ValueError, OverflowError):
        problem = f"{value!r} is neither a time such as 2026-11-24T08:00Z nor 90m, 36h or 7d"
        raise SettingInvalid(name=name, problem=problem) from None


def parse_duration(name: str, value: str) -> int:
    """Parse `30s`, `10m`, `2h` or `1d` to seconds. Raises SettingInvalid."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", value)
    if not match:
        raise SettingInvalid(name=name, problem=f"{value!r} isn't like 30s, 10m, 2h or 1d")
    return round(timedelta(**{_UNITS[match[2]]: int(match[1])}).total_seconds())


def check_printable(name: str, value: str | None) -> str | None:
    """Return text that a database can look for. Raises SettingInvalid."""
    return None if value is None else check_text(name, value)


def parse_subject(value: str | None) -> str | None:
    """Check `user:ID` and the like. Raises SettingInvalid."""
    if value is not None and not re.fullmatch(r"[a-z-]+:.+", value, re.DOTALL):
        raise SettingInvalid(name="--subject", problem=f"{value!r} isn't like user:ID")
    return check_printable("--subject", value)


def check_url(name: str, value: str) -> str:
    """Check a URL that you can post to. Raises SettingInvalid."""
    if not is_url(value):
        problem = f"{value!r} isn't like http://127.0.0.1:8787/path"
        raise SettingInvalid(name=name, problem=problem)
    return value


def warn_about_event(event: str | None) -> None:
    """Warn of an event name that this release doesn't know."""
    known = [*BY_NAME, *LOCAL]
    if event is not None and event not in known:
        output.warn(f"no event {event!r} is known to this release; {nearest(event, known)}.")
