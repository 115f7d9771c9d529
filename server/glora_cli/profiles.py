"""Profiles: which servers the command line knows, each with its token, in a file that only the user may read.

~/.config/glora/profiles.json     ($XDG_CONFIG_HOME/glora/profiles.json)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glora_server.security.private_files import private_folder, read_private, replace_private
from glora_wire.errors import GloraError, Reason

_FILE: Final = "profiles.json"


class Profile(BaseModel):
    """One server and how to come in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    token: str = Field(repr=False)
    user: str = ""
    ca: str = ""
    """File with the certificate of the authority that signed the server's."""


class Profiles(BaseModel):
    """All profiles by name, and which one counts where none is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    current: str = ""
    profiles: Mapping[str, Profile] = Field(default_factory=dict)

    def named(self, name: str) -> Profile:
        """The profile; raises SETTINGS_INVALID naming the ones that there are."""
        if name not in self.profiles:
            known = ", ".join(sorted(self.profiles)) or "none yet; make one with `glora login`"
            raise GloraError(Reason.SETTINGS_INVALID, f"There is no profile {name!r}; there are: {known}.")
        return self.profiles[name]

    def with_profile(self, name: str, profile: Profile) -> Profiles:
        """These and one more, which counts from now on."""
        return Profiles(current=name, profiles={**self.profiles, name: profile})

    def using(self, name: str) -> Profiles:
        """The same, with another one that counts; raises SETTINGS_INVALID."""
        self.named(name)
        return Profiles(current=name, profiles=self.profiles)

    def without(self, name: str) -> Profiles:
        """These but one; raises SETTINGS_INVALID."""
        self.named(name)
        left = {key: profile for key, profile in self.profiles.items() if key != name}
        return Profiles(current="" if self.current == name else self.current, profiles=left)


def profiles_path(env: Mapping[str, str] = os.environ) -> Path:
    """Where this user's profiles are."""
    base = env.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base else Path.home() / ".config") / "glora" / _FILE


def load_profiles(path: Path | None = None) -> Profiles:
    """The profiles of this user; raises SETTINGS_INVALID, and DATA_DIR_UNUSABLE when others could read them."""
    path = path or profiles_path()
    content = read_private(path)
    if content is None:
        return Profiles()
    try:
        return Profiles.model_validate_json(content)
    except ValidationError:
        raise GloraError(
            Reason.SETTINGS_INVALID, f"{path} is damaged; delete it and make the profiles again with `glora login`."
        ) from None


def save_profiles(profiles: Profiles, path: Path | None = None) -> None:
    """Write the file (mode 0600) in one step; raises DATA_DIR_UNUSABLE."""
    path = path or profiles_path()
    private_folder(path.parent)
    replace_private(path, profiles.model_dump_json(indent=2).encode())
