"""Settings: frozen, made from a mapping; the only reader of the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypedDict, get_args

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.adapters.observers.logs import LogFormat, LogLevel
from logto_webhooks.core.lifecycle import MAX_ATTEMPTS
from logto_webhooks.core.projection import LAG_MS
from logto_webhooks.errors import SettingInvalid, SigningKeyMissing

DEFAULT_DATABASE: Final = "sqlite:///logto-webhooks.db"

# Field -> the variables that set it, the first that is there wins.
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
    "endpoint": ("LOGTO_ENDPOINT",),
    "app_id": ("LOGTO_M2M_APP_ID",),
    "app_secret": ("LOGTO_M2M_APP_SECRET",),
    "api_resource": ("LOGTO_WEBHOOKS_API_RESOURCE",),
    "api_budget": ("LOGTO_WEBHOOKS_API_BUDGET",),
    "recover_every_s": ("LOGTO_WEBHOOKS_RECOVER_EVERY_S",),
    "reconcile_every_s": ("LOGTO_WEBHOOKS_RECONCILE_EVERY_S",),
    "silence_after_s": ("LOGTO_WEBHOOKS_SILENCE_AFTER_S",),
    "public_url": ("LOGTO_WEBHOOKS_PUBLIC_URL",),
    "app": ("LOGTO_WEBHOOKS_APP",),
    "log_format": ("LOGTO_WEBHOOKS_LOG_FORMAT",),
    "log_level": ("LOGTO_WEBHOOKS_LOG_LEVEL",),
}

_CHOICES: Final = {
    "log_format": " or ".join(get_args(LogFormat)),
    "log_level": ", ".join(get_args(LogLevel)),
    "path": "a path such as /api/webhooks/logto",
    "endpoint": "the address of a Logto, such as https://auth.example.com",
    "app": "module:name, such as app.logto:logto",
    "port": "a number from 0 to 65535",
    "schema": "letters (a to z), digits and _, at most 63, the first of them no digit",
}
_TYPES: Final = {"bool": "true or false", "int": "a whole number", "float": "a number"}


class Settings(Struct, frozen=True, kw_only=True):
    """All that can be set.

    `signing_key` is one key of a hook, or several separated by commas. `lag_ms` is how much
    older than its dispatch a change may be for which Logto tells no time. Without `worker`, the
    service only receives, and a process of its own must apply. `api_budget` is how many requests
    a second Logto's Management API may be asked; `public_url` is where Logto reaches the webhook.
    """

    signing_key: str = ""
    database_url: str = DEFAULT_DATABASE
    schema: Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]{0,62}$")] | None = None
    worker: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8787
    path: Annotated[str, Meta(pattern=r"\A/[\w.~/-]*[\w.~-]/?\Z")] = "/api/webhooks/logto"
    max_body_bytes: Annotated[int, Meta(ge=1)] = 8 * 2**20
    max_attempts: Annotated[int, Meta(ge=1)] = MAX_ATTEMPTS
    lag_ms: Annotated[int, Meta(ge=0)] = LAG_MS
    endpoint: Annotated[str, Meta(pattern=r"\Ahttps?://[^/?#@\s]+/?\Z")] | None = None
    app_id: str | None = None
    app_secret: str | None = None
    api_resource: str | None = None
    api_budget: Annotated[float, Meta(gt=0)] | None = None
    recover_every_s: Annotated[int, Meta(ge=1)] = 300
    reconcile_every_s: Annotated[int, Meta(ge=0)] = 86_400
    silence_after_s: Annotated[int, Meta(ge=0)] | None = None
    public_url: str | None = None
    app: Annotated[str, Meta(pattern=r"\A[\w.]+:[\w.]+\Z")] | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"

    @property
    def signing_keys(self) -> tuple[str, ...]:
        """The keys, at least one. Raises SigningKeyMissing."""
        keys = tuple(key.strip() for key in self.signing_key.split(",") if key.strip())
        if not keys:
            raise SigningKeyMissing()
        if any(not key.isprintable() for key in keys):
            name = VARIABLES["signing_key"][0]
            raise SettingInvalid(name=name, problem="it holds characters that no key has")
        return keys

    def url_at(self, port: int) -> str:
        """Where `serve` takes deliveries, once it listens on a port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}{self.path}"

    def __repr__(self) -> str:
        """Without the key and the database's password."""
        return f"Settings(host={self.host!r}, port={self.port}, path={self.path!r})"


class MountedSettings(TypedDict, total=False):
    """What can be set, by these names, where an application mounts the package."""

    schema: str | None
    worker: bool
    max_body_bytes: int
    max_attempts: int
    lag_ms: int
    endpoint: str | None
    app_id: str | None
    app_secret: str | None
    api_resource: str | None
    api_budget: float | None
    recover_every_s: int
    reconcile_every_s: int
    silence_after_s: int | None
    public_url: str | None


def from_env(environment: Mapping[str, str], **given: Any) -> Settings:
    """Read settings from `environment`; what is `given` (and not None) wins.

    Raises SettingInvalid, which names the variable, and TypeError for a name that is none.
    """
    if unknown := sorted(given.keys() - VARIABLES.keys()):
        raise TypeError(f"there is no setting {unknown[0]!r}")
    values: dict[str, Any] = {}
    for field, variables in VARIABLES.items():
        found = [environment[name] for name in variables if environment.get(name)]
        if found:
            values[field] = found[0]
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        allowed = _CHOICES.get(field) or _allowed(problem)
        problem = f"it must be {allowed}" if allowed else problem.lower()
        name = f"{VARIABLES[field][0]} (--{field.replace('_', '-')})"
        raise SettingInvalid(name=name, problem=problem) from None


def _allowed(problem: str) -> str | None:
    """What msgspec expected, in words, if it says that."""
    found = re.match(r"Expected `(\w+)(?: \| null)?`([^,]*)", problem)
    return f"{_TYPES[found[1]]}{found[2]}" if found and found[1] in _TYPES else None
