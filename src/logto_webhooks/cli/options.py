"""The options of commands: one for each setting, and shared ones."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Concatenate, Final, cast

from dotenv.parser import Binding, Original, parse_stream
from typer import Option

from logto_webhooks.cli import output
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.events import BY_NAME
from logto_webhooks.events.base import to_millis
from logto_webhooks.events.local import LOCAL
from logto_webhooks.settings import (
    FILE,
    FILE_VARIABLES,
    VARIABLES,
    Settings,
    find_meant,
    from_env,
    list_unknown,
)
from logto_webhooks.validation import GREATEST_ID, check_text, is_url, nearest

Command = Callable[Concatenate[Settings, ...], None]


def _check_file(path: Path | None) -> Path | None:
    if path is not None and not path.exists():
        raise SettingInvalid(name="--env-file", problem=f"there is no file {path}")
    return path


def check_event(event: str | None) -> str | None:
    """Check that a database can search for an event's name. Raises SettingInvalid."""
    return None if event is None else check_text("--event", event)


def check_subject(subject: str | None) -> str | None:
    """Check a subject such as `user:ID`. Raises SettingInvalid."""
    if subject is None:
        return None
    if not re.fullmatch(r"[a-z-]+:.+", subject, re.DOTALL):
        raise SettingInvalid(name="--subject", problem=f"{subject!r} must look like user:ID")
    return check_text("--subject", subject)


EnvFile = Annotated[
    Path | None,
    Option(help="Read settings from this file. Default: .env, if it exists.", callback=_check_file),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would change without changing it.")]
Limit = Annotated[int, Option(min=1, help="Show at most this many results.")]
After = Annotated[
    int | None, Option(min=1, max=GREATEST_ID, help="Show the next page, after this ID.")
]
ExitAfter = Annotated[int | None, Option(min=1, help="Exit after this many deliveries.")]
Event = Annotated[
    str | None, Option(help="Only this event, such as User.Created.", callback=check_event)
]
Subject = Annotated[
    str | None,
    Option(help="Only this record: user:ID, organization:ID, …", callback=check_subject),
]

_SETTINGS: Final[dict[str, tuple[Any, str]]] = {
    "signing_key": (str, "The webhook's signing key, or several keys, separated by commas."),
    "database_url": (str, "The database's URL. Default: sqlite:///logto-webhooks.db."),
    "schema": (str, "The PostgreSQL schema of the tables. Default: the connection's default."),
    "worker": (bool, "Apply deliveries in this process. Default: yes."),
    "host": (str, "The address to listen on. Default: 127.0.0.1."),
    "port": (int, "The port to listen on. Default: 8787."),
    "path": (str, "The webhook's path. Default: /api/webhooks/logto."),
    "max_body_bytes": (int, "The largest request body, in bytes. Default: 8388608 (8 MiB)."),
    "max_attempts": (int, "Attempts before a failing delivery is dead. Default: 8."),
    "lag_ms": (
        int,
        "How long before its webhook a change may have happened, in milliseconds. Default: 100.",
    ),
    "replay_window_s": (
        int,
        "Run no handlers for deliveries older than this, in seconds. Default: 604800 (a week). 0 "
        "disables the limit.",
    ),
    "endpoint": (str, "Logto's address, such as https://auth.example.com."),
    "app_id": (str, "The ID of the machine-to-machine application."),
    "app_secret": (str, "The secret of the machine-to-machine application."),
    "api_resource": (
        str,
        "The Management API's resource indicator. Default: derived from --endpoint.",
    ),
    "api_budget": (
        float,
        "Requests per second to the Management API. Default: 15. For backfill, 20 on Logto Cloud, "
        "and no limit elsewhere.",
    ),
    "recover_every_s": (int, "Seconds between two reads of Logto's log. Default: 300."),
    "reconcile_every_s": (
        int,
        "Seconds between two comparisons of all records with Logto. Default: 86400 (a day). 0 "
        "disables them.",
    ),
    "silence_after_s": (
        int,
        "Seconds without a delivery before the silence alarm. Default: learned from usual traffic. "
        "0 disables the alarm.",
    ),
    "public_url": (str, "The URL at which Logto reaches the webhook."),
    "spool_dir": (
        str,
        "A directory for deliveries that the database can't store in time. Default: none.",
    ),
    "app": (str, "Your LogtoWebhooks object with its handlers, as module:name."),
    "map_file": (
        str,
        "The file with your mapped tables. Default: logto-webhooks.toml, if it exists.",
    ),
    "log_format": (str, "The log's format: text or json. Default: text."),
    "log_level": (str, "The log's level: debug, info, warning or error. Default: info."),
}
OPTIONS: Final[dict[str, Any]] = {
    field: Annotated[
        type | None, Option(help=f"{text} [{', '.join(VARIABLES[field])}]", show_default=False)
    ]
    for field, (type, text) in _SETTINGS.items()
}
DATABASE: Final = ("database_url", "schema")
LOGS: Final = ("log_format", "log_level")
LOGTO_API: Final = ("endpoint", "app_id", "app_secret", "api_resource")


def with_settings(*fields: str) -> Callable[[Command], Callable[..., None]]:
    """Add `--env-file` and an option for each of these settings to a command.

    The command gets the `Settings` first, then its own arguments. It gets `--env-file` only if it
    has a parameter `env_file`.
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
    """Read settings: options override the environment, then the file. Raises SettingInvalid."""
    file = env_file or Path(".env")
    values = read_env_file(file, warn=True) if file.exists() else {}
    environment = {name: value for name, value in os.environ.items() if value}
    for unknown in list_unknown(environment):
        output.warn(unknown)
    # A secret in the environment, or in a file that it names, overrides the one in `.env`.
    for file_variable, name in FILE_VARIABLES.items():
        if name in environment or file_variable in environment:
            values.pop(name, None)
            values.pop(file_variable, None)
    places = {name: str(file) for name in values.keys() - environment.keys()}
    settings = from_env(values | environment, places=places, option=True, **options)
    for field in ("signing_key", "app_secret"):
        if options.get(field):
            variable = VARIABLES[field][0]
            output.warn(
                f"all users of this machine can see --{field.replace('_', '-')} with `ps`. Set "
                f"{variable} instead, or set {variable}{FILE} to a file that contains it."
            )
    return settings


logging.getLogger("dotenv").setLevel(logging.ERROR)  # its warnings don't name the file


def read_env_file(file: Path, *, warn: bool) -> dict[str, str]:
    """Read `.env`, and `warn` about lines that have no effect. Raises SettingInvalid."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            bindings = list(parse_stream(lines))
    except OSError as error:
        problem = f"it can't be read ({error.strerror})"
        raise SettingInvalid(name=str(file), problem=problem) from None
    except ValueError:
        raise SettingInvalid(name=str(file), problem="it isn't a UTF-8 text file") from None
    for binding in bindings if warn else ():
        _check_binding(file, binding)
    return {binding.key: binding.value or "" for binding in bindings if binding.key}


def _check_binding(file: Path, binding: Binding) -> None:
    if binding.error:
        line = f"{file}, line {_find_line_number(binding.original)}"
        output.warn(f"{line} is ignored, because it isn't of the form NAME=value.")
    elif binding.key and (meant := find_meant(binding.key)):
        output.warn(f"{file}: unknown setting {binding.key}. Did you mean {meant}?")


def _find_line_number(original: Original) -> int:
    before, _, _ = original.string.partition(original.string.strip())  # it includes blank lines
    return original.line + before.count("\n")


_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_moment(name: str, value: str | None) -> int | None:
    """Parse a time, or how long ago it was, as Unix milliseconds. Raises SettingInvalid."""
    if value is None:
        return None
    ago = re.fullmatch(r"(\d{1,6})([mhd])", value)
    try:
        if ago:
            return to_millis(datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])}))
        return to_millis(datetime.fromisoformat(value))
    except (ValueError, OverflowError):
        problem = f"{value!r} is neither a time such as 2026-11-24T08:00Z nor 90m, 36h or 7d"
        raise SettingInvalid(name=name, problem=problem) from None


def parse_duration(name: str, value: str) -> int:
    """Parse `30s`, `10m`, `2h` or `1d` as seconds. Raises SettingInvalid."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", value)
    if not match:
        raise SettingInvalid(name=name, problem=f"{value!r} must look like 30s, 10m, 2h or 1d")
    return round(timedelta(**{_UNITS[match[2]]: int(match[1])}).total_seconds())


def check_url(name: str, value: str, example: str = "http://127.0.0.1:8787/path") -> str:
    """Check that a text is an HTTP URL. Raises SettingInvalid."""
    if not is_url(value):
        problem = f"{value!r} must look like {example}"
        raise SettingInvalid(name=name, problem=problem)
    return value


def warn_about_event(event: str | None) -> None:
    """Warn about an unknown event name."""
    names = [*BY_NAME, *LOCAL]
    if event is not None and event not in names:
        output.warn(f"this release doesn't know the event {event!r}; {nearest(event, names)}.")
