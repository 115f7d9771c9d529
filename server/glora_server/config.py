"""Settings: flags win over the environment, the environment over the TOML file, the file over defaults.

Read once, in `main`; parts get their own section. A key that is not known is refused wherever it comes from, because
a misspelt limit that is silently ignored is worse than a server that does not start. The sources are read and merged
here rather than by a library, so that an error can say which one a value came from: file and line, variable or flag.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, Field, SecretStr, ValidationError

from glora_server.coordinator.toml_lines import key_lines, line_of
from glora_server.settings_sections import (
    BlobSettings,
    DatabaseSettings,
    EnrolmentSettings,
    GrpcSettings,
    HttpSettings,
    LogSettings,
    SecuritySettings,
    SettingsSection,
    WorkerSettings,
)
from glora_server.validation_text import Location, Problem, nearest, problems_of
from glora_wire.errors import GloraError, Reason

__all__ = [
    "BlobSettings",
    "DatabaseSettings",
    "EnrolmentSettings",
    "GrpcSettings",
    "HttpSettings",
    "LogSettings",
    "SecuritySettings",
    "Settings",
    "WorkerSettings",
    "default_data_dir",
    "prepare_data_dir",
    "settings_table",
]

ENVIRONMENT_PREFIX: Final = "GLORA__"
CONFIG_NAME: Final = "glora.toml"
_SECRET: Final = frozenset({("database", "url"), ("http", "admin_password")})


def default_data_dir(env: Mapping[str, str]) -> Path:
    """$GLORA_DATA_DIR, else glora in the user's data folder (~/.local/share/glora)."""
    if named := env.get("GLORA_DATA_DIR", ""):
        return Path(named).expanduser()
    shared = env.get("XDG_DATA_HOME", "")
    return (Path(shared) if shared else Path.home() / ".local" / "share") / "glora"


class Settings(SettingsSection):
    """All sections. Made with `Settings.load`."""

    data_dir: Path = Field(
        default_factory=lambda: default_data_dir(os.environ),
        description="Folder for the database, keys, blobs and the admin token; made when it is missing.",
    )
    grpc: GrpcSettings = GrpcSettings()
    enrolment: EnrolmentSettings = EnrolmentSettings()
    http: HttpSettings = HttpSettings()
    database: DatabaseSettings = DatabaseSettings()
    blobs: BlobSettings = BlobSettings()
    worker: WorkerSettings = WorkerSettings()
    security: SecuritySettings = SecuritySettings()
    log: LogSettings = LogSettings()

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL that is meant, secrets included; SQLite in the data folder by default."""
        return self.database.url.get_secret_value() or f"sqlite:///{self.data_dir / 'glora.sqlite3'}"

    @classmethod
    def load(
        cls,
        config: Path | None = None,
        data_dir: Path | None = None,
        env: Mapping[str, str] = os.environ,
        overrides: Mapping[str, object] | None = None,
    ) -> Self:
        """The settings of a file (`config`, else DATA_DIR/glora.toml, else ./glora.toml), the environment and flags.

        `overrides` are flags by dotted name ("http.port"). Raises SETTINGS_INVALID, naming file, line and key, the
        variable or the flag, for every value that is wrong or not known.
        """
        flags = _nested((tuple(name.split(".")), value) for name, value in (overrides or {}).items())
        if data_dir is not None:
            flags["data_dir"] = str(data_dir)
        environment = _from_environment(env, cls)
        base = data_dir or Path(str(environment.get("data_dir", default_data_dir(env))))
        source = _read_file(_config_path(config, base))
        merged = _merged(_merged(source.tables, environment), flags)
        merged.setdefault("data_dir", str(default_data_dir(env)))
        try:
            settings = cls.model_validate(merged)
        except ValidationError as error:
            problems = problems_of(error, cls)
        else:
            return settings.model_copy(update={"data_dir": settings.data_dir.expanduser().absolute()})
        raise _invalid(_sentence(problem, source, environment, flags) for problem in problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """What a settings file holds; empty when there is none."""

    path: Path | None = None
    text: str = ""
    tables: Mapping[str, object]


def _config_path(config: Path | None, data_dir: Path) -> Path | None:
    if config is not None:
        return config
    for candidate in (data_dir.expanduser() / CONFIG_NAME, Path(CONFIG_NAME)):
        # Where this user may not even look, using the data folder says what is wrong.
        with contextlib.suppress(PermissionError):
            if candidate.is_file():
                return candidate
    return None


def _read_file(path: Path | None) -> _File:
    if path is None:
        return _File(tables={})
    try:
        text = path.read_text(encoding="utf-8")
        return _File(path=path, text=text, tables=tomllib.loads(text))
    except OSError as error:
        raise _invalid([f"The settings file {path} cannot be read: {error.strerror or error}."]) from None
    except UnicodeDecodeError:
        raise _invalid([f"The settings file {path} is not UTF-8 text."]) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _invalid([f"The settings file {path} is not TOML: {error}."]) from None


def _from_environment(env: Mapping[str, str], model: type[BaseModel]) -> dict[str, object]:
    known = sorted(_variables(model))
    found: list[tuple[Location, object]] = []
    wrong: list[str] = []
    for name in sorted(env):
        if not name.upper().startswith(ENVIRONMENT_PREFIX):
            continue
        if name.upper() in known:
            found.append((tuple(name[len(ENVIRONMENT_PREFIX) :].lower().split("__")), env[name]))
        else:
            wrong.append(f"The environment variable {name} is not a setting; {_meant(name.upper(), known)}")
    if wrong:
        raise _invalid(wrong)
    return _nested(found)


def _meant(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.endswith("?") else "`glora server --help` says where the settings are listed."


def _variables(model: type[BaseModel]) -> Iterator[str]:
    for location, _ in _keys(model):
        yield ENVIRONMENT_PREFIX + "__".join(location).upper()


def _keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every setting with its description."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, (*prefix, name))
        else:
            yield (*prefix, name), field.description or ""


def _nested(values: Iterable[tuple[Location, object]]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for location, value in values:
        branch: object = value
        for part in reversed(location):
            branch = {str(part): branch}
        tree = _merged(tree, branch if isinstance(branch, dict) else {})
    return tree


def _merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Both tables in one; where both have a value the one from `above`."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _sentence(problem: Problem, source: _File, environment: Mapping[str, object], flags: Mapping[str, object]) -> str:
    shown = problem if problem.location not in _SECRET else Problem(location=problem.location, text="is not usable")
    if _holds(flags, problem.location):
        return shown.sentence("command line")
    if _holds(environment, problem.location):
        variable = ENVIRONMENT_PREFIX + "__".join(map(str, problem.location)).upper()
        return shown.sentence(f"environment variable {variable}")
    line = line_of(key_lines(source.text), problem.location)
    return shown.sentence(f"{source.path or 'settings'}" + (f" line {line}" if line else ""))


def _holds(tables: Mapping[str, object], location: Location) -> bool:
    branch: object = tables
    for part in location:
        if not isinstance(branch, Mapping) or part not in branch:
            return False
        branch = branch[str(part)]
    return bool(location)


def _invalid(sentences: Iterable[str]) -> GloraError:
    return GloraError(Reason.SETTINGS_INVALID, "\n".join(sentences))


def prepare_data_dir(path: Path) -> Path:
    """The folder, made (0700) where it was missing and tried out; raises DATA_DIR_UNUSABLE with what to do."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise _unusable(path, "is not a folder", "name another one with --data-dir") from None
    except OSError as error:
        raise _unusable(path, f"cannot be made ({error.strerror})", "name another one with --data-dir") from None
    try:
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"glora")
    except OSError as error:
        advice = "make it writable for this user, free some space, or name another one with --data-dir"
        raise _unusable(path, f"cannot be written to ({error.strerror})", advice) from None
    return path


def _unusable(path: Path, what: str, advice: str) -> GloraError:
    return GloraError(Reason.DATA_DIR_UNUSABLE, f"The data folder {path} {what}; {advice}.", path=path)


def settings_table() -> str:
    """Every setting as a Markdown table: key, environment variable, default, meaning."""
    rows = ["| setting | environment | default | meaning |", "|---|---|---|---|"]
    for location, description in _keys(Settings):
        variable = ENVIRONMENT_PREFIX + "__".join(location).upper()
        rows.append(f"| `{'.'.join(location)}` | `{variable}` | {_default(location)} | {description} |")
    return "\n".join(rows) + "\n"


def _default(location: tuple[str, ...]) -> str:
    if location == ("data_dir",):
        return "`$GLORA_DATA_DIR` or `~/.local/share/glora`"
    value: object = Settings(data_dir=Path())
    for part in location:
        value = getattr(value, part)
    text = json.dumps(value.get_secret_value() if isinstance(value, SecretStr) else value)
    return f"`{text}`"
