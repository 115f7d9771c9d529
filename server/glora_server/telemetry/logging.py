"""Logs: structlog in front, the standard library behind, so that what other libraries log comes out alike.

Events have constant names in snake_case and values as fields; calls bind request, method and device. Secrets are
never logged: what carries a name that secrets have is masked, whoever logs it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import Processor

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_SECRET_NAMES: Final = re.compile(
    r"secret|password|authori[sz]ation|cookie|bearer|(^|_)token$|key_pem|private", re.IGNORECASE
)
_MASK: Final = "***"
_CHATTY: Final = ("alembic", "asyncio", "fsspec", "grpc", "sqlalchemy", "urllib3", "uvicorn", "websockets")
"""Libraries that tell at "info" what only their authors want to know."""


def configure_logging(
    format: LogFormat = "auto",  # noqa: A002 - the name of the setting
    level: LogLevel = "info",
    *,
    stream: TextIO | None = None,
) -> None:
    """Send all logs of the process to `stream` (stderr): lines for people on a terminal, else one JSON object a line.

    Replaces what was configured before; call it once, before anything is logged.
    """
    target = stream if stream is not None else sys.stderr
    people = format == "console" or (format == "auto" and target.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared = _shared_processors()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(target, people=people)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _mask_secrets,
    ]


def _renderers(target: TextIO, *, people: bool) -> list[Processor]:
    # Tracebacks are plain in both: the fancier ones print local variables, secrets among them.
    if people:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=plain, pad_event_to=0)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _mask_secrets(_logger: object, _method: str, event: MutableMapping[str, object]) -> MutableMapping[str, object]:
    for name in event:
        if _SECRET_NAMES.search(name):
            event[name] = _MASK
    return event
