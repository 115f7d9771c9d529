import stat
from pathlib import Path

import pytest

from glora_server.coordinator.token_secrets import secret_matches, secret_sha256
from glora_server.security.admin_token import AdminToken, read_admin_token
from glora_server.security.private_files import create_private, read_private
from glora_server.security.rate import RateLimiter, address_of
from glora_wire.errors import GloraError, Reason


def test_only_the_right_secret_matches_its_hash() -> None:
    stored = secret_sha256("ab" * 32)
    assert "ab" * 32 not in stored
    assert secret_matches("ab" * 32, stored)
    assert not secret_matches("ac" * 32, stored)
    assert not secret_matches("", stored)
    assert not secret_matches("ключ", stored)


def test_admin_token_is_made_once_and_closed_to_others(tmp_path: Path) -> None:
    first = AdminToken.open(tmp_path)
    text = read_admin_token(tmp_path)
    assert stat.S_IMODE((tmp_path / "admin.token").stat().st_mode) == 0o600
    assert len(text) >= 32
    assert first.matches(text)
    assert AdminToken.open(tmp_path).matches(text)
    assert text not in repr(first)


def test_header_must_carry_the_token(tmp_path: Path) -> None:
    token = AdminToken.open(tmp_path)
    text = read_admin_token(tmp_path)
    token.require(f"Bearer {text}")
    token.require(f"bearer {text}")
    for header in (
        None,
        "",
        text,
        "Bearer",
        "Bearer ",
        f"Basic {text}",
        f"Bearer {text}x",
        f"Bearer {text[:-1]}",
        "Bearer ü",
    ):
        with pytest.raises(GloraError) as caught:
            token.require(header)
        assert caught.value.reason is Reason.ADMIN_TOKEN_INVALID
        assert text not in caught.value.message


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_token_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    AdminToken.open(tmp_path)
    (tmp_path / "admin.token").chmod(mode)
    with pytest.raises(GloraError, match="chmod 600") as caught:
        AdminToken.open(tmp_path)
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


@pytest.mark.parametrize("content", [b"", b"short", b"two words " * 8, b"\xff" * 40])
def test_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    create_private(tmp_path / "admin.token", content)
    with pytest.raises(GloraError, match="does not hold a token"):
        AdminToken.open(tmp_path)


def test_missing_token_and_missing_folder_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="first time"):
        read_admin_token(tmp_path)
    with pytest.raises(GloraError, match="data folder") as caught:
        AdminToken.open(tmp_path / "nowhere")
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


def test_create_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert create_private(path, b"one")
    assert not create_private(path, b"two")
    assert read_private(path) == b"one"
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


class Clock:
    at = 0.0

    def __call__(self) -> float:
        return self.at


def test_burst_then_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(per_second=2.0, burst=3, clock=clock)
    for _ in range(3):
        limiter.check("ipv4:1.2.3.4:1000")
    with pytest.raises(GloraError) as caught:
        limiter.check("ipv4:1.2.3.4:2000")
    assert caught.value.reason is Reason.TOO_MANY_REQUESTS
    assert caught.value.retry_after
    limiter.check("ipv4:1.2.3.5:1000")
    clock.at = 0.5
    limiter.check("ipv4:1.2.3.4:1000")
    with pytest.raises(GloraError):
        limiter.check("ipv4:1.2.3.4:1000")


def test_memory_is_bounded_and_the_longest_silent_is_forgotten() -> None:
    clock = Clock()
    limiter = RateLimiter(per_second=0.001, burst=1, max_peers=10, clock=clock)
    for n in range(1000):
        limiter.check(f"ipv4:10.0.{n // 250}.{n % 250}:1")
    with pytest.raises(GloraError):
        limiter.check(f"ipv4:10.0.{999 // 250}.{999 % 250}:1")
    limiter.check("ipv4:10.0.0.0:1")
    assert len(limiter._buckets._buckets) == 10


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:1.2.3.4:5", "1.2.3.4"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:55", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:9::4]:55", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:1.2.3.4]:55", "1.2.3.4"),
        ("ipv6:%5Bfe80::1%25eth0%5D:55", "fe80::/64"),
        ("unix:/run/x", "unix:/run/x"),
        ("ipv4:nonsense", "ipv4:nonsense"),
    ],
)
def test_address_of_peer(peer: str, address: str) -> None:
    assert address_of(peer) == address
