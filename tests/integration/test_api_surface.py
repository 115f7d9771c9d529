"""The REST surface over ASGI: who may call it, what it answers, how it refuses."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest
from access_cases import memory_access
from fake_answers import MemoryAnswers
from fake_server import ADMIN_TOKEN, FakeServer, manifest, spec
from fastapi import FastAPI
from starlette.testclient import TestClient

from glora_dashboard.api import create_app
from glora_dashboard.gate import GateRules
from glora_dashboard.ports import HealthCheck
from glora_server.coordinator.access import Access
from glora_server.coordinator.model import DeviceState

OPEN_PATHS = {"/healthz", "/readyz", "/metrics", "/login"}


def make_app(
    server: FakeServer, access: Access, work_dir: Path, *, metrics_open: bool = True, max_body_bytes: int = 100_000
) -> FastAPI:
    return create_app(
        server,
        server,
        access=access,
        rules=GateRules.of(["testserver"], metrics_open=metrics_open),
        health=server,
        metrics_text=lambda: (b"glora_rounds_total 3\n", "text/plain; version=0.0.4; charset=utf-8"),
        answers=MemoryAnswers(),
        work_dir=work_dir,
        max_body_bytes=max_body_bytes,
    )


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def shared() -> FakeServer:
    return FakeServer()


@pytest.fixture(scope="module")
def access() -> Iterator[Access]:
    with memory_access(ADMIN_TOKEN) as access:
        yield access


@pytest.fixture(scope="module")
def shared_app(shared: FakeServer, access: Access, work_dir: Path) -> FastAPI:
    return make_app(shared, access, work_dir)


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    shared.refill()
    return shared


@pytest.fixture
def app(shared_app: FastAPI, server: FakeServer) -> FastAPI:
    return shared_app


@pytest.fixture
def anonymous(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client


def operations(app: FastAPI) -> list[tuple[str, str]]:
    return [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]


def test_every_documented_route_is_under_api_and_needs_the_token(app: FastAPI, anonymous: TestClient) -> None:
    routes = operations(app)
    assert len(routes) >= 25
    for method, path in routes:
        assert path.startswith("/api/v1/")
        if path == "/api/v1/sign-in":
            continue
        filled = re.sub(r"\{[^}]+\}", "1", path)
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {ADMIN_TOKEN}"}):
            answer = anonymous.request(method, filled, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["reason"] == "SIGN_IN_NEEDED"


@pytest.mark.parametrize("path", ["/api", "/api/", "/API/v1/runs", "/api/v1/openapi.json", "/api/v2/x", "/apiary"])
def test_nothing_below_api_answers_without_the_token(anonymous: TestClient, path: str) -> None:
    assert anonymous.get(path).status_code == 401


def test_nothing_was_changed_by_requests_without_the_token(
    app: FastAPI, anonymous: TestClient, server: FakeServer
) -> None:
    for method, path in operations(app):
        anonymous.request(method, re.sub(r"\{[^}]+\}", "demo", path), json={})
    assert server.audit_log == []


def test_only_the_known_paths_are_open(app: FastAPI, anonymous: TestClient) -> None:
    for path in OPEN_PATHS:
        assert anonymous.get(path).status_code == 200
    for path in ("/", "/docs", "/anything"):
        assert anonymous.get(path).status_code == 401


def test_readiness_names_the_part_that_is_down(anonymous: TestClient, server: FakeServer) -> None:
    assert anonymous.get("/readyz").json()["status"] == "ready"
    server.checks = (HealthCheck(name="database", ok=True), HealthCheck(name="worker", ok=False, message="it ended"))
    answer = anonymous.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"][1] == {"name": "worker", "ok": False, "message": "it ended"}
    assert anonymous.get("/healthz").status_code == 200


def test_metrics_need_the_token_unless_they_are_open(server: FakeServer, access: Access, tmp_path: Path) -> None:
    with TestClient(make_app(server, access, tmp_path, metrics_open=False)) as client:
        assert client.get("/metrics").status_code == 401
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
    assert answer.text == "glora_rounds_total 3\n"
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_answers_are_not_kept_by_caches(client: TestClient) -> None:
    answer = client.get("/api/v1/devices")
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_lists_come_in_parts(client: TestClient) -> None:
    first = client.get("/api/v1/devices", params={"page_size": 2}).json()
    assert [item["name"] for item in first["items"]] == ["pi-1", "pi-2"]
    second = client.get("/api/v1/devices", params={"page_size": 2, "page_token": first["next_page_token"]}).json()
    assert [item["name"] for item in second["items"]] == ["pi-3"]
    assert second["next_page_token"] == ""


def test_a_device_shows_what_it_is_doing_and_no_key(client: TestClient) -> None:
    answer = client.get("/api/v1/devices/pi-1").json()
    assert answer["current"]["progress"] == {"phase": "uploading", "done": 61, "total": 100, "loss": 0.4, "at": 1.8e9}
    assert answer["profile"]["training_rows"] == 1000
    assert not {"key_sha256", "certificate_pem"} & answer.keys()


def test_devices_are_approved_suspended_revoked_and_ranked(client: TestClient, server: FakeServer) -> None:
    assert client.post("/api/v1/devices/pi-3/approve").json()["state"] == "approved"
    assert client.post("/api/v1/devices/pi-3/suspend").json()["state"] == "suspended"
    assert client.post("/api/v1/devices/pi-3/rank", json={"rank": 4}).json()["granted_rank"] == 4
    assert client.post("/api/v1/devices/pi-3/revoke").json()["state"] == "revoked"
    assert server.device_records["pi-3"].state is DeviceState.REVOKED
    assert [entry.actor for entry in server.audit_log] == ["admin.token"] * 4


def test_a_token_is_shown_once_and_its_secret_never_again(client: TestClient) -> None:
    made = client.post("/api/v1/tokens", json={"uses": 3, "ttl_seconds": 3600, "max_rank": 8, "tags": ["lab"]})
    assert made.status_code == 201
    assert made.json()["join_token"].startswith("glora-join-")
    listed = client.get("/api/v1/tokens")
    assert "join_token" not in listed.text
    assert "secret" not in listed.text
    assert client.post(f"/api/v1/tokens/{made.json()['id']}/revoke").json()["revoked"] is True
    missing = client.post("/api/v1/tokens/nope/revoke")
    assert (missing.status_code, missing.json()["reason"]) == (404, "TOKEN_UNKNOWN")


def test_a_run_lives_from_creation_to_abort(client: TestClient) -> None:
    body = {"spec": json.loads(spec("second").to_json()), "manifest": json.loads(manifest().to_json())}
    made = client.post("/api/v1/runs", json=body)
    assert (made.status_code, made.json()["phase"]) == (201, "created")
    assert client.post("/api/v1/runs/second/start").json()["phase"] == "active"
    assert client.post("/api/v1/runs/second/pause").json()["phase"] == "paused"
    assert client.post("/api/v1/runs/second/resume").json()["phase"] == "active"
    edited = client.patch("/api/v1/runs/second/policy", json={"changes": {"quorum": 2, "rounds": 12}}).json()
    assert (edited["spec"]["policy"]["quorum"], edited["rounds"]) == (2, 12)
    assert client.post("/api/v1/runs/second/extend", json={"seconds": 60}).json()["deadline_at"] == 1.8e9 + 300
    ended = client.post("/api/v1/runs/second/abort", json={"reason": "wrong labels"}).json()
    assert (ended["phase"], ended["message"]) == ("aborted", "wrong labels")
    refused = client.post("/api/v1/runs/second/resume")
    assert (refused.status_code, refused.json()["reason"]) == (409, "ILLEGAL_TRANSITION")


def test_a_run_can_be_described_in_toml_and_mistakes_name_their_line(client: TestClient) -> None:
    text = 'name = "third"\n[model]\npath = "tiny"\n[training]\nbatch_size = 0\n'
    body = {"spec_toml": text, "manifest": json.loads(manifest().to_json())}
    refused = client.post("/api/v1/runs", json=body)
    assert (refused.status_code, refused.json()["reason"]) == (400, "SPEC_INVALID")
    assert "line 5, training.batch_size: must be at least 1 (you wrote 0)" in refused.json()["detail"]
    body["spec_toml"] = text.replace("= 0", "= 4")
    assert client.post("/api/v1/runs", json=body).status_code == 201


def test_a_run_shows_round_devices_scores_and_why_it_waits(client: TestClient) -> None:
    run = client.get("/api/v1/runs/demo").json()
    assert run["waiting"] == "1 of 2 updates are in; pi-1 is uploading."
    assert run["round"]["assignments"][0]["device"] == "pi-1"
    assert run["scores"][0]["accuracy"] == 0.75
    assert client.get("/api/v1/runs").json()["items"][0]["name"] == "demo"
    assert client.get("/api/v1/runs/demo/rounds").json()["items"][0]["number"] == 2
    assert [item["number"] for item in client.get("/api/v1/runs/demo/versions").json()["items"]] == [1, 0]
    assert client.get("/api/v1/runs/demo/versions/1/diagnostics").json()["items"][0]["values"]["captured"] == 0.97


def test_a_measurement_that_is_not_a_number_is_null(client: TestClient) -> None:
    assert client.get("/api/v1/runs/demo/measurements").json()["items"][0]["loss"] is None


def test_waiting_for_a_change_answers_when_there_is_one(client: TestClient, server: FakeServer) -> None:
    started = time.monotonic()
    run = client.get("/api/v1/runs/demo", params={"wait": 0, "timeout": 0.05}).json()
    assert run["revision"] == 0
    assert time.monotonic() - started >= 0.05
    client.post("/api/v1/runs/demo/pause")
    answer = client.get("/api/v1/runs/demo", params={"wait": 0, "timeout": 60}).json()
    assert (answer["revision"], answer["phase"]) == (1, "paused")


def test_an_export_is_a_zip_of_the_folder_and_leaves_nothing_behind(
    client: TestClient, server: FakeServer, work_dir: Path
) -> None:
    answer = client.post("/api/v1/runs/demo/export", json={"rank": 8, "flavour": "serving"})
    assert answer.headers["content-type"] == "application/zip"
    about = json.loads(answer.headers["x-glora-export"])
    assert (about["rank"], about["flavour"], about["version_number"]) == (8, "serving", 1)
    with zipfile.ZipFile(BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        assert archive.testzip() is None
    assert not list(work_dir.iterdir())


def test_a_refused_export_leaves_nothing_behind(client: TestClient, work_dir: Path) -> None:
    answer = client.post("/api/v1/runs/demo/export", json={"rank": 8, "version_number": 7})
    assert (answer.status_code, answer.json()["reason"]) == (404, "VERSION_UNKNOWN")
    assert not list(work_dir.iterdir())


def test_other_questions_have_answers(client: TestClient) -> None:
    assert client.get("/api/v1/system").json()["database"] == "sqlite"
    assert client.get("/api/v1/strategies").json()["items"][0]["name"] == "glora"
    client.post("/api/v1/runs/demo/pause")
    assert client.get("/api/v1/audit").json()["items"][0]["action"] == "run.pause"


class Wrong(NamedTuple):
    method: str
    path: str
    body: object
    status: int
    reason: str
    words: str


WRONG = [
    Wrong("GET", "/api/v1/devices/nope", None, 404, "DEVICE_UNKNOWN", "no device nope"),
    Wrong("GET", "/api/v1/runs/nope", None, 404, "RUN_UNKNOWN", "no run nope"),
    Wrong("GET", "/api/v1/nothing", None, 404, "REQUEST_INVALID", "nothing at /api/v1/nothing"),
    Wrong("DELETE", "/api/v1/runs", None, 405, "REQUEST_INVALID", "DELETE is not possible"),
    Wrong("GET", "/api/v1/devices?page_size=0", None, 422, "REQUEST_INVALID", "page_size: must be at least 1"),
    Wrong("GET", "/api/v1/devices?page_size=x", None, 422, "REQUEST_INVALID", "page_size: must be a whole number"),
    Wrong("GET", "/api/v1/runs/demo?wait=-1", None, 422, "REQUEST_INVALID", "wait: must be at least 0"),
    Wrong("GET", "/api/v1/runs/demo/versions/x/diagnostics", None, 422, "REQUEST_INVALID", "number: must be a whole"),
    Wrong("POST", "/api/v1/devices/pi-1/rank", {"rank": "4"}, 422, "REQUEST_INVALID", "rank: must be a whole number"),
    Wrong("POST", "/api/v1/devices/pi-1/rank", {"rank": 4, "x": 1}, 422, "REQUEST_INVALID", "x: is not known here"),
    Wrong("POST", "/api/v1/devices/pi-1/rank", {}, 422, "REQUEST_INVALID", "rank: is missing"),
    Wrong("POST", "/api/v1/devices/pi-1/rank", {"rank": 64}, 403, "RANK_NOT_ALLOWED", "ranks up to 16"),
    Wrong("POST", "/api/v1/tokens", {"ttl_seconds": -1}, 422, "REQUEST_INVALID", "ttl_seconds: must be at least 1"),
    Wrong("POST", "/api/v1/tokens", {"tags": "lab"}, 422, "REQUEST_INVALID", "tags: must be a list"),
    Wrong("POST", "/api/v1/runs", {"manifest": {}}, 400, "REQUEST_INVALID", "either as spec"),
    Wrong("POST", "/api/v1/runs", {"spec": {}, "manifest": {}}, 400, "SPEC_INVALID", "spec, name: is missing"),
    Wrong("PATCH", "/api/v1/runs/demo/policy", {"changes": {}}, 422, "REQUEST_INVALID", "at least 1 items"),
    Wrong("PATCH", "/api/v1/runs/demo/policy", {"changes": {"seed": 3}}, 400, "SPEC_INVALID", "cannot be changed"),
    Wrong("POST", "/api/v1/runs/demo/extend", {"seconds": 0}, 422, "REQUEST_INVALID", "greater than 0"),
    Wrong("POST", "/api/v1/runs/demo/start", None, 409, "ILLEGAL_TRANSITION", "is active"),
    Wrong("POST", "/api/v1/runs/demo/export", {"rank": 0}, 422, "REQUEST_INVALID", "rank: must be at least 1"),
    Wrong(
        "POST", "/api/v1/runs/demo/export", {"rank": 1, "flavour": "x"}, 422, "REQUEST_INVALID", "'peft' or 'serving'"
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.method} {wrong.path} {wrong.body}")
def test_wrong_requests_get_a_reason_and_a_sentence(client: TestClient, wrong: Wrong) -> None:
    answer = client.request(wrong.method, wrong.path, json=wrong.body)
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["reason"]) == (wrong.status, wrong.status, wrong.reason)
    assert wrong.words in problem["detail"]


def test_a_manifest_that_contradicts_itself_is_refused(client: TestClient) -> None:
    body = {"spec": json.loads(spec("x").to_json()), "manifest": {"format": 1}}
    answer = client.post("/api/v1/runs", json=body)
    assert (answer.status_code, answer.json()["reason"]) == (400, "MANIFEST_INVALID")


def test_what_is_not_json_is_refused(client: TestClient) -> None:
    answer = client.post("/api/v1/tokens", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert "is not JSON" in answer.json()["detail"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(client: TestClient, announced: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    content = b"".join(pieces()) if announced else pieces()
    answer = client.post("/api/v1/tokens", content=content)
    assert answer.status_code == 413
    assert "too large" in answer.json()["detail"]


def test_somebody_who_has_not_signed_in_may_send_little(client: TestClient) -> None:
    body = json.dumps({"username": "x", "password": "p" * 70_000})
    client.headers.pop("authorization", None)
    answer = client.post("/api/v1/sign-in", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert "at most 64 KiB" in answer.json()["detail"]


def test_a_bug_is_told_without_its_inside(
    client: TestClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise RuntimeError("postgresql://user:secret@host")

    monkeypatch.setattr(server, "system", broken)
    answer = client.get("/api/v1/system")
    assert (answer.status_code, answer.json()["reason"]) == (500, "INTERNAL")
    assert "secret" not in answer.text


def test_the_description_of_the_api_is_typed(client: TestClient) -> None:
    document = client.get("/api/v1/openapi.json").json()
    run = document["components"]["schemas"]["RunAnswer"]["properties"]
    assert run["revision"]["type"] == "integer"
    assert "PolicyTable" in document["components"]["schemas"]
