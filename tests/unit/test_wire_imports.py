"""The wire is light: a device's agent and the server's loop import it without torch, and one file knows grpc."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = [
    "adapter_config",
    "digests",
    "errors",
    "join_token",
    "manifest",
    "model_files",
    "names",
    "payload",
    "streams",
    "strict_json",
    "tensors",
]
HEAVY = {"torch", "numpy", "safetensors", "sqlalchemy", "fastapi", "pydantic", "glora_server", "glora_client"}


@pytest.mark.parametrize(("modules", "absent"), [(LIGHT, HEAVY | {"grpc"}), (["rpc_errors"], HEAVY)])
def test_what_importing_the_wire_brings_along(modules: list[str], absent: set[str]) -> None:
    imports = "; ".join(f"import glora_wire.{name}" for name in modules)
    code = f"import sys; {imports}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "glora_wire" in loaded
    assert absent.isdisjoint(loaded)
