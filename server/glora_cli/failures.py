"""How the command line fails: one sentence on stderr and an exit code that scripts can rely on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final

from glora_wire.errors import GloraError, Kind, Reason

BROKEN: Final = 1
"""Something failed: a run, a check, or glora itself."""
USAGE: Final = 2
"""What was asked for is not possible as it was written."""
REFUSED: Final = 3
"""The server understood and said no."""
UNREACHABLE: Final = 4
"""There was no answer."""
_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141

_BY_REASON: Final = {
    Reason.BASE_MODEL_MISSING: USAGE,
    Reason.DATA_DIR_UNUSABLE: USAGE,
    Reason.SETTINGS_INVALID: USAGE,
    Reason.NAME_INVALID: USAGE,
}
_BY_KIND: Final = {
    Kind.INVALID: USAGE,
    Kind.OUT_OF_RANGE: USAGE,
    Kind.UNAVAILABLE: UNREACHABLE,
    Kind.INTERNAL: BROKEN,
    Kind.DATA_LOSS: BROKEN,
}


def exit_code_of(error: GloraError) -> int:
    """The exit code for an error."""
    return _BY_REASON.get(error.reason, _BY_KIND.get(error.kind, REFUSED))


def run_guarded(command: Callable[[], object]) -> int:
    """Run `command`; the exit code. Errors become sentences; with GLORA_DEBUG=1 they keep their traceback."""
    if os.environ.get("GLORA_DEBUG") == "1":
        command()
        return 0
    try:
        command()
    except GloraError as error:
        _say(error.message)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return _PIPE_CLOSED
    except Exception as error:  # noqa: BLE001 - the last line of defence: people get a sentence, never a traceback
        _say(f"glora failed in a way that it should not: {type(error).__name__}: {error}")
        _say("Set GLORA_DEBUG=1 and try again to see where; please report it.")
        return BROKEN
    return 0


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def _forget_stdout() -> None:
    """Keep Python from complaining at its end that nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
