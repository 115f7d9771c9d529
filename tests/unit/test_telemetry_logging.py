import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog

from glora_server.telemetry.logging import configure_logging


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_machines_get_one_json_object_a_line_with_what_was_bound() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("x").info("round_opened", number=3)
    [line] = lines(stream)
    assert line.pop("timestamp")
    assert line == {"event": "round_opened", "number": 3, "request_id": "r1", "level": "info"}


def test_people_get_lines() -> None:
    stream = Terminal()
    configure_logging(stream=stream)
    structlog.get_logger("x").info("round_opened", number=3)
    assert "round_opened" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        lines(stream)


@pytest.mark.parametrize("format_", ["console", "json"])
def test_setting_wins_over_the_terminal(format_: str) -> None:
    stream = io.StringIO() if format_ == "console" else Terminal()
    configure_logging("console" if format_ == "console" else "json", stream=stream)
    structlog.get_logger("x").info("event_here")
    assert stream.getvalue().startswith("{") == (format_ == "json")


def test_other_libraries_come_out_alike() -> None:
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    logging.getLogger("some.library").warning("it %s", "happened", extra={"more": 1})
    [line] = lines(stream)
    assert (line["event"], line["level"], line["more"]) == ("it happened", "warning", 1)


def test_warnings_are_logged() -> None:
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging("json", stream=stream)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    assert "old thing" in str(lines(stream)[0]["event"])


def test_level_is_kept_for_both_and_chatty_libraries_are_hushed() -> None:
    stream = io.StringIO()
    configure_logging("json", "info", stream=stream)
    structlog.get_logger("x").debug("hidden")
    logging.getLogger("y").debug("hidden")
    logging.getLogger("uvicorn.error").info("hidden")
    logging.getLogger("alembic.runtime").info("hidden")
    structlog.get_logger("x").info("shown")
    assert [line["event"] for line in lines(stream)] == ["shown"]


@pytest.mark.parametrize("name", ["token", "join_token", "token_secret", "password", "Authorization", "server_key_pem"])
@pytest.mark.parametrize("format_", ["console", "json"])
def test_secrets_are_masked(name: str, format_: str) -> None:
    stream = io.StringIO()
    configure_logging("console" if format_ == "console" else "json", stream=stream)
    structlog.get_logger("x").info("event_here", **{name: "s3cr3t"}, token_id="t1")
    logging.getLogger("y").warning("event here", extra={name: "s3cr3t"})
    assert "s3cr3t" not in stream.getvalue()
    assert "t1" in stream.getvalue()


@pytest.mark.parametrize("format_", ["console", "json"])
def test_tracebacks_show_no_local_variables(format_: str) -> None:
    stream = io.StringIO()
    configure_logging("console" if format_ == "console" else "json", stream=stream)

    def fails(hidden: str) -> None:
        raise ValueError(len(hidden))

    try:
        fails("terces"[::-1])
    except ValueError:
        structlog.get_logger("x").exception("it_failed")
    assert "ValueError: 6" in stream.getvalue()
    assert "Traceback" in stream.getvalue()
    assert "secret" not in stream.getvalue()


def test_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("json", stream=first)
    configure_logging("json", stream=second)
    structlog.get_logger("x").info("once")
    assert not first.getvalue()
    assert len(lines(second)) == 1
