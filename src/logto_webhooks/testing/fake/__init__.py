"""A fake Logto for tests: its API, log and webhooks, over real HTTP on 127.0.0.1."""

from logto_webhooks.testing.fake.log import MadeUsers
from logto_webhooks.testing.fake.log import entry as log_entry
from logto_webhooks.testing.fake.logto import FakeLogto
from logto_webhooks.testing.fake.sender import Faults

__all__ = ["FakeLogto", "Faults", "MadeUsers", "log_entry"]
