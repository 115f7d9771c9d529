"""What must survive a restart: who the device is, the assignment in hand, adapters and half-done downloads.

    identity.json  key.pem  certificate.pem  authority.pem      who the device is (key.pem never leaves)
    journal.json  update.safetensors                           the assignment in hand, and what was trained for it
    adapters/  partial/                                        what was pulled, by digest; what is being pulled
    fingerprints.json  training.log  lock

Everything is 0600 in a folder that is 0700, and appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TextIO

from glora_wire.errors import GloraError, Reason

STATE_VARIABLE: Final = "GLORA_CLIENT_STATE"
_KEPT_ADAPTERS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who the device is and where its server is. Times are Unix seconds of the server's certificate."""

    device: str
    name: str
    rank: int
    host: str
    port: int
    enrolment_port: int
    issued_at: float
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvaluation:
    """An evaluation that the server may not have heard of yet."""

    phase: int
    rank: int
    loss: float
    accuracy: float
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpdate:
    """A trained update that waits to be sent; `digest` as `Digest.text`, of the file update.safetensors."""

    assignment: str
    run_name: str
    round_number: int
    digest: str
    adapter_config_json: str
    training_rows: int
    completed_steps: int
    stopped_early: bool
    training_loss: float
    training_seconds: float
    max_chunk_bytes: int
    evaluations: tuple[StoredEvaluation, ...] = ()


def default_folder() -> Path:
    """$GLORA_CLIENT_STATE, else ~/.local/state/glora."""
    named = os.environ.get(STATE_VARIABLE)
    return Path(named) if named else Path.home() / ".local" / "state" / "glora"


class StateFolder:
    """The folder; opening it checks that nobody else can read it and locks it against a second client.

    Raises GloraError DATA_DIR_UNUSABLE.
    """

    def __init__(self, folder: Path, *, lock: bool = True) -> None:
        self.path = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise _unusable(
                f"The state folder {folder} cannot be used ({error.strerror}); check its rights."
            ) from error
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise _unusable(
                f"Others may read the state folder {folder}, which holds a private key; chmod 700 {folder}."
            )
        self._lock: TextIO | None = self._take_lock() if lock else None
        for name in ("adapters", "partial"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Let another client use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def update_path(self) -> Path:
        """Where a trained update is kept until it was sent."""
        return self.path / "update.safetensors"

    @property
    def fingerprint_cache(self) -> Path:
        """Hashes of base models that were seen."""
        return self.path / "fingerprints.json"

    @property
    def log_path(self) -> Path:
        """What the training process prints."""
        return self.path / "training.log"

    def write(self, name: str, data: str) -> None:
        """Replace a file (0600) whole, on the disk when this returns."""
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, name: str) -> str | None:
        """Text of a file; None when there is none."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def save_identity(self, identity: Identity, *, certificate_pem: str, authority_pem: str) -> None:
        """Remember who the device is; identity.json comes last, so that it is there only when all is."""
        self.write("certificate.pem", certificate_pem)
        self.write("authority.pem", authority_pem)
        self.write("identity.json", json.dumps(asdict(identity), indent=1))

    def identity(self) -> Identity | None:
        """Who the device is; None before it joined. Raises GloraError DATA_DIR_UNUSABLE for a damaged file."""
        text = self.read("identity.json")
        try:
            return None if text is None else Identity(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise _unusable(f"{self.path / 'identity.json'} is damaged ({error}); join again.") from error

    def credentials(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate and authority as PEM; raises GloraError DATA_DIR_UNUSABLE when one is missing."""
        parts = [self.read(name) for name in ("key.pem", "certificate.pem", "authority.pem")]
        if any(part is None for part in parts):
            raise _unusable(f"The state folder {self.path} lacks the device's certificate; join again.")
        key, certificate, authority = (str(part).encode() for part in parts)
        return key, certificate, authority

    def save_update(self, update: StoredUpdate) -> None:
        """Remember that update.safetensors holds this."""
        self.write("journal.json", json.dumps(asdict(update), indent=1))

    def update(self) -> StoredUpdate | None:
        """The update that waits to be sent; None when there is none. A damaged journal counts as none: train again."""
        text = self.read("journal.json")
        if text is None or not self.update_path.is_file():
            return None
        try:
            document = json.loads(text)
            document["evaluations"] = tuple(StoredEvaluation(**item) for item in document["evaluations"])
            return StoredUpdate(**document)
        except (ValueError, TypeError, KeyError):
            return None

    def drop_update(self) -> None:
        """Forget the update: it was sent, or nobody wants it."""
        (self.path / "journal.json").unlink(missing_ok=True)
        self.update_path.unlink(missing_ok=True)

    def prune(self, keep_partial: str = "") -> None:
        """Delete pulled adapters beyond the newest few, and partial downloads that do not begin with `keep_partial`."""
        adapters = sorted((self.path / "adapters").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for path in adapters[:-_KEPT_ADAPTERS]:
            path.unlink(missing_ok=True)
        for path in (self.path / "partial").iterdir():
            if not keep_partial or not path.name.startswith(keep_partial):
                path.unlink(missing_ok=True)

    def _take_lock(self) -> TextIO:
        try:
            file = os.fdopen(os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
        except OSError as error:
            raise _unusable(f"The state folder {self.path} cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise _unusable(
                f"Another client uses the state folder {self.path}; give each device its own with --state-dir."
            ) from error
        return file


def not_joined(folder: Path) -> GloraError:
    """The error for a command that needs an identity."""
    return _unusable(
        f"This device has not joined a server yet (no identity in {folder}); run `glora client join` first."
    )


def _unusable(message: str) -> GloraError:
    return GloraError(Reason.DATA_DIR_UNUSABLE, message)
