"""`python -m glora_cli.demo_child PARENT ARGUMENTS…`: the `glora` command in a process that ends with its parent.

For `glora demo`: killed in whatever way, it leaves no server and no device behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def _main(arguments: list[str]) -> None:
    parent = int(arguments[0])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("The process that started this one has ended.")
    sys.argv = ["glora", *arguments[1:]]
    from glora_cli.main import main

    main()


if __name__ == "__main__":
    _main(sys.argv[1:])
