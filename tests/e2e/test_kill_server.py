"""kill -9 of either side, cut and silent networks: the round ends with every update that had been received.

One server and two devices for all tests; each test has a run of one round. The slow device uploads through a proxy,
which holds a transfer in its middle until harm is done.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_data import manifest_of, minilm, run_toml, some_rows
from federation import Federation, completed
from glora_processes import Process, until
from tcp_proxy import TcpProxy

from glora_dashboard.models import ProgressAnswer
from glora_dashboard.run_models import RoundAnswer, RunAnswer
from glora_wire.digests import Digest
from glora_wire.streams import MAX_CHUNK_BYTES

pytestmark = pytest.mark.e2e

QUICK_RANK, SLOW_RANK = 8, 128
UPLOAD_BYTES = 12 * 768 * 4 * SLOW_RANK
"""Of the slow device, nearly: five chunks."""
RECEIVED = "glora_received_bytes_total"
MOST = 0.6
"""So much of an upload goes through the proxy before harm is done; a chunk that is cut is sent again."""
AGAIN = 1.4
"""What may go through in all; without resuming it would be 1 + MOST at least."""


@dataclass(eq=False)
class World:
    """Everything that the tests share."""

    federation: Federation
    proxy: TcpProxy
    folder: Path
    server: Process
    quick: Process
    slow: Process

    def start_quick(self) -> Process:
        return self.federation.start_device("quick", minilm(), "--data", str(self.folder / "quick.jsonl"))

    def start_slow(self) -> Process:
        return self.federation.start_device("slow", minilm(), "--data", str(self.folder / "slow.jsonl"))

    def begin(self, name: str, *, steps: int = 2) -> None:
        """Start a run of one round that needs both devices."""
        toml = run_toml(
            name,
            minilm(),
            lora=f"max_rank = {SLOW_RANK}",
            training=f"steps = {steps}\nbatch_size = 8\nmax_length = 48",
            policy="rounds = 1\ntarget_devices = 2\nquorum = 2\ndeadline_seconds = 1200.0",
            evaluation="ranks = [8]\nbefore = false\nafter = false",
        )
        self.federation.until_online("quick", "slow", within=300.0)
        self.federation.create_run(toml, manifest_of(toml))

    def wait_for(self, name: str, device: str, phase: str) -> None:
        def reached(run: RunAnswer) -> bool:
            found = run.round.assignments if run.round is not None else []
            return any(item.device == device and item.phase == phase for item in found)

        self.federation.wait_run(name, reached, f"{device} is {phase}", 600.0)

    def hold_next_upload(self) -> int:
        """Let most of the slow device's upload through and then nothing; what had gone through before it."""
        before = self.proxy.bytes_up
        self.proxy.hold_at = before + int(MOST * UPLOAD_BYTES)
        return before

    def wait_for_hold(self, name: str) -> None:
        """Return when the server has every whole chunk of what the proxy let through, and waits for more."""
        whole = int(MOST * UPLOAD_BYTES) // MAX_CHUNK_BYTES * MAX_CHUNK_BYTES

        def held(run: RunAnswer) -> bool:
            progress = progress_of(run, "slow")
            return progress is not None and progress.phase == "uploading" and progress.done >= whole

        self.federation.wait_run(name, held, "most of the upload has gone out", 600.0)

    def uploads(self, name: str) -> dict[str, str]:
        """Digest by assignment, from the database file."""
        found = self.federation.rows(
            "SELECT u.assignment_id, u.digest FROM uploads u JOIN rounds r ON r.id = u.round_id "
            "JOIN runs ON runs.id = r.run_id WHERE runs.name = ?",
            name,
        )
        return {str(assignment): str(digest) for assignment, digest in found}

    def kill_server(self) -> None:
        self.server.popen.send_signal(signal.SIGSTOP)  # it comes no further while its worker is looked for
        children = descendants(self.server.popen.pid)
        self.server.kill()
        self.proxy.hold_at = None
        until(lambda: not any(running(pid) for pid in children), "the server's worker ends with it", 120.0)

    def finish(self, name: str) -> RoundAnswer:
        """The run's only round, committed at the first attempt with both updates."""
        self.federation.wait_run(name, completed, "its end", 600.0)
        (only,) = self.federation.rounds(name)
        assert (only.phase, only.attempt, only.accepted) == ("committed", 1, 2)
        return only

    def trained_once(self, name: str, process: Process) -> None:
        assert process.text.count(f"Round 1 of {name}: training") == 1, "what was received was made again"


def aggregates(run: RunAnswer) -> bool:
    return run.round is not None and run.round.phase == "aggregating"


def progress_of(run: RunAnswer, device: str) -> ProgressAnswer | None:
    found = run.round.assignments if run.round is not None else []
    return next((item.progress for item in found if item.device == device), None)


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(word) for word in found.stdout.split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kill")
    some_rows(folder / "quick.jsonl", 60)
    some_rows(folder / "slow.jsonl", 60, seed=2)
    with Federation(folder / "federation") as federation, TcpProxy(target=federation.ports.grpc) as proxy:
        server = federation.start_server()
        federation.join("quick", QUICK_RANK)
        federation.join("slow", SLOW_RANK, through=proxy.port)
        quick = federation.start_device("quick", minilm(), "--data", str(folder / "quick.jsonl"))
        slow = federation.start_device("slow", minilm(), "--data", str(folder / "slow.jsonl"))
        yield World(federation=federation, proxy=proxy, folder=folder, server=server, quick=quick, slow=slow)


@pytest.fixture(autouse=True)
def well_again(world: World) -> Iterator[None]:
    """Whatever a test did to the network ends with it."""
    yield
    world.proxy.hold_at = None
    world.proxy.refusing = False
    world.proxy.pass_on()


def test_server_killed_while_collecting(world: World) -> None:
    before = world.hold_next_upload()
    world.begin("collecting")
    world.wait_for("collecting", "quick", "accepted_update")
    world.wait_for_hold("collecting")
    received = world.uploads("collecting")
    assert len(received) == 1, "the quick one's is in, the slow one's is not"
    world.kill_server()
    assert world.uploads("collecting") == received
    world.server = world.federation.start_server()
    world.finish("collecting")
    assert received.items() <= world.uploads("collecting").items()
    world.trained_once("collecting", world.quick)
    world.trained_once("collecting", world.slow)
    assert world.quick.alive
    assert world.slow.alive
    assert world.proxy.bytes_up - before < AGAIN * UPLOAD_BYTES, "the upload began anew"


def test_server_killed_while_aggregating(world: World) -> None:
    for attempt in range(5):
        name = f"aggregating-{attempt}"
        world.begin(name)
        world.federation.wait_run(name, lambda run: aggregates(run) or completed(run), "aggregation", 600.0)
        world.kill_server()
        (phase,) = world.federation.rows(
            "SELECT rounds.phase FROM rounds JOIN runs ON runs.id = rounds.run_id WHERE runs.name = ?", name
        )
        received = world.uploads(name)
        world.server = world.federation.start_server()
        world.finish(name)
        assert world.uploads(name) == received
        world.trained_once(name, world.quick)
        world.trained_once(name, world.slow)
        assert world.federation.show_run(name).version_number == 1
        if phase == ("aggregating",):
            return
    pytest.fail("aggregation was over before the kill, five times")


def test_device_killed_while_uploading(world: World) -> None:
    before, received = world.hold_next_upload(), world.federation.metric(RECEIVED)
    world.begin("mid-upload")
    world.wait_for_hold("mid-upload")
    world.slow.kill()
    world.proxy.cut()
    world.proxy.hold_at = None
    world.slow = world.start_slow()
    world.finish("mid-upload")
    world.trained_once("mid-upload", world.slow)
    assert "An update for round 1 of mid-upload waits; sending it." in world.slow.text
    assert world.proxy.bytes_up - before < AGAIN * UPLOAD_BYTES, "the upload began anew"
    # What is not a whole chunk does not count, so the server has taken every byte once.
    sizes = [Digest.parse(digest).size for digest in world.uploads("mid-upload").values()]
    assert world.federation.metric(RECEIVED) - received == sum(sizes)


def test_device_killed_while_training(world: World) -> None:
    world.begin("mid-training", steps=40)

    def training(run: RunAnswer) -> bool:
        progress = progress_of(run, "quick")
        return progress is not None and progress.phase == "training"

    world.federation.wait_run("mid-training", training, "training", 900.0)
    time.sleep(random.uniform(0.0, 0.5))
    children = descendants(world.quick.popen.pid)
    world.quick.kill()
    until(lambda: not any(running(pid) for pid in children), "the training process ends with its agent", 120.0)
    world.quick = world.start_quick()
    world.finish("mid-training")


@pytest.mark.parametrize("harm", ["cut", "silence"])
def test_network_breaks_in_the_middle_of_an_upload(world: World, harm: str) -> None:
    before = world.hold_next_upload()
    world.begin(harm)
    world.wait_for_hold(harm)
    if harm == "silence":
        world.proxy.swallow()
        time.sleep(1.0)
    world.proxy.refusing = True
    world.proxy.cut()
    world.proxy.hold_at = None
    world.federation.show_run(harm)
    time.sleep(0.5)
    world.proxy.pass_on()
    world.proxy.refusing = False
    world.finish(harm)
    world.trained_once(harm, world.slow)
    assert world.proxy.bytes_up - before < AGAIN * UPLOAD_BYTES, "the upload began anew"
