"""Docker or podman, whichever is here, with the few commands that the test of the composition needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PROJECT: Final = "glora-compose-test"
_WORK: Final = ROOT / "build" / "compose-test"
_NAMELESS, _NAMELESS_SECONDS = "Temporary failure in name resolution", 180.0
_CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_NO_SYSTEMD: Final = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""
"""Podman's own settings want systemd, which containers and small machines do not have."""


class TestFailedError(Exception):
    """The test cannot go on; the text says why."""


class NoEngineError(TestFailedError):
    """There is neither Docker nor podman here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The program, its compose command, and the environment of both."""

    program: str
    compose_command: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def find(cls) -> Engine:
        """Docker where its daemon answers, else podman; raises NoEngineError saying what to install."""
        if _succeeds("docker", "info") and _succeeds("docker", "compose", "version"):
            return cls(program="docker", compose_command=("docker", "compose"), environment=dict(os.environ))
        compose = Path(sys.executable).with_name("podman-compose")
        if shutil.which("podman") is None or not compose.exists():
            raise NoEngineError(
                "There is neither a Docker daemon nor podman with podman-compose: install Docker, or on Debian "
                "`apt-get install podman buildah runc netavark aardvark-dns iptables debootstrap` (podman-compose "
                "comes with `make compose-test`)."
            )
        return cls(program="podman", compose_command=(str(compose),), environment=_podman_environment())

    @property
    def is_podman(self) -> bool:
        """Whether images are built and run without a daemon."""
        return self.program == "podman"

    def run(self, *arguments: str, check: bool = True, within: float = 600.0) -> str:
        """What the engine answered to a command; raises TestFailedError with what it complained about."""
        return self._call((self.program, *arguments), check=check, within=within)

    def compose(self, *arguments: str, variables: Mapping[str, str], check: bool = True, within: float = 600.0) -> str:
        """What the compose command answered, with the file of this repository; raises TestFailedError."""
        command = (*self.compose_command, "--project-name", PROJECT, "--profile", "demo", *arguments)
        return self._call(command, check=check, within=within, variables=variables)

    def build(
        self, tag: str, dockerfile: Path, context: Path, *, target: str = "", arguments: Mapping[str, str] = {}
    ) -> None:
        """Build an image; raises TestFailedError with the end of what the build said."""
        command = [self.program, "build", "--tag", tag, "--file", str(dockerfile)]
        command += ["--target", target] if target else []
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        if self.is_podman:
            # Health checks are Docker's format; the host's network reaches what the host reaches.
            command += ["--format", "docker", "--network", "host", *self._build_mounts(arguments)]
        self._call((*command, str(context)), check=True, within=3600.0)

    def has_image(self, tag: str) -> bool:
        """Whether an image is on this machine."""
        return bool(self.run("images", "--quiet", tag).strip())

    def nameless_images(self) -> frozenset[str]:
        """Ids of the images without a name of which no other is made."""
        # While somebody else removes images, listing them may fail; then there is nothing to say.
        return frozenset(self.run("images", "--quiet", "--no-trunc", "--filter", "dangling=true", check=False).split())

    def pull(self, tag: str) -> bool:
        """Fetch an image from its registry; whether that worked."""
        command = (self.program, "pull", "--quiet", tag)
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, check=False, timeout=900)
        return done.returncode == 0

    def container(self, service: str) -> str:
        """Id of the service's container; raises TestFailedError when there is none."""
        label = f"label=com.docker.compose.service={service}"
        found = self.run(
            "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}", "--filter", label
        ).split()
        if not found:
            raise TestFailedError(f"There is no container of the service {service}.")
        return found[0]

    def inspect(self, service: str, template: str) -> str:
        """A part of what the engine knows about a service's container, as a Go template says."""
        return self.run("inspect", "--format", template, self.container(service)).strip()

    def logs(self, service: str, lines: int = 40) -> str:
        """The last lines that a service wrote."""
        command = (self.program, "logs", "--tail", str(lines), self.container(service))
        done = subprocess.run(
            command,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
        )
        return done.stdout

    def execute(self, service: str, *command: str) -> str:
        """What a command inside a service's container answered.

        It is given again where podman's name server, which every new container disturbs, left it without an answer.
        """
        container, end = self.container(service), time.monotonic() + _NAMELESS_SECONDS
        while True:
            try:
                return self.run("exec", container, *command)
            except TestFailedError as error:
                if not self.is_podman or _NAMELESS not in str(error) or time.monotonic() > end:
                    raise

    def labels(self, tag: str) -> dict[str, str]:
        """The labels of an image."""
        return json.loads(self.run("inspect", "--type", "image", "--format", "{{json .Config.Labels}}", tag)) or {}

    def _build_mounts(self, arguments: Mapping[str, str]) -> list[str]:
        """The host's certificates, and the folder of wheels where one is named."""
        mounts = [f"{_CERTIFICATES}:{_CERTIFICATES}:ro"] if _CERTIFICATES.exists() else []
        wheels = Path(arguments.get("PIP_FIND_LINKS", ""))
        if wheels.is_absolute() and wheels.is_dir():
            mounts.append(f"{wheels}:{wheels}:ro")
        return [word for mount in mounts for word in ("--volume", mount)]

    def _call(
        self,
        command: Sequence[str],
        *,
        check: bool,
        within: float,
        variables: Mapping[str, str] = {},
    ) -> str:
        """What a command wrote to stdout; raises TestFailedError when it fails (`check`) or takes too long."""
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**self.environment, **variables},
                capture_output=True,
                check=False,
                text=True,
                timeout=within,
            )
        except subprocess.TimeoutExpired:
            raise TestFailedError(f"`{' '.join(command)}` took longer than {within:.0f} s.") from None
        if check and done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise TestFailedError(f"`{' '.join(command)}` ended with {done.returncode}:\n{said}")
        return done.stdout


def _podman_environment() -> dict[str, str]:
    """This environment, with settings that work without systemd where there is none."""
    environment = dict(os.environ)
    if not Path("/run/systemd/system").exists() and "CONTAINERS_CONF" not in environment:
        _WORK.mkdir(parents=True, exist_ok=True)
        settings = _WORK / "containers.conf"
        settings.write_text(_NO_SYSTEMD, encoding="utf-8")
        environment["CONTAINERS_CONF"] = str(settings)
    return environment


def _succeeds(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
