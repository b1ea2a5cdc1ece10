"""`doctor` as a method, and what it looks at, put together."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from logto_webhooks.adapters import private_files
from logto_webhooks.core.admin import signs_of_admin
from logto_webhooks.core.doctor.address import LIMIT_S, Probed
from logto_webhooks.core.doctor.findings import Finding
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.service import doctor
from logto_webhooks.service.doctor.facts import Patient
from logto_webhooks.service.handlers import Handlers
from logto_webhooks.settings import VARIABLES, Settings
from logto_webhooks.wiring.api import api_of, keys_of
from logto_webhooks.wiring.clock import SystemClock
from logto_webhooks.wiring.databases import Database
from logto_webhooks.wiring.spool import spool_of

TIMEOUT_S: Final = 30.0
LEAST_FREE_MB: Final = 1_024
_WAIT_S: Final = 0.2  # before Logto is asked again: somebody waits for the answer
_CREDENTIALS: Final = ("endpoint", "app_id", "app_secret")


class Examined(ABC):
    """What has settings, a database and handlers."""

    handlers: Handlers
    _settings: Callable[[], Settings]

    @property
    @abstractmethod
    def _database_setting(self) -> str:
        """The name of the setting that the database's URL came from."""

    @property
    @abstractmethod
    def database(self) -> Database:
        """The database. Raises SettingInvalid."""

    async def diagnose(
        self,
        only: Sequence[str] = (),
        *,
        timeout_s: float = TIMEOUT_S,
        least_free_mb: int = LEAST_FREE_MB,
        application: Examined | None = None,
        files: Sequence[Path] = (),
    ) -> list[Finding]:
        """Look at both sides, and tell what is wrong and what to do, check by check.

        Of `only` some checks, with those that they build on; each may take `timeout_s`.
        `application` is one whose handlers run here, so that its database should be this one;
        `files` are others than the database's that hold a secret.
        Raises SettingInvalid for a name that is no check's.
        """
        settings = self._settings()
        patient = Patient(
            keys=keys_of(settings),
            public_url=settings.public_url,
            local_url=settings.url_at(settings.port),
            path=settings.path,
            recover_every_s=settings.recover_every_s,
            least_free_mb=least_free_mb,
            spooled=spool.count() if (spool := spool_of(settings)) else 0,
            missing=[VARIABLES[name][0] for name in _CREDENTIALS if not getattr(settings, name)],
            signs_of_admin=signs_of_admin(settings.endpoint, settings.app_id),
            open=lambda: self.database,
            database_setting=self._database_setting,
            open_files=lambda: _too_open([*files, *self._files()]),
            ask=partial(api_of, settings, longest_wait_s=_WAIT_S),
            post=partial(_post, limit_s=min(LIMIT_S, timeout_s / 2)),
            clock=SystemClock(),
            handlers=[each.registered for each in self.handlers] or None,
            databases=None if application is None else partial(_places, self, application),
        )
        return await doctor.diagnose(patient, only, timeout_s)

    def _files(self) -> Sequence[Path]:
        try:
            return self.database.files
        except SettingInvalid:
            return ()  # the check of the database says so


def _too_open(files: Iterable[Path]) -> dict[str, str]:
    modes = {str(file): private_files.too_open(file) for file in files}
    return {path: mode for path, mode in modes.items() if mode}


async def _post(url: str, limit_s: float) -> Probed:
    # Here, for it needs an HTTP client, which an application doesn't.
    from logto_webhooks.adapters import probe

    return await probe.post(url, limit_s)


def _places(ours: Examined, theirs: Examined) -> tuple[str, str]:
    return _place(ours.database), _place(theirs.database)


def _place(database: Database) -> str:
    """Where a database is, whoever asks it, and by whichever driver."""
    _, separator, rest = database.name.partition("://")
    if not separator:
        return str(Path(database.name).resolve())
    hosts, _, name = rest.rpartition("/")
    return f"{','.join(_with_port(each) for each in hosts.split(','))}/{name}"


def _with_port(host: str) -> str:
    return host if re.search(r"[^:\]]:[0-9]+$|\]:[0-9]+$", host) else f"{host}:5432"
