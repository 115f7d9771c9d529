"""Column types that turn what records hold into text and back, so that a record's fields are its columns."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, TypeVar

from sqlalchemy import Double, Enum, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from glora_server.coordinator.model import Profile
from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew
from glora_wire.digests import Digest
from glora_wire.errors import Reason
from glora_wire.manifest import Manifest

T = TypeVar("T")

_LONGEST_CHOICE: Final = 24


def choice(enum: type[StrEnum], name: str) -> Enum:
    """A column type for the values of `enum`, with a CHECK constraint `ck_<table>_<name>`."""
    return Enum(
        enum,
        native_enum=False,
        create_constraint=True,
        length=_LONGEST_CHOICE,
        name=name,
        values_callable=lambda members: [member.value for member in members],
    )


def _storable(text: str) -> str:
    """The text without what PostgreSQL cannot store: NUL becomes U+FFFD, a lone surrogate "?"."""
    if text.isascii() and "\x00" not in text:
        return text
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


class Words(TypeDecorator[str]):
    """Text for people, names and ids; what PostgreSQL cannot store is replaced with SQLite too."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002, D102
        return None if value is None else _storable(value)


class _AsText(TypeDecorator[T]):
    """Something that is stored as text; NULL is None."""

    impl = Text
    cache_ok = True

    def encode(self, value: T) -> str:
        """The text that stands for `value`."""
        raise NotImplementedError

    def decode(self, text: str) -> T:
        """The value that `text` stands for."""
        raise NotImplementedError

    def process_bind_param(self, value: T | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else _storable(self.encode(value))

    def process_result_value(self, value: Any | None, dialect: Dialect) -> T | None:  # noqa: ARG002
        return None if value is None else self.decode(value)


class WordsTuple(_AsText[tuple[str, ...]]):
    """A tuple of strings, as a JSON list."""

    cache_ok = True

    def encode(self, value: tuple[str, ...]) -> str:  # noqa: D102
        return json.dumps(value)

    def decode(self, text: str) -> tuple[str, ...]:  # noqa: D102
        return tuple(json.loads(text))


class NumbersTuple(_AsText[tuple[int, ...]]):
    """A tuple of whole numbers, as a JSON list."""

    cache_ok = True

    def encode(self, value: tuple[int, ...]) -> str:  # noqa: D102
        return json.dumps(value)

    def decode(self, text: str) -> tuple[int, ...]:  # noqa: D102
        return () if text == "[]" else tuple(json.loads(text))


class DigestText(_AsText[Digest]):
    """A digest, as Digest.text."""

    cache_ok = True

    def encode(self, value: Digest) -> str:  # noqa: D102
        return value.text

    def decode(self, text: str) -> Digest:  # noqa: D102
        return Digest.parse(text)


class ReasonText(_AsText[Reason]):
    """A reason by name; no CHECK constraint, because reasons are added without a migration."""

    cache_ok = True

    def encode(self, value: Reason) -> str:  # noqa: D102
        return value.value

    def decode(self, text: str) -> Reason:  # noqa: D102
        return Reason(text)


class ManifestText(_AsText[Manifest]):
    """A manifest, as its canonical JSON."""

    cache_ok = True

    def encode(self, value: Manifest) -> str:  # noqa: D102
        return value.to_json()

    def decode(self, text: str) -> Manifest:  # noqa: D102
        return _manifest(text)


class ProfileText(_AsText[Profile]):
    """A device's profile, as a JSON object."""

    cache_ok = True

    def encode(self, value: Profile) -> str:  # noqa: D102
        return json.dumps(asdict(value))

    def decode(self, text: str) -> Profile:  # noqa: D102
        return _profile(text)


class PolicyText(_AsText[RoundPolicy]):
    """A round's policy, as a JSON object."""

    cache_ok = True

    def encode(self, value: RoundPolicy) -> str:  # noqa: D102
        return json.dumps(asdict(value))

    def decode(self, text: str) -> RoundPolicy:  # noqa: D102
        return _policy(text)


class Measured(TypeDecorator[float]):
    """A measured number; NaN is stored as NULL (SQLite knows no NaN) and comes back as NaN."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:  # noqa: ARG002, D102
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: float | None, dialect: Dialect) -> float:  # noqa: ARG002, D102
        return math.nan if value is None else value


# A manifest is large and hardly ever changes, profiles and policies are read with every row that is listed: the
# records are immutable, so the same text may give the same object.
@lru_cache(maxsize=64)
def _manifest(text: str) -> Manifest:
    return Manifest.from_json(text)


@lru_cache(maxsize=4096)
def _profile(text: str) -> Profile:
    values = _known(Profile, text)
    values["accelerators"] = tuple(values.get("accelerators", ()))
    return Profile(**values)


@lru_cache(maxsize=256)
def _policy(text: str) -> RoundPolicy:
    values = _known(RoundPolicy, text)
    values["tags"] = tuple(values.get("tags", ()))
    values["sampling"] = Sampling(values.get("sampling", RoundPolicy().sampling))
    values["too_few"] = TooFew(values.get("too_few", RoundPolicy().too_few))
    return RoundPolicy(**values)


def _known(record: type[Profile | RoundPolicy], text: str) -> dict[str, Any]:
    """The values in `text` that this release knows, so that rows of the release before and after can be read."""
    names = {field.name for field in fields(record)}
    return {name: value for name, value in json.loads(text).items() if name in names}
