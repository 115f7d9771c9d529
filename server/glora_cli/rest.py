"""The server's REST API as the command line uses it: typed answers, errors as the server told them."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from glora_dashboard.models import PageAnswer
from glora_dashboard.problems import Problem
from glora_wire.errors import GloraError, Reason

PREFIX: Final = "/api/v1"
_EXAMPLE: Final = "http://127.0.0.1:8080"
TIMEOUT_SECONDS: Final = 60.0
PAGE_SIZE: Final = 500
EXPORT_TIMEOUT_SECONDS: Final = 1800.0
"""The server renders a whole adapter before its first byte comes."""
_ANSWER = TypeVar("_ANSWER", bound=BaseModel)
_Params = Mapping[str, str | int | float]


def at(*parts: str) -> str:
    """The path of a thing; whatever its name holds stays one part of the path."""
    return "".join(f"/{quote(part, safe='').replace('.', '%2E')}" for part in parts)


class Api:
    """A connection to one server; a context manager. Raises what the server raised, or SERVER_UNREACHABLE."""

    def __init__(
        self, url: str, token: str, *, ca: Path | None = None, transport: httpx2.BaseTransport | None = None
    ) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise _wrong_url(url, f"{error}; it must look like {_EXAMPLE}") from None
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise _wrong_url(url, f"it must look like {_EXAMPLE}")
        self._http = httpx2.Client(
            base_url=f"{self.url}{PREFIX}",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=True if ca is None else _trusting(ca),
            timeout=TIMEOUT_SECONDS,
            trust_env=not _is_loopback(parsed.host),
            transport=transport,
        )

    @property
    def host(self) -> str:
        """Name of the server's machine as it was given; "HOST" where it means this one, which no other can dial."""
        host = self._http.base_url.host
        return "HOST" if _is_loopback(host) else host

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, model: type[_ANSWER], path: str, params: _Params | None = None) -> _ANSWER:
        """The answer to a question."""
        return self._call(model, "GET", path, params=params)

    def post(self, model: type[_ANSWER], path: str, body: Mapping[str, Any] | None = None) -> _ANSWER:
        """What a command brought about."""
        return self._call(model, "POST", path, body=body)

    def patch(self, model: type[_ANSWER], path: str, body: Mapping[str, Any]) -> _ANSWER:
        """What a change brought about."""
        return self._call(model, "PATCH", path, body=body)

    def every(self, model: type[_ANSWER], path: str, wanted: _Params | None = None) -> list[_ANSWER]:
        """All items of a list that are `wanted`, however many parts it has."""
        items: list[_ANSWER] = []
        token = ""
        while True:
            params = {**(wanted or {}), "page_token": token, "page_size": PAGE_SIZE}
            part = self.get(PageAnswer[model], path, params)  # type: ignore[valid-type]  # a model made at run time
            items += part.items
            token = part.next_page_token
            if not token:
                return items

    def download(self, path: str, body: Mapping[str, Any], target: Path) -> Mapping[str, str]:
        """Write the answer into the file `target`; the headers of the answer."""
        with (
            _reachable(self.url),
            self._http.stream("POST", path, json=dict(body), timeout=EXPORT_TIMEOUT_SECONDS) as response,
        ):
            if response.status_code >= 400:
                response.read()
                raise _error_of(response)
            with target.open("wb") as file:
                for chunk in response.iter_bytes(1024 * 1024):
                    file.write(chunk)
            return dict(response.headers)

    def _call(
        self,
        model: type[_ANSWER],
        method: str,
        path: str,
        *,
        params: _Params | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> _ANSWER:
        with _reachable(self.url):
            response = self._http.request(method, path, params=params, json=body)
        if response.status_code >= 400:
            raise _error_of(response)
        try:
            return model.model_validate_json(response.content)
        except ValidationError:
            raise GloraError(
                Reason.REQUEST_INVALID,
                f"What {self.url} answered is not understood here: is it a glora server of another version? "
                "`glora --version` shows this one's, its System page that one's.",
            ) from None


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException:
        raise _unreachable(url, "it did not answer in time") from None
    except httpx2.TransportError as error:
        raise _unreachable(url, str(error) or type(error).__name__) from None


def _trusting(ca: Path) -> ssl.SSLContext:
    """TLS that believes this authority besides those of the system; raises SETTINGS_INVALID."""
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise GloraError(
            Reason.SETTINGS_INVALID, f"--ca {ca} is not a certificate that can be read: {error}.", path=ca
        ) from None
    return context


def is_loopback_url(url: str) -> bool:
    """Whether the address is one of this machine."""
    try:
        return _is_loopback(httpx2.URL(url).host)
    except httpx2.InvalidURL:
        return False


def _unreachable(url: str, what: str) -> GloraError:
    if "CERTIFICATE_VERIFY_FAILED" in what:
        return GloraError(
            Reason.SERVER_UNREACHABLE,
            f"The certificate of {url} is not one that this machine trusts ({what}). If the server uses its own "
            "authority, copy ca.crt from its data folder and name it with --ca or $GLORA_CA.",
            url=url,
        )
    if "WRONG_VERSION_NUMBER" in what:
        return GloraError(
            Reason.SERVER_UNREACHABLE, f"What answers at {url} does not speak TLS ({what}); try http://.", url=url
        )
    return GloraError(
        Reason.SERVER_UNREACHABLE,
        f"No glora server answers at {url} ({what}). Start one with `glora server`, or name another one with "
        "--server or $GLORA_URL.",
        url=url,
    )


def _wrong_url(url: str, what: str) -> GloraError:
    return GloraError(Reason.SETTINGS_INVALID, f"{url!r} is not the address of a server: {what}.", url=url)


def _error_of(response: httpx2.Response) -> GloraError:
    """The error that the server told, or one that says that somebody else answered."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return GloraError(
            Reason.SERVER_UNREACHABLE,
            f"{response.url} answered {response.status_code} {response.reason_phrase}, and not as a glora server does; "
            "look at --server.",
        )
    return GloraError(_reason_of(problem), problem.detail, **problem.details)


def _reason_of(problem: Problem) -> Reason:
    """The server's reason; a newer server may have some that are not known here."""
    try:
        return Reason(problem.reason)
    except ValueError:
        return Reason.INTERNAL if problem.status >= 500 else Reason.ILLEGAL_TRANSITION


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
