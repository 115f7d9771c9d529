"""Print what some extras of pyproject.toml need, one a line: `python3 requirements.py pyproject.toml server postgres`.

Images install that before the sources are there, so that a change of the sources makes one small layer anew.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

_OWN = re.compile(r"glora\[([a-z, ]+)\]")


def requirements(project: Mapping[str, object], extras: Iterable[str]) -> Iterator[str]:
    """Every requirement of `extras`, those of extras that they name included; raises SystemExit for an unknown one."""
    known = project["optional-dependencies"]
    if not isinstance(known, Mapping):
        sys.exit("pyproject.toml has no table of optional dependencies.")
    for extra in extras:
        if extra not in known:
            sys.exit(f"There is no extra {extra!r}; there are {', '.join(known)}.")
        for requirement in known[extra]:
            own = _OWN.fullmatch(requirement)
            if own is None:
                yield requirement
            else:
                yield from requirements(project, (name.strip() for name in own[1].split(",")))


def _main(arguments: Sequence[str]) -> None:
    path, *extras = arguments
    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"]
    found = [*project["dependencies"], *requirements(project, extras)]
    sys.stdout.write("".join(f"{line}\n" for line in dict.fromkeys(found)))


if __name__ == "__main__":
    _main(sys.argv[1:])
