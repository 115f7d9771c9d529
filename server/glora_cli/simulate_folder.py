"""The folder that a simulation writes into: made and tried out before anything runs; what is said where it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from glora_wire.errors import GloraError, Reason

_ADVICE: Final = "name a folder with --out that can be written and has room"


def prepare_folder(folder: Path) -> None:
    """Make the folder where it is missing and try it out; raises REQUEST_INVALID saying what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise _unusable(folder, "is not a folder") from None
    except OSError as error:
        raise _unusable(folder, f"cannot be made ({error.strerror})") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"glora")
    except OSError as error:
        raise _unusable(folder, f"cannot be written ({error.strerror})") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the file system inside, told with the folder of the file; raises REQUEST_INVALID saying what to do."""
    try:
        yield
    except OSError as error:
        raise _unusable(path.parent, f"cannot be written ({path.name}: {error.strerror})") from error


def _unusable(folder: Path, what: str) -> GloraError:
    return GloraError(Reason.REQUEST_INVALID, f"{folder} {what}; {_ADVICE}.", folder=folder)
