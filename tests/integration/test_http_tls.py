"""HTTPS of the HTTP port: the server's own authority, given files, files that are renewed or broken."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from glora_server import http_server
from glora_server.http_server import CA_FILE, TlsFiles, address, first_password, listen, serving
from glora_server.security.authority import FileAuthority
from glora_server.settings_sections import HttpSettings
from glora_wire.errors import GloraError, Reason


async def _who(request: Request) -> PlainTextResponse:
    assert request.client is not None
    return PlainTextResponse(f"{request.url.scheme} {request.client.host}")


APP = Starlette(routes=[Route("/", _who)])


def own(folder: Path) -> TlsFiles:
    files = TlsFiles.of(HttpSettings(tls="own"), folder, FileAuthority.open(folder / "authority"))
    assert files is not None
    return files


def trusting(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=folder / CA_FILE)


async def ask(port: int, verify: ssl.SSLContext | bool, headers: dict[str, str] | None = None) -> str:
    scheme = "http" if verify is False else "https"
    async with httpx2.AsyncClient(verify=verify, trust_env=False, timeout=60.0) as client:
        return (await client.get(f"{scheme}://127.0.0.1:{port}/", headers=headers)).text


async def test_the_own_authority_signs_for_the_port_and_is_trusted_only_where_it_is_known(tmp_path: Path) -> None:
    listener = listen("127.0.0.1", 0)
    async with serving(APP, listener, own(tmp_path), proxies=()):
        port = listener.getsockname()[1]
        assert await ask(port, trusting(tmp_path)) == "https 127.0.0.1"
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(port, ssl.create_default_context())
        with pytest.raises(httpx2.TransportError):
            await ask(port, verify=False)


async def test_an_application_that_cannot_start_is_no_server(tmp_path: Path) -> None:
    @contextlib.asynccontextmanager
    async def broken(_: Starlette) -> AsyncIterator[None]:
        raise RuntimeError("no pages today")
        yield

    with contextlib.closing(listen("127.0.0.1", 0)) as listener, pytest.raises(GloraError, match="could not begin"):
        async with serving(Starlette(lifespan=broken), listener, None, proxies=()):
            pytest.fail("it serves")


def test_what_others_get_of_the_authority_holds_no_key(tmp_path: Path) -> None:
    own(tmp_path)
    text = (tmp_path / CA_FILE).read_text()
    assert text.startswith("-----BEGIN CERTIFICATE-----")
    assert "PRIVATE" not in text


async def test_renewed_files_are_used_from_the_next_connection_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_LOOK_SECONDS", 0.02)
    old, new = tmp_path / "old", tmp_path / "new"
    pair = tmp_path / "pair.pem"
    for folder in (old, new):
        folder.mkdir()
        own(folder)
    pair.write_bytes((old / "authority" / "server.pem").read_bytes())
    settings = HttpSettings(tls="files", certificate=str(pair), key=str(pair))
    files = TlsFiles.of(settings, old, FileAuthority.open(old / "authority"))
    listener = listen("127.0.0.1", 0)
    async with serving(APP, listener, files, proxies=()):
        port = listener.getsockname()[1]
        assert await ask(port, trusting(old)) == "https 127.0.0.1"
        pair.write_text("half a file")
        await asyncio.sleep(0.2)
        assert await ask(port, trusting(old)) == "https 127.0.0.1", "broken files leave the old ones in use"
        pair.write_bytes((new / "authority" / "server.pem").read_bytes())
        async with asyncio.timeout(60):
            while not await _answers(port, trusting(new)):  # noqa: ASYNC110 - a file cannot be waited for
                await asyncio.sleep(0.05)


async def _answers(port: int, context: ssl.SSLContext) -> bool:
    try:
        return await ask(port, context) == "https 127.0.0.1"
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize("content", [None, "", "nonsense"])
def test_files_that_cannot_be_used_are_told_at_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "pair.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GloraError, match=r"http\.certificate .* cannot be used") as caught:
        TlsFiles(path, path).context()
    assert caught.value.reason is Reason.SETTINGS_INVALID


@pytest.mark.parametrize(("proxies", "seen"), [((), "http 127.0.0.1"), (("127.0.0.1",), "https 203.0.113.9")])
async def test_only_named_proxies_are_believed(proxies: tuple[str, ...], seen: str) -> None:
    listener = listen("127.0.0.1", 0)
    async with serving(APP, listener, None, proxies=proxies):
        claims = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
        assert await ask(listener.getsockname()[1], verify=False, headers=claims) == seen


@pytest.mark.parametrize(
    ("host", "encrypted", "shown"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8080"),
        ("0.0.0.0", True, "https://localhost:8080"),
        ("::", True, "https://localhost:8080"),
        ("::1", False, "http://[::1]:8080"),
    ],
)
def test_the_address_that_is_shown_can_be_opened(host: str, encrypted: bool, shown: str) -> None:
    assert address(host, 8080, encrypted=encrypted) == shown


def test_the_first_password_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    settings = HttpSettings(admin_password_file=str(path))
    with pytest.raises(GloraError, match="cannot be read"):
        first_password(settings)
    path.write_text("\n")
    with pytest.raises(GloraError, match="is empty"):
        first_password(settings)
    path.write_text("eleven green bottles\n")
    assert first_password(settings) == "eleven green bottles"
    assert first_password(HttpSettings()) == ""
