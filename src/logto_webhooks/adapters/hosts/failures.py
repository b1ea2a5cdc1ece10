"""What a database's exception means: wait, or a row that it will never take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import exc

from logto_webhooks.errors import LogtoWebhooksError, RowRejected, StoreUnavailable

# The classes of SQLSTATE that blame a row: bad data, a constraint, a limit of the program.
_OF_A_ROW: Final = ("22", "23", "54")
_NO_DATABASE: Final = "3D000"


@contextmanager
def translated() -> Iterator[None]:
    """Turn what SQLAlchemy and its drivers raise into StoreUnavailable or RowRejected.

    The text is the driver's first line; or the error's name, where that may quote a row.
    Drivers raise some errors of connecting bare, so those are known by their SQLSTATE.
    """
    try:
        yield
    except LogtoWebhooksError:
        raise
    except exc.TimeoutError as error:
        raise StoreUnavailable(problem="no connection is free") from error
    except exc.DBAPIError as error:
        raise _meaning(error.orig or error, error) from error
    except exc.StatementError as error:
        raise RowRejected(problem=type(error.orig or error).__name__) from error
    except (OSError, TimeoutError) as error:
        raise StoreUnavailable(problem=_first_line(error)) from error
    except Exception as error:
        if not hasattr(error, "sqlstate"):
            raise
        raise _meaning(error, error) from error


def _meaning(cause: BaseException, error: Exception) -> StoreUnavailable | RowRejected:
    sqlstate = getattr(cause, "sqlstate", None)
    of_a_row = isinstance(error, exc.DataError | exc.IntegrityError)
    if sqlstate:
        of_a_row = str(sqlstate).startswith(_OF_A_ROW)
    if of_a_row:
        return RowRejected(problem=type(cause).__name__)
    hint = "; make it, then run: logto-webhooks migrate" if sqlstate == _NO_DATABASE else ""
    return StoreUnavailable(problem=f"{_first_line(cause)}{hint}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
