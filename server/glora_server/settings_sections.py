"""The sections of the server's settings: meaning, unit and bounds of every key; `config` reads them."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from glora_server.validation_text import raise_problems

Port = Annotated[int, Field(ge=0, le=65535)]


class SettingsSection(BaseModel):
    """Frozen and without room for misspelt keys; texts from the environment become numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _words(value: object) -> object:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_words)]
"""A list in TOML; in the environment words with commas between them."""


class GrpcSettings(SettingsSection):
    """The port on which devices work (mutual TLS)."""

    host: str = Field(default="0.0.0.0", min_length=1, description="Address to listen on.")  # noqa: S104 devices dial in
    port: Port = Field(default=7443, description="TCP port; 0 = any free one.")
    public_names: Names = Field(
        default=(), description="Names and addresses by which devices reach the server; they go into its certificate."
    )
    public_host: str = Field(
        default="", description="Host that devices dial once they have joined; empty = the one that they joined at."
    )
    max_concurrent_uploads: int = Field(
        default=4, ge=1, le=1024, description="Fast uploads taken in at the same time; the others wait a moment."
    )
    wait_seconds_min: float = Field(
        default=25.0, ge=1, le=3600, description="Seconds that an idle device's question stays open, at least."
    )
    wait_seconds_max: float = Field(default=45.0, ge=1, le=3600, description="Seconds that it stays open, at most.")

    def model_post_init(self, _context: object, /) -> None:
        """Check what no single key shows."""
        if self.wait_seconds_max < self.wait_seconds_min:
            sentence = f"must not be below wait_seconds_min ({self.wait_seconds_min:g})"
            raise_problems("grpc", [(("wait_seconds_max",), sentence, self.wait_seconds_max)])


class EnrolmentSettings(SettingsSection):
    """The port for joining and for gRPC health (server TLS only)."""

    host: str = Field(default="0.0.0.0", min_length=1, description="Address to listen on.")  # noqa: S104 devices dial in
    port: Port = Field(default=7444, description="TCP port; 0 = any free one.")


class HttpSettings(SettingsSection):
    """The port of the REST API, the dashboard and the metrics."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: Port = Field(default=8080, description="TCP port; 0 = any free one.")
    tls: Literal["off", "own", "files"] = Field(
        default="off",
        description='"own": HTTPS with a certificate of this server\'s authority (DATA_DIR/ca.crt is what browsers and '
        '`glora login --ca` must know); "files": with http.certificate and http.key; "off": no encryption.',
    )
    certificate: str = Field(default="", description="PEM file with the certificate and those above it.")
    key: str = Field(default="", description="PEM file with its private key, without a password.")
    public_names: Names = Field(
        default=(), description="Names by which people reach this port, besides localhost and addresses in figures."
    )
    proxies: Names = Field(
        default=(), description="Addresses of proxies in front, whose X-Forwarded-For and -Proto are believed."
    )
    allow_insecure_remote: bool = Field(
        default=False, description="Listen on an address that is not loopback although HTTP is not encrypted."
    )
    metrics_open: bool = Field(
        default=False,
        description="/metrics answers without a token on every address (on loopback it does, unless a proxy is named).",
    )
    session_hours: float = Field(
        default=168.0, gt=0, le=24 * 366, description="Hours after which people sign in again, however active they are."
    )
    session_idle_hours: float = Field(
        default=12.0, gt=0, le=24 * 366, description="Hours without a request after which people sign in again."
    )
    admin_password: SecretStr = Field(
        default=SecretStr(""),
        description="Password of the user admin that the first start makes; empty = one is made up and shown once.",
    )
    admin_password_file: str = Field(default="", description="File that holds it instead.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def metrics_for_all(self) -> bool:
        """Whether /metrics answers without a token; on loopback a proxy would let in everybody who reaches it."""
        return self.metrics_open or (self.loopback and not self.proxies)

    def model_post_init(self, _context: object, /) -> None:
        """Refuse to send passwords and tokens over a network in the clear unless somebody says so."""
        if not self.loopback and self.tls == "off" and not self.allow_insecure_remote:
            sentence = (
                "must be a loopback address such as 127.0.0.1, because HTTP here is not encrypted and would show "
                'passwords and tokens to the network; set http.tls = "own" (or "files"), or put a TLS proxy in front '
                "and set http.allow_insecure_remote = true"
            )
            raise_problems("http", [(("host",), sentence, self.host)])
        named = bool(self.certificate) + bool(self.key)
        if self.tls == "files" and named < 2:
            raise_problems("http", [(("tls",), "needs http.certificate and http.key", self.tls)])
        if self.tls != "files" and named:
            raise_problems("http", [(("tls",), 'must be "files" where http.certificate or http.key is set', self.tls)])
        if self.admin_password.get_secret_value() and self.admin_password_file:
            sentence = "is one of two places for the same password; leave http.admin_password out"
            raise_problems("http", [(("admin_password_file",), sentence, self.admin_password_file)])


class DatabaseSettings(SettingsSection):
    """Where the truth is kept."""

    url: SecretStr = Field(
        default=SecretStr(""),
        description="SQLAlchemy URL (postgresql+psycopg://user:password@host/glora); empty = SQLite in data_dir.",
    )


class BlobSettings(SettingsSection):
    """Where uploads and rendered adapters are kept."""

    url: str = Field(default="", description="fsspec URL; empty = the folder blobs in data_dir.")


class WorkerSettings(SettingsSection):
    """The process that does the numerics."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description='"auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N".',
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="Modules folded at once on a CPU; 0 = one for each core."
    )


class SecuritySettings(SettingsSection):
    """Certificates."""

    certificate_days: int = Field(default=90, ge=1, le=825, description="Days that a device's certificate is valid.")


class LogSettings(SettingsSection):
    """What is logged, and how."""

    format: Literal["auto", "console", "json"] = Field(
        default="auto", description='"console", "json" or "auto" (console on a terminal).'
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description='"debug", "info", "warning" or "error".'
    )
