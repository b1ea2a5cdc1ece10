"""What a database's exception means: wait, or a row that it will never take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exc

from logto_webhooks.errors import RowRejected, StoreUnavailable


@contextmanager
def translated() -> Iterator[None]:
    """Turn SQLAlchemy's errors into StoreUnavailable or RowRejected.

    The text is the driver's own, or the error's name where that may quote a row.
    """
    try:
        yield
    except (exc.DataError, exc.IntegrityError) as error:
        raise RowRejected(problem=type(error.orig or error).__name__) from error
    except exc.DBAPIError as error:
        raise StoreUnavailable(problem=_first_line(error.orig or error)) from error
    except exc.TimeoutError as error:
        raise StoreUnavailable(problem="no connection is free") from error
    except exc.StatementError as error:
        raise RowRejected(problem=type(error.orig or error).__name__) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
