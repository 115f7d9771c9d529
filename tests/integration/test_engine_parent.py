import os
import signal
import subprocess
import sys
from pathlib import Path

import engine_cases as cases
import pytest

PARENT = """
import asyncio, sys
from glora_server.coordinator.ports import InitialiseJob, StrategyChoice
from glora_server.engines.local import LocalEngine

async def main():
    engine = LocalEngine(device="cpu", threads=1)
    strategy = StrategyChoice(name="glora", options={})
    job = InitialiseJob(strategy=strategy, modules=(("m", 8, 8),), dense=(), rank=2, seed=1)
    parts = await engine.initialise(job)
    print(parts[0].name, engine.stats().pid, "torch" in sys.modules, "numpy" in sys.modules, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["idle", "unable to read its pipe"])
def test_parent_needs_no_torch_and_its_death_ends_the_worker(*, stopped: bool) -> None:
    # A script on standard input has no __main__ that could be imported; locale and hash seed must not matter.
    environment = os.environ | {"LC_ALL": "C", "PYTHONHASHSEED": "1"}
    with subprocess.Popen(
        [sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(PARENT)
        parent.stdin.close()
        name, pid, torch_there, numpy_there = parent.stdout.readline().split()
        assert (name, torch_there, numpy_there) == ("m", "False", "False")
        assert Path(f"/proc/{pid}").exists()
        if stopped:
            os.kill(int(pid), signal.SIGSTOP)
        parent.kill()
    cases.until_gone(int(pid))
