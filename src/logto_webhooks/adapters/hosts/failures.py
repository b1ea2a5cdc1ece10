"""What a database's exception means: wait, or a row that it will never take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import sqlalchemy as sa
from sqlalchemy import exc

from logto_webhooks.errors import LogtoWebhooksError, RowRejected, StoreUnavailable, TimedOut

# The classes of SQLSTATE that blame a row: bad data, a constraint, a limit of the program.
_OF_A_ROW: Final = ("22", "23", "54")
# A lock or a statement took longer than it may; what else is done in the same way can succeed.
_TIMED_OUT: Final = ("55P03", "57014")
_URL: Final = "LOGTO_WEBHOOKS_DATABASE_URL"
# What stands in a SQLSTATE and a text -> what to do. Of connecting, psycopg tells no SQLSTATE.
_HINTS: Final = (
    ("^3D000|database .* does not exist", "make it, then run: logto-webhooks migrate"),
    ("^28|role .* does not exist|authentication failed", f"mend user and password in {_URL}"),
    ("resolve|not known", f"mend the host in {_URL}"),
    ("refused|Connect call|No such file", f"see that the server runs, and what {_URL} is"),
    ("not a database", f"name another file in {_URL}"),
    ("is locked", "end who holds it, or wait; fuser tells who"),
)


@contextmanager
def translated(url: sa.URL) -> Iterator[None]:
    """Turn what SQLAlchemy and its drivers raise into StoreUnavailable or RowRejected.

    The text is the driver's first line, with the place of the URL, and what to do if that is known;
    or the error's name, where that may quote a row. Drivers raise some errors of connecting bare,
    so those are known by their SQLSTATE.
    """
    try:
        yield
    except LogtoWebhooksError:
        raise
    except exc.TimeoutError as error:
        raise StoreUnavailable(problem="no connection is free") from error
    except exc.DBAPIError as error:
        raise _meaning(error.orig or error, error, url) from error
    except exc.StatementError as error:
        raise RowRejected(problem=type(error.orig or error).__name__) from error
    except OverflowError as error:  # a number that SQLite's driver can't pass on
        raise RowRejected(problem="a number is too large") from error
    except (OSError, TimeoutError) as error:
        raise _unavailable(error, url) from error
    except Exception as error:
        if not hasattr(error, "sqlstate"):
            raise
        raise _meaning(error, error, url) from error


def _meaning(cause: BaseException, error: Exception, url: sa.URL) -> StoreUnavailable | RowRejected:
    sqlstate = getattr(cause, "sqlstate", None)
    of_a_row = isinstance(error, exc.DataError | exc.IntegrityError)
    if sqlstate:
        of_a_row = str(sqlstate).startswith(_OF_A_ROW)
    if of_a_row:
        return RowRejected(problem=type(cause).__name__)
    return _unavailable(cause, url)


def _unavailable(cause: BaseException, url: sa.URL) -> StoreUnavailable:
    told = _first_line(cause)
    coded = f"{getattr(cause, 'sqlstate', None) or ''} {told}"
    hint = next((f"; {do}" for sign, do in _HINTS if re.search(sign, coded)), "")
    kind = TimedOut if getattr(cause, "sqlstate", None) in _TIMED_OUT else StoreUnavailable
    return kind(problem=f"{told} ({_place(url)}){hint}")


def _place(url: sa.URL) -> str:
    """The URL without who asks, and without options: either may hold a secret."""
    backend = url.get_backend_name()
    bare = sa.URL.create(backend, host=url.host, port=url.port, database=url.database)
    return bare.render_as_string()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
