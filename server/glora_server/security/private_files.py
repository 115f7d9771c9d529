"""Files that only their owner may read: written whole or not at all, refused when others could have read them."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from glora_wire.errors import GloraError, Reason

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_MAX_BYTES: Final = 64 * 1024


def private_folder(path: Path) -> None:
    """Make the folder (mode 0700) where it is missing; raises DATA_DIR_UNUSABLE."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise unusable(path, "cannot be made", error) from error


def read_private(path: Path) -> bytes | None:
    """The content of the file, None where there is none.

    Raises DATA_DIR_UNUSABLE when it cannot be read, is absurdly large, or when group or others have rights on it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(path, "cannot be read", error) from error
    if mode & _OTHERS:
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"Other users may read or write {path} (mode {mode:04o}), and it holds a secret. "
            f"If nobody has, close it with `chmod 600 {path}`; else delete it and let the server make a new one.",
            path=path,
            mode=f"{mode:04o}",
        )
    if len(content) > _MAX_BYTES:
        raise GloraError(Reason.DATA_DIR_UNUSABLE, f"{path} is too large to be what it should be.", path=path)
    return content


def create_private(path: Path, content: bytes) -> bool:
    """Write a new file (mode 0600, synced); False, changing nothing, where there is one; raises DATA_DIR_UNUSABLE."""
    try:
        draft = _draft(path, content)
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        _sync_folder(path.parent)
    except OSError as error:
        raise unusable(path, "cannot be written", error) from error
    return True


def replace_private(path: Path, content: bytes) -> None:
    """Write the file (mode 0600, synced) in place of what was there, in one step; raises DATA_DIR_UNUSABLE."""
    try:
        _draft(path, content).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unusable(path, "cannot be written", error) from error


def unusable(path: Path, what: str, error: OSError) -> GloraError:
    """The error that says what the operating system said about the path."""
    return GloraError(
        Reason.DATA_DIR_UNUSABLE,
        f"{path} {what}: {error.strerror or error}. Give the user that runs the server the right to read and write "
        "the data folder, or choose another one with --data-dir.",
        path=path,
    )


def _draft(path: Path, content: bytes) -> Path:
    """A synced file beside `path`; O_EXCL and the mode at creation leave no moment in which others can open it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink()
        raise
    return draft


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
