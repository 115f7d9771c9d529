"""The allocator keeps the buffers of transfers, in few heaps however many threads there are."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROBE = """
import sys, threading
from glora_wire.buffers import keep_buffers

taken = keep_buffers(arenas=int(sys.argv[1]))
size = 4 * 1024 * 1024

over = threading.Event()

def work(done):
    bytes(bytearray(b"x" * size))  # made, touched and given back
    done.set()
    over.wait()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
for _ in range(16):  # one after the other, and all stay
    done = threading.Event()
    threading.Thread(target=work, args=(done,)).start()
    done.wait()
print(int(taken), (resident() - before) // size)
over.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize("arenas", [1, 2])
def test_threads_use_the_buffers_of_those_before_them(arenas: int) -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE, str(arenas)], capture_output=True, text=True, check=True)
    taken, kept = map(int, done.stdout.split())
    if not taken:
        pytest.skip("this libc has no mallopt")
    assert kept <= 4 * arenas
