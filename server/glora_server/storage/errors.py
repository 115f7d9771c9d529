"""Trouble with the database, in words: which driver errors somebody can act on, and how."""

from __future__ import annotations

import errno
from typing import Final

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from glora_wire.errors import GloraError, Reason

_PG_DISK_FULL: Final = frozenset({"53100"})
_PG_RETRY: Final = frozenset({"40001", "40P01", "55P03"})
"""Serialisation failure, deadlock, lock timeout."""
_PG_AWAY: Final = frozenset({"57P01", "57P02", "57P03"})
"""Shut down by an administrator, crashed, still starting."""
_FULL: Final = ("database or disk is full",)
_LOCKED: Final = ("database is locked", "database table is locked")
_READ_ONLY: Final = ("attempt to write a readonly database", "in a read-only transaction")
_HINTS: Final[tuple[tuple[str, str], ...]] = (
    ("password authentication failed", "Check the user and the password in database.url."),
    ("no password supplied", "Put the password into database.url, or into PGPASSWORD or ~/.pgpass."),
    ("does not exist", "Create it first (createdb, createuser), or correct database.url."),
    ("refused", "Check the host and the port in database.url, and that PostgreSQL is running there."),
    ("translate host name", "Check the host in database.url."),
    ("resolve host", "Check the host in database.url."),
    ("timeout", "Check the host in database.url and the network in between."),
    ("permission denied", "Give the user of database.url the rights on its schema (GRANT CREATE, USAGE)."),
    ("unable to open database file", "Check that the folder of the file exists and may be written by this user."),
    ("file is not a database", "Name another file in database.url, or restore this one from a backup."),
    ("malformed", "The file is damaged; restore it from a backup."),
)


def is_lost(error: DBAPIError) -> bool:
    """Whether the connection is gone, or could not be made (psycopg gives such an error no SQLSTATE)."""
    if error.connection_invalidated or _sqlstate(error) in _PG_AWAY:
        return True
    by_psycopg = type(error.orig).__module__.partition(".")[0] == "psycopg"
    return by_psycopg and isinstance(error, OperationalError) and not _sqlstate(error)


def is_passing(error: DBAPIError) -> bool:
    """Whether the same transaction may succeed when it is tried again."""
    return is_lost(error) or _sqlstate(error) in _PG_RETRY or _says(error, _LOCKED)


def is_full(error: DBAPIError) -> bool:
    """Whether the disk of the database is full."""
    return _sqlstate(error) in _PG_DISK_FULL or _says(error, _FULL)


def is_read_only(error: DBAPIError) -> bool:
    """Whether a change was refused because the database, or the transaction, may only be read."""
    return _says(error, _READ_ONLY)


def kind_of(error: DBAPIError) -> str:
    """The trouble in one word, for counting: full, lost, busy or other."""
    if is_full(error):
        return "full"
    if is_lost(error):
        return "lost"
    return "busy" if is_passing(error) else "other"


def translated(error: DBAPIError, where: str) -> Exception:
    """What to raise instead of `error`: a GloraError where an operator can act, else `error`; `where` is a safe URL."""
    if is_full(error):
        return GloraError(Reason.STORAGE_FULL, f"The disk of the database {where} is full; free some space.")
    if is_read_only(error):
        return GloraError(
            Reason.DATABASE_UNUSABLE,
            f"The database {where} cannot be written; give this user write access to the file and its folder.",
        )
    if is_passing(error):
        return GloraError(Reason.DATABASE_UNUSABLE, f"The database {where} does not answer: {_words(error)}.")
    return error


def unusable(error: Exception, where: str) -> GloraError:
    """What to raise when the database cannot be opened."""
    if isinstance(error, GloraError):
        return error
    if isinstance(error, DBAPIError) and (is_full(error) or is_read_only(error)):
        instead = translated(error, where)
        if isinstance(instead, GloraError):
            return instead
    words = _words(error)
    hint = next((hint for pattern, hint in _HINTS if pattern in words), "Correct database.url or the database.")
    return GloraError(Reason.DATABASE_UNUSABLE, f"The database {where} cannot be opened: {words}. {hint}")


def disk_trouble(error: OSError, where: str) -> Exception:
    """What to raise instead of `error` from the file system: a GloraError where an operator can act, else `error`."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return GloraError(Reason.STORAGE_FULL, f"The disk of {where} is full; free some space.")
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return GloraError(
            Reason.DATA_DIR_UNUSABLE, f"The folder {where} cannot be written; give this user write access to it."
        )
    return error


def _sqlstate(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or "")


def _says(error: DBAPIError, patterns: tuple[str, ...]) -> bool:
    words = str(error.orig)
    return any(pattern in words for pattern in patterns)


def _words(error: Exception) -> str:
    """The driver's own words in one line, without SQL, parameters and links."""
    said = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    if isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError):
        said = said.split("\n(Background", maxsplit=1)[0]
    return " ".join(said.split()).rstrip(".")[:400]
