"""The run that the demo makes, and the settings of its server, as the files that people write themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glora_cli.demo_run import HOST

RUN_NAME: Final = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the user of `glora demo` asked for, checked."""

    rounds: int
    ranks: tuple[int, ...]
    """One per training device."""
    strategy: str
    steps: int
    model: Path
    data: Path | None
    port: int

    @property
    def max_rank(self) -> int:
        """The server's rank."""
        return max(self.ranks)


def run_toml(options: DemoOptions, labels: Sequence[str]) -> str:
    """The run's description."""
    return f"""\
name = "{RUN_NAME}"
seed = 7

[model]
path = {_quoted(str(options.model))}
labels = [{", ".join(map(_quoted, labels))}]
target_modules = ["query", "value"]

[lora]
max_rank = {options.max_rank}
scale = 2.0

[strategy]
name = {_quoted(options.strategy)}

[training]
steps = {options.steps}
batch_size = 16
max_length = 48
learning_rate = 3e-3
warmup_ratio = 0.1

[policy]
rounds = {options.rounds}
target_devices = {len(options.ranks)}
quorum = {len(options.ranks)}
deadline_seconds = 600.0

[evaluation]
ranks = [{", ".join(map(str, sorted(set(options.ranks))))}]
before = false
after = false

[retention]
keep_versions = {options.rounds + 1}
"""


def server_toml(*, http_port: int, grpc_port: int, enrolment_port: int, admin_password: str) -> str:
    """The settings of a server that only this machine reaches; port 0 = any free one."""
    return f"""\
[grpc]
host = "{HOST}"
port = {grpc_port}
public_names = ["{HOST}"]

[enrolment]
host = "{HOST}"
port = {enrolment_port}

[http]
port = {http_port}
admin_password = {_quoted(admin_password)}

[worker]
threads = 1

[log]
format = "console"
"""


def _quoted(text: str) -> str:
    """A TOML string; JSON writes the same."""
    return json.dumps(text, ensure_ascii=False)
