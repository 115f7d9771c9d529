"""/api/v1/runs/NAME/export: a PEFT folder as a zip archive."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from glora_dashboard.bodies import ExportOrder, Name
from glora_dashboard.permission import Operator
from glora_dashboard.places import Places
from glora_dashboard.ports import Commands
from glora_dashboard.run_models import ExportAnswer
from glora_server.coordinator.views import ExportRecord

MOST_AT_ONCE: Final = 4
"""Exports that are made or sent at the same time: each has a whole adapter in the data folder, twice for a moment."""


class _Archive(FileResponse):
    """A file that is sent piece by piece and removed with its folder when that is over, however it ends."""

    def __init__(
        self, path: Path, *, filename: str, headers: Mapping[str, str], folder: Path, done: Callable[[], None]
    ) -> None:
        super().__init__(path, media_type="application/zip", filename=filename, headers=headers)
        self._folder = folder
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file; a client that goes away leaves nothing behind."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True))


def export_routes(commands: Commands, work_dir: Path) -> APIRouter:
    """The route that exports; `work_dir` holds the archive while it is being sent."""
    routes = APIRouter(prefix="/runs", tags=["exports"])
    places = Places(MOST_AT_ONCE, "exports are going on")

    @routes.post("/{name}/export", response_class=FileResponse, responses={200: {"content": {"application/zip": {}}}})
    async def export(actor: Operator, name: Name, body: ExportOrder) -> FileResponse:
        """A version read out at a rank, as a zip of a PEFT folder; X-Glora-Export says what it is."""
        places.take()
        try:
            folder = await asyncio.to_thread(_make_folder, work_dir)
        except BaseException:
            places.give_back()
            raise
        try:
            record = await commands.export(
                actor,
                name,
                rank=body.rank,
                version_number=body.version_number,
                flavour=body.flavour,
                folder=folder / "adapter",
            )
            archive = await asyncio.to_thread(_pack, record, folder / "adapter.zip")
        except BaseException:
            places.give_back()
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        return _Archive(
            archive,
            filename=f"{name}-v{record.version_number}-r{record.rank}-{record.flavour}.zip",
            headers={"X-Glora-Export": ExportAnswer.of(record).model_dump_json(), "Cache-Control": "no-store"},
            folder=folder,
            done=places.give_back,
        )

    return routes


def _make_folder(work_dir: Path) -> Path:
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="export-", dir=work_dir))


def _pack(record: ExportRecord, archive: Path) -> Path:
    """Write the files into an archive, uncompressed: weights do not shrink."""
    with zipfile.ZipFile(archive, "x", zipfile.ZIP_STORED, allowZip64=True) as target:
        for name in record.files:
            target.write(record.folder / name, name)
            (record.folder / name).unlink()
    shutil.rmtree(record.folder, ignore_errors=True)
    return archive
