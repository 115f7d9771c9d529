"""The texts of the demo: documentation of the running Python's standard library, labelled by topic.

Every Python installation carries them, so nothing is downloaded and nothing is copied. Sources are parsed, never
imported: some modules open windows, print poems or start listening when they are imported.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glora_wire.errors import GloraError, Reason

MIN_CHARACTERS: Final = 40
MAX_CHARACTERS: Final = 400
_FEWEST_ROWS: Final = 1000
"""Installations without sources (frozen, zipped) have fewer."""

TOPICS: Final = {
    "concurrency": """
        _threading_local asyncio asyncore concurrent contextvars multiprocessing queue selectors signal subprocess
        threading""",
    "data formats": """
        base64 binascii configparser copyreg csv dbm email html json mailbox mailcap mimetypes pickle pickletools
        plistlib quopri shelve sqlite3 tomllib uu uuid xdrlib xml""",
    "development": """
        _py_abc abc ast bdb cProfile code codeop compileall contextlib dataclasses dis doctest ensurepip enum functools
        importlib inspect modulefinder opcode pdb pkgutil profile pstats py_compile pyclbr pydoc rlcompleter runpy
        symtable sysconfig timeit trace traceback tracemalloc types typing unittest venv warnings weakref zipapp
        zipimport""",
    "files": """
        _compression _pyio bz2 filecmp fileinput fnmatch genericpath glob gzip io linecache lzma ntpath nturl2path os
        pathlib posixpath shutil stat tarfile tempfile zipfile""",
    "network": """
        asynchat cgi cgitb ftplib http imaplib ipaddress netrc nntplib poplib smtpd smtplib socket socketserver ssl
        telnetlib urllib webbrowser wsgiref xmlrpc""",
    "numbers": """
        _pydecimal bisect colorsys decimal fractions graphlib hashlib heapq hmac numbers random secrets statistics""",
    "text": """
        _markupbase codecs difflib encodings gettext keyword locale pprint re reprlib shlex sre_compile sre_parse string
        stringprep tabnanny textwrap token tokenize""",
    "time and interface": """
        _pydatetime _strptime argparse calendar cmd curses datetime getopt getpass optparse sched tkinter turtle
        turtledemo zoneinfo""",
}
"""Modules and packages of the standard library by topic; those of no clear topic (sys, logging) are left out."""


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """A text and the name of its class."""

    text: str
    label: str


def collect_corpus(root: Path | None = None) -> tuple[Row, ...]:
    """Paragraphs of documentation with their topics, each text once, the same for the same Python.

    `root` is the folder of the standard library. Raises DATA_EMPTY when it has no sources.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    labels: dict[str, set[str]] = {}
    for topic, modules in TOPICS.items():
        for module in modules.split():
            for path in _sources(folder, module):
                for text in _paragraphs(path):
                    labels.setdefault(text, set()).add(topic)
    rows = tuple(sorted(Row(text, *topics) for text, topics in labels.items() if len(topics) == 1))
    if len(rows) < _FEWEST_ROWS:
        raise GloraError(
            Reason.DATA_EMPTY,
            f"The standard library in {folder} has only {len(rows)} paragraphs of documentation, so it has no "
            "sources; use another Python, or give texts of your own with --data FILE.",
            rows=len(rows),
        )
    return rows


def _sources(folder: Path, module: str) -> Iterator[Path]:
    """The files of a module or package, without its tests, in a fixed order."""
    single, package = folder / f"{module}.py", folder / module
    if single.is_file():
        yield single
    for path in sorted(package.rglob("*.py")):
        if not {"test", "tests", "idle_test"} & set(path.relative_to(package).parts):
            yield path


def _paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs of a usable length in the documentation of a file's modules, classes and functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that newer Pythons frown upon
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and samples of broken code lie among the sources
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(ast.get_docstring(node, clean=False) or "")):
                text = " ".join(paragraph.split())
                if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and ">>>" not in text:
                    yield text
