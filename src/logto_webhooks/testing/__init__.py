"""For tests: deliveries made and signed, an application in memory, a clock that stands still.

>>> from logto_webhooks import testing
>>> app = testing.App()
>>> app.deliver(testing.make.user_created(email="ana@example.com")).outcome
'applied'
>>> app.users("ana@example.com")[0].row["email"]
'ana@example.com'
"""

from logto_webhooks.samples.signed import Signed
from logto_webhooks.testing import make
from logto_webhooks.testing.app import App, Delivered
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.make import SIGNING_KEY

__all__ = ["SIGNING_KEY", "App", "Delivered", "FrozenClock", "Signed", "make"]
