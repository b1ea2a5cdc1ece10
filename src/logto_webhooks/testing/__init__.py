"""For tests: signed deliveries, an application without a server, and a frozen clock.

>>> from logto_webhooks import testing
>>> app = testing.App()
>>> app.deliver(testing.make.user_created(email="ana@example.com")).outcome
'applied'
>>> app.users("ana@example.com")[0].row["email"]
'ana@example.com'
"""

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from logto_webhooks.testing.app import App, AsyncApp, DeliveryResult, HandlerCall, app
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.make import SIGNING_KEY

__all__ = [
    "SIGNING_KEY",
    "App",
    "AsyncApp",
    "DeliveryResult",
    "FrozenClock",
    "HandlerCall",
    "SignedRequest",
    "app",
    "make",
]
