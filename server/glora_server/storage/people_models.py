"""The tables of who may come in. Columns are named like the fields of the records in coordinator/people.py."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from glora_server.coordinator.people import Role
from glora_server.storage.column_types import Words, choice
from glora_server.storage.models import Base, Id


class UserRow(Base):
    """Somebody who can sign in."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[Id]
    name: Mapped[str]
    role: Mapped[Role] = mapped_column(choice(Role, "role"))
    password_hash: Mapped[str]
    disabled: Mapped[bool]
    created_at: Mapped[float]
    last_sign_in_at: Mapped[float | None]
    row_version: Mapped[int]


class SessionRow(Base):
    """A browser that somebody signed in with."""

    __tablename__ = "sessions"
    __table_args__ = (UniqueConstraint("secret_sha256"), Index("ix_sessions_user_id", "user_id"))

    id: Mapped[Id]
    user_id: Mapped[str] = mapped_column(Words, ForeignKey("users.id"))
    secret_sha256: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    seen_at: Mapped[float]
    origin: Mapped[str]


class ApiTokenRow(Base):
    """A bearer token of a user."""

    __tablename__ = "api_tokens"
    __table_args__ = (
        UniqueConstraint("secret_sha256"),
        Index("ix_api_tokens_user_id_created_at_id", "user_id", "created_at", "id"),
        Index("ix_api_tokens_created_at_id", "created_at", "id"),
    )

    id: Mapped[Id]
    user_id: Mapped[str] = mapped_column(Words, ForeignKey("users.id"))
    name: Mapped[str]
    role: Mapped[Role] = mapped_column(choice(Role, "role"))
    secret_sha256: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    used_at: Mapped[float | None]
    revoked: Mapped[bool]
    row_version: Mapped[int]
