"""The images of the composition: ours are built, the others are pulled or, without a registry, stood in for."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from compose_test_engine import ROOT, Engine, TestFailedError

SERVER: Final = "localhost/glora-compose-test-server"
CLIENT: Final = "localhost/glora-compose-test-client"
DEMO: Final = "localhost/glora-compose-test-demo"
STAND_IN_LABEL: Final = "org.glora.stand-in"
_FOLDER: Final = ROOT / "tools" / "compose_test_images"
_DEBIAN: Final = "http://deb.debian.org/debian"
_PACKAGES: Final = "python3,python3-venv,python3-pip,ca-certificates"
_STAND_INS_ARE: Final = {
    "postgres": "Debian's PostgreSQL behind the same variables",
    "prometheus": "Debian's Prometheus in the same places",
    "grafana": "NOT Grafana: it looks at the mounted files and answers /api/health, no panel is drawn",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Makes images, and remembers which, so that they can be removed."""

    engine: Engine
    say: Callable[[str], None]
    before: frozenset[str]
    """Ids of images without a name that were there."""
    made: list[str]

    @classmethod
    def of(cls, engine: Engine, say: Callable[[str], None]) -> Images:
        """Nothing is made yet."""
        return cls(engine=engine, say=say, before=engine.nameless_images(), made=[])

    def prepare(self, *, build: bool) -> dict[str, str]:
        """Have every image of the composition; the variables by which docker-compose.yml finds ours."""
        python = _python_tag()
        self._have(python, self._bootstrap, keep=True)
        if build:
            self._build_ours(python)
        else:
            self.made.extend((SERVER, CLIENT, DEMO))
        for service in ("postgres", "prometheus", "grafana"):
            tag = _image_of(service)
            self._have(tag, functools.partial(self._stand_in, service, python))
        return {"GLORA_SERVER_IMAGE": SERVER, "GLORA_CLIENT_IMAGE": CLIENT, "GLORA_DEMO_IMAGE": DEMO}

    def remove(self) -> None:
        """Remove what was made here, layers that a next build would use included, but for the base of all."""
        for tag in reversed(self.made):
            self.engine.run("rmi", "--force", tag, check=False)
        # Removing layers leaves those below them without a name, until none are left.
        while self.engine.is_podman and (left := self.engine.nameless_images() - self.before):
            self.engine.run("rmi", *left, check=False)
            if left <= self.engine.nameless_images():
                return

    def _have(self, tag: str, make: Callable[[str], None], *, keep: bool = False) -> None:
        """Take the image that is here, the registry's, or a stand-in; an earlier one only if it is to be kept."""
        here = self.engine.has_image(tag) and (keep or STAND_IN_LABEL not in self.engine.labels(tag))
        if not here and not self.engine.pull(tag):
            make(tag)
        if STAND_IN_LABEL in self.engine.labels(tag):
            self.say(f"STAND-IN for {tag}, as no registry answers")

    def _bootstrap(self, tag: str) -> None:
        """Make a stand-in for the official Python image from Debian's packages."""
        if not self.engine.is_podman or os.geteuid() != 0 or shutil.which("debootstrap") is None:
            raise TestFailedError(f"{tag} cannot be pulled; a stand-in needs root, podman and debootstrap.")
        self.say(f"{tag} cannot be pulled: making a stand-in with debootstrap")
        with tempfile.TemporaryDirectory(prefix="glora-base-") as folder:
            root = Path(folder) / "root"
            command = ("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root), _DEBIAN)
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:
                raise TestFailedError("debootstrap could not make the base image; it says above why.")
            for package in (root / "var" / "cache" / "apt" / "archives").glob("*.deb"):
                package.unlink()
            archive = Path(folder) / "root.tar"
            subprocess.run(("tar", "--create", "--file", str(archive), "--directory", str(root), "."), check=True)
            changes = ("--change", "CMD python3", "--change", f"LABEL {STAND_IN_LABEL}=true")
            self.engine.run("import", *changes, str(archive), tag)

    def _stand_in(self, service: str, python: str, tag: str) -> None:
        folder = _FOLDER / service
        self.say(f"{tag} cannot be pulled: building a stand-in ({_STAND_INS_ARE[service]})")
        self.engine.build(tag, folder / "Dockerfile", folder, arguments={"PYTHON_IMAGE": python})
        self.made.append(tag)

    def _build_ours(self, python: str) -> None:
        arguments = {"PYTHON_IMAGE": python, **_pip_arguments(self.engine), "REVISION": _revision()}
        for tag, name, target in ((SERVER, "server", ""), (CLIENT, "client", ""), (DEMO, "client", "demo")):
            self.say(f"building {tag}")
            dockerfile = ROOT / "deploy" / "docker" / f"Dockerfile.{name}"
            self.made.append(tag)
            self.engine.build(tag, dockerfile, ROOT, target=target, arguments=arguments)
            size = int(self.engine.run("inspect", "--type", "image", "--format", "{{.Size}}", tag))
            self.say(f"{tag}: {size / 1e6:.0f} MB")


def _pip_arguments(engine: Engine) -> dict[str, str]:
    """Where pip finds packages in a build: as here, and torch where one without CUDA is."""
    found = {name: value for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL") if (value := os.environ.get(name))}
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if engine.is_podman and Path(wheels).is_dir() and any(Path(wheels).glob("torch-*.whl")):
        return found | {"PIP_FIND_LINKS": wheels, "TORCH_INDEX": ""}
    try:
        socket.getaddrinfo("download.pytorch.org", 443)
    except OSError:
        return found | {"TORCH_INDEX": ""}  # a larger image, as PyPI's torch brings CUDA along
    return found


def _revision() -> str:
    done = subprocess.run(("git", "-C", str(ROOT), "rev-parse", "HEAD"), capture_output=True, check=False, text=True)
    return done.stdout.strip() or "unknown"


def _python_tag() -> str:
    """The image that ours are made of."""
    text = (ROOT / "deploy" / "docker" / "Dockerfile.server").read_text(encoding="utf-8")
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    if found is None:
        raise TestFailedError("Dockerfile.server has no ARG PYTHON_IMAGE with a default.")
    return found[1]


def _image_of(service: str) -> str:
    """The image of a service that is not ours, as docker-compose.yml or the environment has it."""
    variable = f"{service.upper()}_IMAGE"
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    found = re.search(rf"\$\{{{variable}:-(\S+)\}}", text)
    if found is not None:
        return os.environ.get(variable, found[1])
    raise TestFailedError(f"docker-compose.yml names no ${{{variable}}}.")
