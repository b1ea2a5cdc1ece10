"""For tests: deliveries made and signed, an application without a server, a still clock.

>>> from logto_webhooks import testing
>>> app = testing.App()
>>> app.deliver(testing.make.user_created(email="ana@example.com")).outcome
'applied'
>>> app.users("ana@example.com")[0].row["email"]
'ana@example.com'
"""

from logto_webhooks.samples.signed import Signed
from logto_webhooks.testing import make
from logto_webhooks.testing.apps import App, app
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.inline import AsyncApp
from logto_webhooks.testing.make import SIGNING_KEY
from logto_webhooks.testing.outcomes import Delivered, Run

__all__ = [
    "SIGNING_KEY",
    "App",
    "AsyncApp",
    "Delivered",
    "FrozenClock",
    "Run",
    "Signed",
    "app",
    "make",
]
