"""Settings, read from environment variables, files and options."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, TypedDict, get_args

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.errors import SettingInvalid, SigningKeyMissing
from logto_webhooks.instrumentation.logs import LogFormat, LogLevel
from logto_webhooks.records.changes import LAG_MS
from logto_webhooks.retries import MAX_ATTEMPTS
from logto_webhooks.signing_keys import problem_of_key, problem_of_secret

DEFAULT_DATABASE: Final = "sqlite:///logto-webhooks.db"

# Field -> its variables. The first one that is set wins.
VARIABLES: Final[dict[str, tuple[str, ...]]] = {
    "signing_key": ("LOGTO_WEBHOOK_SIGNING_KEY",),
    "database_url": ("LOGTO_WEBHOOKS_DATABASE_URL", "DATABASE_URL"),
    "schema": ("LOGTO_WEBHOOKS_SCHEMA",),
    "worker": ("LOGTO_WEBHOOKS_WORKER",),
    "host": ("LOGTO_WEBHOOKS_HOST",),
    "port": ("LOGTO_WEBHOOKS_PORT",),
    "path": ("LOGTO_WEBHOOKS_PATH",),
    "max_body_bytes": ("LOGTO_WEBHOOKS_MAX_BODY_BYTES",),
    "max_attempts": ("LOGTO_WEBHOOKS_MAX_ATTEMPTS",),
    "lag_ms": ("LOGTO_WEBHOOKS_LAG_MS",),
    "replay_window_s": ("LOGTO_WEBHOOKS_REPLAY_WINDOW_S",),
    "endpoint": ("LOGTO_ENDPOINT",),
    "app_id": ("LOGTO_M2M_APP_ID",),
    "app_secret": ("LOGTO_M2M_APP_SECRET",),
    "api_resource": ("LOGTO_WEBHOOKS_API_RESOURCE",),
    "api_budget": ("LOGTO_WEBHOOKS_API_BUDGET",),
    "recover_every_s": ("LOGTO_WEBHOOKS_RECOVER_EVERY_S",),
    "reconcile_every_s": ("LOGTO_WEBHOOKS_RECONCILE_EVERY_S",),
    "silence_after_s": ("LOGTO_WEBHOOKS_SILENCE_AFTER_S",),
    "public_url": ("LOGTO_WEBHOOKS_PUBLIC_URL",),
    "spool_dir": ("LOGTO_WEBHOOKS_SPOOL_DIR",),
    "app": ("LOGTO_WEBHOOKS_APP",),
    "map_file": ("LOGTO_WEBHOOKS_MAP_FILE",),
    "log_format": ("LOGTO_WEBHOOKS_LOG_FORMAT",),
    "log_level": ("LOGTO_WEBHOOKS_LOG_LEVEL",),
}

CREDENTIALS: Final = ("endpoint", "app_id", "app_secret")  # for the Management API
# A variable with the suffix names a file with the secret.
SECRETS: Final = ("signing_key", "database_url", "app_secret")
FILE: Final = "_FILE"
FILE_VARIABLES: Final = {f"{name}{FILE}": name for field in SECRETS for name in VARIABLES[field]}
_KNOWN: Final = (*chain(*VARIABLES.values()), *FILE_VARIABLES)
_OF_TESTS: Final = "LOGTO_WEBHOOKS_TEST_"
# How an unknown name begins -> how much it must be like a setting's. Others are of Logto's SDKs.
_LIKENESS: Final = {
    "LOGTO_WEBHOOKS_": 0.0,
    "LOGTO_WEBHOOK_": 0.0,
    "LOGTO_M2M_": 0.74,
    "LOGTO_": 0.92,
}
# What Kubernetes sets in each container for a Service with a name such as logto-webhooks-db.
_OF_KUBERNETES: Final = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_|=(tcp|udp)://")
_LARGEST_SECRET: Final = 64 * 2**10

_PORT: Final = "[1-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_HOST: Final = rf"(\[[0-9A-Fa-f:.]+\]|[^/?#@:\[\]\s]+)(:({_PORT}))?"  # and its port
_LEAST_BODY: Final = 64 * 2**10  # what Logto sends about an ordinary record is smaller
_CHOICES: Final = {
    "log_format": " or ".join(get_args(LogFormat)),
    "log_level": f"one of {', '.join(get_args(LogLevel))}",
    "path": "a path such as /api/webhooks/logto",
    "endpoint": "Logto's address, such as https://auth.example.com",
    "api_resource": "a URL such as https://tenant.logto.app/api",
    "public_url": "a URL such as https://webhooks.example.com/api/webhooks/logto",
    "app": "module:name, such as app.logto:logto",
    "port": "a number from 0 to 65535",
    "schema": "at most 63 letters (a to z), digits and _, and must not begin with a digit",
}
_TYPES: Final = {"bool": "true or false", "int": "a whole number", "float": "a number"}


class Settings(Struct, frozen=True, kw_only=True):
    """All settings.

    `signing_key` is one key of a webhook, or several separated by commas. `lag_ms` is how long
    before its webhook a change may have happened, if Logto doesn't send the time. Without `worker`,
    the service only receives, and another process must apply deliveries. `api_budget` is the number
    of requests per second to the Management API. `public_url` is where Logto reaches the webhook.
    `spool_dir` is a directory for deliveries that the database can't take in time. `map_file` is a
    file with mapped tables, which commands read.
    """

    signing_key: str = ""
    database_url: str = DEFAULT_DATABASE
    schema: Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]{0,62}$")] | None = None
    worker: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8787
    path: Annotated[str, Meta(pattern=r"\A/[\w.~/-]*[\w.~-]/?\Z")] = "/api/webhooks/logto"
    max_body_bytes: Annotated[int, Meta(ge=_LEAST_BODY)] = 8 * 2**20
    max_attempts: Annotated[int, Meta(ge=1)] = MAX_ATTEMPTS
    lag_ms: Annotated[int, Meta(ge=0)] = LAG_MS
    replay_window_s: Annotated[int, Meta(ge=0, le=10**9)] = 604_800
    endpoint: Annotated[str, Meta(pattern=rf"\Ahttps?://{_HOST}/?\Z")] | None = None
    app_id: str | None = None
    app_secret: str | None = None
    api_resource: Annotated[str, Meta(pattern=rf"\Ahttps?://{_HOST}(/\S*)?\Z")] | None = None
    api_budget: Annotated[float, Meta(gt=0)] | None = None
    recover_every_s: Annotated[int, Meta(ge=1)] = 300
    reconcile_every_s: Annotated[int, Meta(ge=0)] = 86_400
    silence_after_s: Annotated[int, Meta(ge=0)] | None = None
    public_url: (
        Annotated[str, Meta(pattern=rf"\Ahttps?://([^/?#@\s]+@)?{_HOST}([/?]\S*)?\Z")] | None
    ) = None
    spool_dir: str | None = None
    app: Annotated[str, Meta(pattern=r"\A[\w.]+:[\w.]+\Z")] | None = None
    map_file: str | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    # Field -> the variable, option or argument that set it, even to an empty value. For errors.
    sources: dict[str, str] = {}

    def name_of(self, field: str) -> str:
        """Return the variable, option or argument that set a field, or the variable that can."""
        return self.sources.get(field, VARIABLES[field][0])

    def repeat_options(self, *fields: str) -> str:
        """Return those of these settings that are options of this command, as they are appended to
        another one; "" if none is."""
        options = [
            f" {source} {shlex.quote(getattr(self, field))}"
            for field in fields
            if (source := self.sources.get(field, "")).startswith("--")
        ]
        return "".join(options)

    @property
    def signing_keys(self) -> tuple[str, ...]:
        """The valid keys, at least one. Raises SigningKeyMissing, SettingInvalid."""
        keys = split_keys(self.signing_key)
        if not keys:
            raise SigningKeyMissing(self.sources.get("signing_key"))
        for number, key in enumerate(keys, 1):
            if (problem := problem_of_key(key)) is not None:
                which = f" (key {number} of {len(keys)})" if len(keys) > 1 else ""
                name = f"{self.name_of('signing_key')}{which}"
                raise SettingInvalid(name=name, problem=problem)
        return keys

    @property
    def missing_credentials(self) -> list[str]:
        """The variables that the Management API needs and that aren't set."""
        return [VARIABLES[field][0] for field in CREDENTIALS if not getattr(self, field)]

    @property
    def uses_api(self) -> bool:
        """Whether any credential for the Management API is set. All are needed then."""
        return len(self.missing_credentials) < len(CREDENTIALS)

    def url_at(self, port: int) -> str:
        """Return the URL of the webhook if `serve` listens on this port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}{self.path}"

    def __repr__(self) -> str:
        """Leave out keys and passwords."""
        return f"Settings(host={self.host!r}, port={self.port}, path={self.path!r})"


class MountedSettings(TypedDict, total=False):
    """The settings that you can pass to `LogtoWebhooks`."""

    schema: str | None
    worker: bool
    max_body_bytes: int
    max_attempts: int
    lag_ms: int
    replay_window_s: int
    endpoint: str | None
    app_id: str | None
    app_secret: str | None
    api_resource: str | None
    api_budget: float | None
    recover_every_s: int
    reconcile_every_s: int
    silence_after_s: int | None
    public_url: str | None
    spool_dir: str | None


def split_keys(signing_key: str) -> tuple[str, ...]:
    """Split keys at commas, and drop empty ones."""
    return tuple(key.strip() for key in signing_key.split(",") if key.strip())


def from_env(
    environment: Mapping[str, str],
    /,
    *,
    places: Mapping[str, str] = MappingProxyType({}),
    option: bool = False,
    **values: Any,
) -> Settings:
    """Read settings from `environment`. `values` override it, unless they are None.

    A secret is also read from the file that its variable with `_FILE` names. Errors name what was
    read: `places` has the files that variables were read from, and with `option` the values are a
    command's options. Raises SettingInvalid, and TypeError for an unknown setting.
    """
    if unknown := sorted(values.keys() - VARIABLES.keys()):
        raise TypeError(f"there is no setting {unknown[0]!r}")
    values = {field: value for field, value in values.items() if value is not None}
    sources: dict[str, str] = {}
    for field, variables in VARIABLES.items():
        if field in values:
            sources[field] = _option(field) if option else field
            continue
        for name in variables:
            source, value = _value_of(name, environment, places, field in SECRETS)
            if value:
                values[field] = value
                sources[field] = source
                break
            if value is not None:
                sources.setdefault(field, source)
    secret = values.get("app_secret")
    if isinstance(secret, str) and (problem := problem_of_secret(secret)) is not None:
        raise SettingInvalid(name=sources["app_secret"], problem=problem)
    try:
        return msgspec.convert(values | {"sources": sources}, Settings, strict=False)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        allowed = _CHOICES.get(field) or _allowed(problem)
        problem = f"it must be {allowed}" if allowed else problem.lower()
        raise SettingInvalid(name=sources[field], problem=problem) from None


def list_unknown(environment: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable that is probably a misspelled setting."""
    return [
        f"unknown setting {name} in the environment. Did you mean {meant}?"
        for name, value in environment.items()
        if value and (meant := find_meant(name)) and not _OF_KUBERNETES.search(f"{name}={value}")
    ]


def find_meant(name: str) -> str | None:
    """Return the setting's name that was probably meant; None if this one isn't wrong."""
    if name in _KNOWN or name.startswith(_OF_TESTS):
        return None
    for beginning, likeness in _LIKENESS.items():
        if name.startswith(beginning):
            return next(iter(get_close_matches(name, _KNOWN, n=1, cutoff=likeness)), None)
    return None


def _value_of(
    name: str, environment: Mapping[str, str], places: Mapping[str, str], is_secret: bool
) -> tuple[str, str | None]:
    """Read a variable, or the file that it names; return what was read, and the value."""
    source, file_source = (_locate(variable, places) for variable in (name, f"{name}{FILE}"))
    value, path = environment.get(name), environment.get(f"{name}{FILE}") if is_secret else None
    if value and path:
        raise SettingInvalid(name=file_source, problem=f"{source} is also set; remove one of them")
    return (file_source, _content(file_source, path)) if path else (source, value)


def _locate(variable: str, places: Mapping[str, str]) -> str:
    return f"{variable} in {places[variable]}" if variable in places else variable


def _content(name: str, path: str) -> str:
    """Read a secret from a file, without the line break at its end."""
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(_LARGEST_SECRET + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't a path"
        # Unless there is such a file, the text may be the secret itself.
        is_path = os.path.exists(os.path.expanduser(path))
        file_name = f"the file {path!r}" if is_path else "the file that it names"
        problem = (
            f"{file_name} can't be read ({reason}): it must be the path of a file with the secret"
        )
        raise SettingInvalid(name=name, problem=problem) from None
    if len(content) > _LARGEST_SECRET:
        raise SettingInvalid(name=name, problem=f"the file {path!r} is too large for a secret")
    try:
        secret = content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        problem = f"the file {path!r} isn't UTF-8 text"
        raise SettingInvalid(name=name, problem=problem) from None
    if not secret.strip():
        raise SettingInvalid(name=name, problem=f"the file {path!r} is empty")
    return secret


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _allowed(problem: str) -> str | None:
    """Describe the type that msgspec expected; None if its message has none."""
    match = re.match(r"Expected `(\w+)(?: \| null)?`([^,]*)", problem)
    return f"{_TYPES[match[1]]}{match[2]}" if match and match[1] in _TYPES else None
