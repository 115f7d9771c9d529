"""What pages show of users, API tokens and sessions, as pure functions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.forms import row_button
from glora_dashboard.pages.lists import Cell, wide_table
from glora_dashboard.pages.parts import join, pill
from glora_server.coordinator.access_tokens import ApiTokenView
from glora_server.coordinator.model import new_id
from glora_server.coordinator.people import Role, Session, User

ROLE_WORDS: Final[Mapping[str, str]] = {
    Role.VIEWER.value: "viewer: sees runs, devices and the system",
    Role.OPERATOR.value: "operator: also runs the federation and sees the audit",
    Role.ADMIN.value: "admin: also says who may come in",
}


def made_up_password() -> str:
    """A password of 20 random letters and digits, in groups that can be read out."""
    return "-".join(new_id(5) for _ in range(4))


def users_table(users: tuple[User, ...], *, me: str) -> Markup:
    """Users by name."""
    head = ("User", "Role", "State", "Signed in", "Made", "")
    return wide_table(head, (_user(user, me) for user in users), label="Users")


def _user(user: User, me: str) -> Sequence[Cell]:
    name = user.name
    rest = ("enable", "Enable") if user.disabled else ("disable", "Disable")
    buttons = (
        row_button("Role", "role", name, label=f"Change the role of {name}"),
        row_button("Password", "password", name, label=f"Reset the password of {name}"),
        row_button(rest[1], rest[0], name, label=f"{rest[1]} {name}"),
        row_button("Remove", "remove", name, kind="danger", label=f"Remove {name}"),
    )
    return (
        Markup("<b>{}</b>{}").format(name, " (you)" if name == me else ""),
        user.role.value,
        pill("bad", "disabled") if user.disabled else pill("good", "may sign in"),
        fmt.moment(user.last_sign_in_at) if user.last_sign_in_at else Markup('<span class="muted">never</span>'),
        fmt.moment(user.created_at),
        Markup('<span class="row-actions">{}</span>').format(join(buttons)),
    )


def tokens_table(views: tuple[ApiTokenView, ...], *, own: bool = False) -> Markup:
    """API tokens, newest first; `own`: without their users."""
    if not views:
        words = "You have no API token." if own else "Nobody has an API token."
        return Markup('<p class="muted">{}</p>').format(words)
    head = ("For", *(() if own else ("User",)), "Role", "State", "Ends", "Used", "Made", "")
    now = time.time()
    return wide_table(head, (_token(view, now, own=own) for view in views), label="API tokens")


def _token(view: ApiTokenView, now: float, *, own: bool) -> Sequence[Cell]:
    token = view.token
    ended = token.expires_at is not None and token.expires_at <= now
    state = pill("bad", "revoked") if token.revoked else pill("idle", "ended") if ended else pill("good", "valid")
    revoke = row_button("Revoke", "revoke", token.id, kind="danger", label=f"Revoke {token.name}")
    cells: list[Cell] = [
        Markup("<b>{}</b>").format(token.name),
        *([] if own else [view.user]),
        token.role.value,
        state,
        "never" if token.expires_at is None else fmt.moment(token.expires_at),
        fmt.moment(token.used_at) if token.used_at else Markup('<span class="muted">never</span>'),
        fmt.moment(token.created_at),
        "" if token.revoked or ended else Markup('<span class="row-actions">{}</span>').format(revoke),
    ]
    return cells


def sessions_table(sessions: Sequence[Session], current: str) -> Markup:
    """Where somebody is signed in."""
    if not sessions:
        return Markup('<p class="muted">You are not signed in with a browser.</p>')
    head = ("From", "Signed in", "Used", "Ends", "")
    return wide_table(head, (_session(session, current) for session in sessions), label="Sessions")


def _session(session: Session, current: str) -> Sequence[Cell]:
    here = session.id == current
    end = row_button("End", "end", session.id, kind="danger", label=f"End the session from {session.origin}")
    return (
        Markup("<b>{}</b>{}").format(session.origin or "unknown", " (this one)" if here else ""),
        fmt.moment(session.created_at),
        fmt.moment(session.seen_at),
        fmt.moment(session.expires_at),
        "" if here else Markup('<span class="row-actions">{}</span>').format(end),
    )
