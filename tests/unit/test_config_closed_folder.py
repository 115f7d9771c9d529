"""A data folder that this user may not look into: the settings are those without a file, the folder says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from glora_server.config import CONFIG_NAME, Settings


def test_a_folder_that_cannot_be_looked_into_holds_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Path] = []

    def refuse(path: Path) -> bool:
        looked_at.append(path)
        raise PermissionError(13, "Permission denied", str(path))  # as for somebody else's folder with mode 0700

    monkeypatch.setattr(Path, "is_file", refuse)
    settings = Settings.load(data_dir=tmp_path, env={})
    assert tmp_path / CONFIG_NAME in looked_at
    assert settings.data_dir == tmp_path
    assert settings.http.port == 8080
