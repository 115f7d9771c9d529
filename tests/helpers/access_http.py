"""The web surface with a real registry of people in front of a fake server, and browsers that sign in."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from access_cases import PASSWORD, memory_access
from fake_answers import MemoryAnswers
from fake_server import ADMIN_TOKEN, FakeServer
from fastapi import FastAPI
from httpx2 import Response
from sqlalchemy import delete
from starlette.testclient import TestClient
from storage_gate import connection_of

from glora_dashboard.api import create_app
from glora_dashboard.gate import GateRules
from glora_server.coordinator.access import Access
from glora_server.coordinator.access_limits import SignInLimits
from glora_server.coordinator.people import Role, User, UserId
from glora_server.coordinator.ports import UnitOfWork
from glora_server.storage.models import AuditRow
from glora_server.storage.people_models import ApiTokenRow, SessionRow, UserRow

HERE = "http://127.0.0.1:8080"
FORM_TOKEN = re.compile(r'name="form_token" value="([^"]+)"')


@dataclass(frozen=True)
class Site:
    """An application with what it works on."""

    app: FastAPI
    access: Access
    fake: FakeServer

    def browser(self, url: str = HERE, address: str = "192.0.2.7") -> TestClient:
        """A browser without cookies; requests come from `address`."""
        return TestClient(
            self.app, base_url=url, client=(address, 50000), follow_redirects=False, raise_server_exceptions=False
        )

    def program(self, token: str = ADMIN_TOKEN, address: str = "192.0.2.8") -> TestClient:
        """A program with a bearer token."""
        browser = self.browser(address=address)
        browser.headers["Authorization"] = f"Bearer {token}"
        return browser

    def reset(self) -> None:
        """As at the beginning of a test: ada the admin, olga the operator, vera the viewer, nothing else."""
        asyncio.run(self._reset())

    async def _reset(self) -> None:
        hashed = await self.access.passwords.hash(PASSWORD)

        def work(uow: UnitOfWork) -> None:
            for row in (SessionRow, ApiTokenRow, UserRow, AuditRow):
                connection_of(uow).execute(delete(row))
            for name, role in zip(("ada", "olga", "vera"), reversed(Role), strict=True):
                uow.users.add(User(id=UserId(name), name=name, role=role, password_hash=hashed, created_at=0.0))

        await self.access.store.write(work)
        self.access.limits = SignInLimits(self.access.clock)
        self.fake.refill()


@contextlib.contextmanager
def site(work_dir: Path, *, metrics_open: bool = False, names: tuple[str, ...] = ()) -> Iterator[Site]:
    """A site with nobody in it but the token of the data folder."""
    fake = FakeServer.with_things()
    with memory_access(ADMIN_TOKEN) as access:
        app = create_app(
            fake,
            fake,
            access=access,
            rules=GateRules.of(names, metrics_open=metrics_open),
            health=fake,
            metrics_text=lambda: (b"glora_rounds_total 3\n", "text/plain; version=0.0.4; charset=utf-8"),
            answers=MemoryAnswers(),
            work_dir=work_dir,
        )
        yield Site(app=app, access=access, fake=fake)


def form_token(browser: TestClient) -> str:
    """What the login page puts into its form for this browser."""
    found = FORM_TOKEN.search(browser.get("/login").text)
    assert found is not None
    return found[1]


def sign_in(
    browser: TestClient, name: str, password: str = PASSWORD, *, then: str = "/", origin: str | None = HERE
) -> Response:
    """Fill in the login form and send it."""
    fields = {"username": name, "password": password, "next": then, "form_token": form_token(browser)}
    return browser.post("/login", data=fields, headers={} if origin is None else {"Origin": origin})
