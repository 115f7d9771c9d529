"""The gate and the login page through the real application: who comes in, and every way in that must not be one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from access_cases import PASSWORD
from access_http import HERE, Site, form_token, sign_in, site
from fake_server import ADMIN_TOKEN
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from glora_server.coordinator.model import Page

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
ORIGIN = {"Origin": HERE}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("web")) as shared:
        yield shared


@pytest.fixture
def web(shared: Site) -> Site:
    shared.reset()
    return shared


@pytest.fixture
def browser(web: Site) -> TestClient:
    return web.browser()


def actions(web: Site) -> list[tuple[str, str, str]]:
    """(action, actor, origin) of the people's audit, newest first."""
    listing = asyncio.run(web.access.store.read(lambda uow: uow.audit.list(Page())))
    return [(entry.action, entry.actor, entry.origin) for entry in listing.items]


# --- strangers


@pytest.mark.parametrize(
    "path", ["/", "/runs/demo", "/_nicegui/3/static/x.js", "/loginx", "/login/", "//login", "/healthz/x"]
)
def test_strangers_who_want_a_page_are_asked_to_sign_in(browser: TestClient, path: str) -> None:
    answer = browser.get(f"{HERE}{path}", headers={"Accept": "text/html"})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
    assert answer.content == b""


def test_the_login_remembers_what_was_asked_for(browser: TestClient) -> None:
    asked = browser.get("/runs/demo?tab=2", headers={"Accept": "text/html"}).headers["location"]
    assert asked == "/login?next=%2Fruns%2Fdemo%3Ftab%3D2"
    assert 'value="/runs/demo?tab=2"' in browser.get(asked).text
    assert sign_in(browser, "vera", then="/runs/demo?tab=2").headers["location"] == "/runs/demo?tab=2"


@pytest.mark.parametrize("path", ["/api", "/api/v1/runs", "/API/v1/runs", "/metrics", "/anything"])
def test_strangers_programs_get_a_problem(browser: TestClient, path: str) -> None:
    answer = browser.get(path)
    assert (answer.status_code, answer.json()["reason"]) == (401, "SIGN_IN_NEEDED")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"])
def test_no_method_is_forgotten(web: Site, browser: TestClient, method: str) -> None:
    assert browser.request(method, "/api/v1/runs/demo/pause").status_code == 401
    assert web.fake.audit_log == []


def test_what_is_open_is_open(browser: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/login", "/login.css"):
        assert browser.get(path).status_code == 200


def test_metrics_are_open_only_by_setting(tmp_path: Path) -> None:
    with site(tmp_path, metrics_open=True) as open_site:
        assert open_site.browser().get("/metrics").text == "glora_rounds_total 3\n"


# --- signing in


def test_signing_in_opens_everything_that_the_role_may(browser: TestClient) -> None:
    answer = sign_in(browser, "vera")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert browser.get("/api/v1/me").json() == {"name": "vera", "role": "viewer", "credential": "session"}
    assert browser.get("/api/v1/runs").status_code == 200
    assert browser.get("/login").status_code == 303, "who is in needs no login"


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(browser: TestClient) -> None:
    cookies = {line.partition("=")[0]: line for line in sign_in(browser, "vera").headers.get_list("set-cookie")}
    attributes = {part.strip().lower() for part in cookies["glora_session"].split(";")[1:]}
    assert attributes == {"httponly", "path=/", "samesite=lax"}


def test_under_tls_the_cookie_travels_only_encrypted(web: Site) -> None:
    browser = web.browser("https://127.0.0.1:8443")
    form = browser.get("/login").headers["set-cookie"].lower()
    answer = sign_in(browser, "vera", origin="https://127.0.0.1:8443")
    assert answer.status_code == 303
    assert "; secure" in form
    assert all("; secure" in line.lower() for line in answer.headers.get_list("set-cookie") if "glora_session" in line)


@pytest.mark.parametrize(
    ("name", "password"), [("vera", "wrong password"), ("nobody", PASSWORD), ("", ""), ("\x00", "x")]
)
def test_a_wrong_password_says_so_and_starts_nothing(browser: TestClient, name: str, password: str) -> None:
    answer = sign_in(browser, name, password)
    assert answer.status_code == 401
    assert "The user name or the password is wrong" in answer.text
    assert "glora_session" not in browser.cookies
    assert password == "" or f'value="{password}"' not in answer.text


def test_what_was_typed_is_shown_as_text(browser: TestClient) -> None:
    answer = sign_in(browser, '"><script>alert(1)</script>', then='/"><script>')
    assert "<script>" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "javascript:alert(1)",
        "/\t/evil.example",
        "/login",
        "runs",
    ],
)
def test_the_login_leads_nowhere_else(browser: TestClient, elsewhere: str) -> None:
    assert sign_in(browser, "vera", then=elsewhere).headers["location"] == "/"
    fresh = TestClient(browser.app, base_url=HERE, follow_redirects=False)
    assert "evil" not in fresh.get("/login", params={"next": elsewhere}).text


def test_a_session_that_somebody_planted_is_not_taken_over(web: Site) -> None:
    attacker = web.browser()
    sign_in(attacker, "vera")
    planted = attacker.cookies["glora_session"]
    for value in (planted, "chosen-by-the-attacker"):
        victim = web.browser()
        fields = {"username": "ada", "password": PASSWORD, "next": "/", "form_token": form_token(victim)}
        victim.cookies.set("glora_session", value, domain="127.0.0.1", path="/")
        answer = victim.post("/login", data=fields, headers=ORIGIN)
        assert answer.status_code == 303
        fresh = answer.cookies["glora_session"]
        assert fresh not in {planted, value}
        assert web.browser().get("/api/v1/me", headers={"Cookie": f"glora_session={fresh}"}).json()["name"] == "ada"
    assert attacker.get("/api/v1/me").status_code == 401, "the planted session ended with the new one"


def test_signing_out_ends_the_session_on_the_server_too(browser: TestClient) -> None:
    sign_in(browser, "vera")
    kept = browser.cookies["glora_session"]
    answer = browser.post("/logout", headers=ORIGIN)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "glora_session" not in browser.cookies
    browser.cookies.set("glora_session", kept, domain="127.0.0.1", path="/")
    assert browser.get("/api/v1/me").status_code == 401


def test_a_link_does_not_sign_anybody_out(browser: TestClient) -> None:
    sign_in(browser, "vera")
    assert browser.get("/logout").status_code == 405
    assert browser.get("/api/v1/me").status_code == 200


def test_tries_are_limited_and_the_answer_says_for_how_long(web: Site) -> None:
    browser = web.browser()
    answers = [sign_in(browser, "vera", f"wrong {number}") for number in range(11)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert "glora_session" not in browser.cookies
    assert sign_in(browser, "vera").status_code == 429
    assert sign_in(web.browser(address="192.0.2.99"), "olga").status_code == 303


def test_another_address_in_a_header_does_not_help(web: Site) -> None:
    browser = web.browser()
    for number in range(10):
        browser.headers["X-Forwarded-For"] = f"10.0.0.{number}"
        sign_in(browser, "vera", "wrong")
    browser.headers["X-Forwarded-For"] = "10.0.0.99"
    assert sign_in(browser, "vera").status_code == 429


def test_signing_in_and_out_is_in_the_audit_with_the_address(web: Site) -> None:
    browser = web.browser(address="198.51.100.4")
    sign_in(browser, "vera", "wrong")
    sign_in(browser, "vera")
    browser.post("/logout", headers=ORIGIN)
    assert actions(web)[:3] == [
        ("session.sign-out", "vera", "198.51.100.4"),
        ("session.sign-in", "vera", "198.51.100.4"),
        ("session.refused", "vera", "198.51.100.4"),
    ]


# --- other sites' pages


def test_the_login_form_must_be_one_of_ours(web: Site) -> None:
    browser = web.browser()
    fields = {"username": "vera", "password": PASSWORD, "next": "/"}
    assert browser.post("/login", data=fields, headers=ORIGIN).status_code == 403
    token = form_token(browser)
    assert web.browser().post("/login", data=fields | {"form_token": token}, headers=ORIGIN).status_code == 403
    assert browser.post("/login", data=fields | {"form_token": "x"}, headers=ORIGIN).status_code == 403
    assert browser.post("/login", data=fields | {"form_token": "ä" * 43}, headers=ORIGIN).status_code == 403
    assert browser.post("/login", data=fields | {"form_token": token}, headers=ORIGIN).status_code == 303


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a=b&" * 100, b"username=" + b"x" * 9000, b"%ff%00=%ff"])
def test_a_form_that_is_none_is_refused(browser: TestClient, body: bytes) -> None:
    headers = ORIGIN | {"Content-Type": "application/x-www-form-urlencoded"}
    assert browser.post("/login", content=body, headers=headers).status_code == 403


OTHER_SITES = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "https://127.0.0.1:8080"},
    {"Origin": "http://127.0.0.1:8080.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {},
]


@pytest.mark.parametrize("headers", OTHER_SITES, ids=str)
def test_other_sites_change_nothing_with_this_browser_s_cookie(web: Site, headers: dict[str, str]) -> None:
    browser = web.browser()
    sign_in(browser, "olga")
    answer = browser.post("/api/v1/runs/demo/pause", headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (403, "ORIGIN_REFUSED")
    assert browser.post("/logout", headers=headers).status_code == 403
    assert web.fake.audit_log == []


@pytest.mark.parametrize("headers", [ORIGIN, {"Sec-Fetch-Site": "same-origin"}], ids=str)
def test_our_own_pages_change_what_the_role_may(web: Site, headers: dict[str, str]) -> None:
    browser = web.browser()
    sign_in(browser, "olga")
    assert browser.post("/api/v1/runs/demo/pause", headers=headers).status_code == 200
    assert [(entry.actor, entry.action) for entry in web.fake.audit_log] == [("olga", "run.pause")]


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://127.0.0.1:3000"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
    ids=str,
)
def test_other_sites_read_nothing_either(browser: TestClient, headers: dict[str, str]) -> None:
    sign_in(browser, "vera")
    assert browser.get("/api/v1/runs", headers=headers).status_code == 403
    assert browser.get("/_nicegui_ws/socket.io/?EIO=4&transport=polling", headers=headers).status_code == 403


def test_following_a_link_from_elsewhere_is_no_attack(browser: TestClient) -> None:
    sign_in(browser, "vera")
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert browser.get("/api/v1/runs", headers=followed).status_code == 200


def test_a_bearer_token_needs_no_origin(web: Site) -> None:
    program = web.program()
    assert program.post("/api/v1/runs/demo/pause", headers={"Origin": "https://elsewhere.example"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1"]
)
def test_names_that_are_not_ours_are_refused(browser: TestClient, host: str) -> None:
    sign_in(browser, "vera")
    for path in ("/api/v1/runs", "/login", "/healthz"):
        answer = browser.get(path, headers={"Host": host})
        assert (answer.status_code, answer.json()["reason"]) == (403, "HOST_REFUSED")


@pytest.mark.parametrize(
    "host", ["localhost:8080", "LOCALHOST", "localhost.", "127.0.0.1", "[::1]:8080", "10.1.2.3:80", "Fl.Example.org"]
)
def test_our_own_names_are_not(tmp_path: Path, host: str) -> None:
    with site(tmp_path, names=("fl.example.org",)) as named:
        assert named.browser().get("/healthz", headers={"Host": host}).status_code == 200


# --- websockets


def refused(browser: TestClient, headers: dict[str, str]) -> bool:
    try:
        with browser.websocket_connect(SOCKET, headers=headers):
            return False
    except WebSocketDisconnect as closed:
        return closed.code == 1008


@pytest.mark.parametrize("headers", [{}, ORIGIN, {"Authorization": "Bearer wrong"}], ids=str)
def test_a_websocket_without_a_session_is_refused(browser: TestClient, headers: dict[str, str]) -> None:
    assert refused(browser, headers)


@pytest.mark.parametrize("headers", OTHER_SITES, ids=str)
def test_a_websocket_of_another_site_is_refused(browser: TestClient, headers: dict[str, str]) -> None:
    sign_in(browser, "ada")
    assert refused(browser, headers)


def test_a_websocket_under_another_name_is_refused(browser: TestClient) -> None:
    sign_in(browser, "ada")
    assert refused(browser, {"Host": "evil.example", "Origin": "http://evil.example"})


# --- what was taken away


def test_a_session_that_was_taken_away_is_refused(web: Site) -> None:
    browser, admin = web.browser(), web.browser()
    sign_in(browser, "olga")
    sign_in(admin, "ada")
    assert admin.post("/api/v1/users/olga/role", json={"role": "viewer"}, headers=ORIGIN).status_code == 200
    assert browser.get("/api/v1/runs").status_code == 401
    sign_in(browser, "olga")
    assert browser.post("/api/v1/runs/demo/pause", headers=ORIGIN).status_code == 403
    assert admin.post("/api/v1/users/olga/disable", headers=ORIGIN).status_code == 200
    assert browser.get("/api/v1/runs").status_code == 401
    assert sign_in(browser, "olga").status_code == 401


def test_a_token_is_made_used_and_revoked(web: Site) -> None:
    browser = web.browser()
    sign_in(browser, "olga")
    made = browser.post("/api/v1/api-tokens", json={"name": "ci", "role": "viewer"}, headers=ORIGIN).json()
    program = web.program(made["token"])
    assert program.get("/api/v1/me").json() == {"name": "olga", "role": "viewer", "credential": "api_token"}
    assert program.post("/api/v1/runs/demo/pause").json()["reason"] == "ROLE_TOO_LOW"
    listed = browser.get("/api/v1/api-tokens")
    assert made["token"] not in listed.text
    assert "sha256" not in listed.text
    assert browser.post(f"/api/v1/api-tokens/{made['id']}/revoke", headers=ORIGIN).json()["revoked"] is True
    assert program.get("/api/v1/me").status_code == 401


def test_a_wrong_token_is_not_made_good_by_a_cookie(browser: TestClient) -> None:
    sign_in(browser, "ada")
    for given in ("Bearer wrong", f"Basic {ADMIN_TOKEN}", "Bearer", "", f"Bearer x {ADMIN_TOKEN}"):
        assert browser.get("/api/v1/me", headers={"Authorization": given}).status_code == 401


def test_the_command_line_signs_in_with_a_password_for_a_token(web: Site) -> None:
    program = web.browser()
    wrong = program.post("/api/v1/sign-in", json={"username": "olga", "password": "wrong"})
    assert (wrong.status_code, wrong.json()["reason"]) == (401, "SIGN_IN_REFUSED")
    made = program.post("/api/v1/sign-in", json={"username": "olga", "password": PASSWORD, "token_name": "laptop"})
    assert (made.status_code, made.json()["role"], made.json()["user"]) == (201, "operator", "olga")
    assert "set-cookie" not in made.headers
    assert web.program(made.json()["token"]).get("/api/v1/me").json()["name"] == "olga"
    higher = program.post("/api/v1/sign-in", json={"username": "olga", "password": PASSWORD, "role": "admin"})
    assert higher.status_code == 403
    answers = [program.post("/api/v1/sign-in", json={"username": "vera", "password": "x"}) for _ in range(12)]
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_users_are_managed_over_rest_and_the_last_admin_stays(web: Site) -> None:
    root = web.program()
    assert [user["name"] for user in root.get("/api/v1/users").json()["items"]] == ["ada", "olga", "vera"]
    assert "password" not in root.get("/api/v1/users/ada").text
    refused = root.post("/api/v1/users/ada/remove")
    assert (refused.status_code, refused.json()["reason"]) == (409, "LAST_ADMIN")
    assert root.post("/api/v1/users/vera/remove").json()["name"] == "vera"
    assert root.get("/api/v1/users/vera").status_code == 404
    weak = root.post("/api/v1/users", json={"name": "bob", "role": "viewer", "password": "secret"})
    assert (weak.status_code, weak.json()["reason"]) == (400, "PASSWORD_REFUSED")
    assert '"secret"' not in weak.text
    odd = root.post("/api/v1/users", json={"name": "bob", "role": "king", "password": PASSWORD})
    assert odd.status_code == 422
    assert PASSWORD not in odd.text


def test_one_changes_one_s_own_password_and_signs_in_again(browser: TestClient) -> None:
    sign_in(browser, "vera")
    body = {"current": PASSWORD, "password": "twelve blue bottles"}
    assert browser.post("/api/v1/me/password", json=body, headers=ORIGIN).status_code == 200
    assert browser.get("/api/v1/me").status_code == 401
    assert sign_in(browser, "vera", "twelve blue bottles").status_code == 303


def test_answers_are_kept_by_nobody_and_framed_by_nobody(browser: TestClient) -> None:
    answer = browser.get("/login")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
