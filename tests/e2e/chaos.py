"""python tests/e2e/chaos.py --minutes 5: kill -9 of server and devices until the time is over; then all must be well.

Prints what was done and how it ended; exit code 1, with the logs, when an update was lost or the run did not end.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from chaos_run import Chaos
from federation import LIVE


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a federation's processes at random moments.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kills", type=int, default=20, help="at least so many")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    sys.stdout.write(f"seed {options.seed}\n")
    with tempfile.TemporaryDirectory(prefix="glora-chaos-") as folder:
        chaos = Chaos(folder=Path(folder) / "chaos", random=random.Random(options.seed))
        try:
            report = chaos.run(kills=options.kills, seconds=60.0 * options.minutes)
        except AssertionError as error:
            for federation in list(LIVE):
                for name, text in federation.logs():
                    sys.stdout.write(f"--- {name}\n{text}\n")
            sys.stdout.write(f"{chaos.report.kills}\n{error}\n")
            return 1
    sys.stdout.write(f"{report}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
