"""Blobs: the same promises in a local folder and behind fsspec (its memory file system)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]
import pytest

from glora_server.storage import blobs as module
from glora_server.storage.blobs import FsspecBlobs
from glora_wire.digests import Digest, HashAlgorithm, digest_bytes
from glora_wire.errors import GloraError, Reason

Spool = Callable[[bytes], Path]


@pytest.fixture(params=["folder", "file url", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "folder":
            return f"{tmp_path}/blobs"
        case "file url":
            return f"file://{tmp_path}/blobs"
        case _:
            return f"memory://glora-{uuid4().hex}/blobs"


@pytest.fixture
def blobs(root: str, tmp_path: Path) -> FsspecBlobs:
    return FsspecBlobs(root, tmp_path / "cache")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    def write(data: bytes) -> Path:
        path = tmp_path / f"spool-{uuid4().hex}"
        path.write_bytes(data)
        return path

    return write


def test_what_was_adopted_is_there(blobs: FsspecBlobs, spool: Spool) -> None:
    data, path = b"factors" * 1000, spool(b"factors" * 1000)
    digest = digest_bytes(data)
    assert not blobs.exists(digest)
    blobs.adopt(path, digest)
    assert not path.exists()
    assert blobs.exists(digest)
    for _ in range(2):
        with blobs.local(digest) as local:
            assert local.read_bytes() == data
    assert list(blobs.stored()) == [digest]


def test_adopting_the_same_content_again_is_harmless(blobs: FsspecBlobs, spool: Spool) -> None:
    digest = digest_bytes(b"same")
    for _ in range(2):
        path = spool(b"same")
        blobs.adopt(path, digest)
        assert not path.exists()
    with blobs.local(digest) as local:
        assert local.read_bytes() == b"same"
    assert list(blobs.stored()) == [digest]


def test_both_hashes_and_the_empty_content_have_places_of_their_own(blobs: FsspecBlobs, spool: Spool) -> None:
    contents = {digest_bytes(data, algorithm) for data in (b"", b"x") for algorithm in HashAlgorithm}
    for digest in contents:
        blobs.adopt(spool(b"x" * digest.size), digest)
    assert set(blobs.stored()) == contents


def test_what_is_not_there_is_a_missing_file(blobs: FsspecBlobs) -> None:
    digest = digest_bytes(b"never")
    with pytest.raises(FileNotFoundError), blobs.local(digest):
        pass
    blobs.delete(digest)
    assert list(blobs.stored()) == []


def test_a_deleted_blob_is_gone_also_from_the_cache(blobs: FsspecBlobs, spool: Spool, tmp_path: Path) -> None:
    digest = digest_bytes(b"old")
    blobs.adopt(spool(b"old"), digest)
    with blobs.local(digest):
        pass
    blobs.delete(digest)
    assert not blobs.exists(digest)
    with pytest.raises(FileNotFoundError), blobs.local(digest):
        pass
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_file_of_another_size_is_not_adopted(blobs: FsspecBlobs, spool: Spool) -> None:
    digest, path = digest_bytes(b"whole"), spool(b"who")
    with pytest.raises(GloraError) as raised:
        blobs.adopt(path, digest)
    assert raised.value.reason is Reason.DIGEST_MISMATCH
    assert path.exists()
    assert list(blobs.stored()) == []


def test_a_second_server_finds_what_the_first_one_stored(root: str, tmp_path: Path, spool: Spool) -> None:
    digest = digest_bytes(b"shared")
    FsspecBlobs(root, tmp_path / "one").adopt(spool(b"shared"), digest)
    with FsspecBlobs(root, tmp_path / "two").local(digest) as local:
        assert local.read_bytes() == b"shared"


def test_files_that_are_not_blobs_are_passed_over(tmp_path: Path, spool: Spool) -> None:
    blobs = FsspecBlobs(tmp_path / "blobs", tmp_path / "cache")
    digest = digest_bytes(b"real")
    blobs.adopt(spool(b"real"), digest)
    folder = tmp_path / "blobs" / "blake3" / digest.hex[:2]
    (folder / f".{digest.hex}-4.half").touch()
    (folder / "notes.txt").touch()
    assert list(blobs.stored()) == [digest]


def test_a_truncated_local_blob_is_not_handed_out_and_can_be_mended(tmp_path: Path, spool: Spool) -> None:
    blobs = FsspecBlobs(tmp_path / "blobs", tmp_path / "cache")
    digest = digest_bytes(b"whole")
    blobs.adopt(spool(b"whole"), digest)
    with blobs.local(digest) as local:
        os.truncate(local, 2)
    with pytest.raises(GloraError, match="damaged"), blobs.local(digest):
        pass
    blobs.adopt(spool(b"whole"), digest)
    with blobs.local(digest) as local:
        assert local.read_bytes() == b"whole"


def test_a_damaged_remote_blob_is_not_handed_out(tmp_path: Path, spool: Spool) -> None:
    name = uuid4().hex
    blobs = FsspecBlobs(f"memory://{name}", tmp_path / "cache")
    digest = digest_bytes(b"whole")
    blobs.adopt(spool(b"whole"), digest)
    fsspec.filesystem("memory").pipe_file(f"/{name}/blake3/{digest.hex[:2]}/{digest.hex}-5", b"other")
    with pytest.raises(GloraError, match="damaged"), blobs.local(digest):
        pass
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_the_cache_keeps_to_its_limit_but_never_drops_what_is_in_use(tmp_path: Path, spool: Spool) -> None:
    blobs = FsspecBlobs(f"memory://{uuid4().hex}", tmp_path / "cache", cache_bytes=1500)
    digests = [digest_bytes(bytes([i]) * 1000) for i in range(4)]
    for i, digest in enumerate(digests):
        blobs.adopt(spool(bytes([i]) * 1000), digest)
    with blobs.local(digests[0]) as held:
        for digest in digests[1:]:
            with blobs.local(digest) as path:
                assert path.stat().st_size == 1000
        assert held.read_bytes() == b"\x00" * 1000
        assert _cached(tmp_path) == {held.name}
    with blobs.local(digests[1]):
        pass
    assert len(_cached(tmp_path)) == 1


def _cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_a_file_from_another_file_system_is_copied(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = FsspecBlobs(tmp_path / "blobs", tmp_path / "cache")
    digest, path = digest_bytes(b"far"), spool(b"far")
    real = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self == path:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    blobs.adopt(path, digest)
    assert not path.exists()
    assert list(blobs.stored()) == [digest]
    with blobs.local(digest) as local:
        assert [item.name for item in local.parent.iterdir()] == [local.name]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, Reason.STORAGE_FULL),
        (errno.EROFS, Reason.DATA_DIR_UNUSABLE),
        (errno.EACCES, Reason.DATA_DIR_UNUSABLE),
    ],
)
def test_trouble_with_the_disk_is_named(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch, code: int, reason: Reason
) -> None:
    blobs = FsspecBlobs(tmp_path / "blobs", tmp_path / "cache")

    def fail(_path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "_sync", fail)
    path = spool(b"x")
    with pytest.raises(GloraError, match="blobs") as raised:
        blobs.adopt(path, digest_bytes(b"x"))
    assert raised.value.reason is reason
    assert path.exists()


def test_bytes_and_names_are_synced_before_adopt_returns(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before the rename, its folder after it, and new folders in theirs."""
    blobs = FsspecBlobs(tmp_path / "blobs", tmp_path / "cache")
    order: list[tuple[Path, bool]] = []
    digest, path = digest_bytes(b"x"), spool(b"x")
    final = tmp_path / "blobs" / "blake3" / digest.hex[:2] / f"{digest.hex}-1"
    monkeypatch.setattr(module, "_sync", lambda synced: order.append((synced, final.exists())))
    blobs.adopt(path, digest)
    assert order == [
        (path, False),
        (tmp_path / "blobs" / "blake3", False),
        (tmp_path / "blobs", False),
        (final.parent, True),
    ]


def test_a_blob_store_that_fsspec_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="nowhere") as raised:
        FsspecBlobs("nowhere://bucket", tmp_path)
    assert raised.value.reason is Reason.DATA_DIR_UNUSABLE


def test_the_layout_is_the_documented_one(tmp_path: Path, spool: Spool) -> None:
    digest = Digest(HashAlgorithm.SHA256, bytes(range(32)), 3)
    FsspecBlobs(tmp_path / "blobs", tmp_path / "cache").adopt(spool(b"abc"), digest)
    assert (tmp_path / "blobs" / "sha256" / "00" / f"{digest.hex}-3").is_file()
