"""/api/v1/runs/NAME/export: a PEFT folder as a zip archive."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import zipfile
from pathlib import Path

from fastapi import APIRouter
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from glora_dashboard.bodies import ExportOrder, Name
from glora_dashboard.permission import Operator
from glora_dashboard.ports import Commands
from glora_dashboard.run_models import ExportAnswer
from glora_server.coordinator.views import ExportRecord


def export_routes(commands: Commands, work_dir: Path) -> APIRouter:
    """The route that exports; `work_dir` holds the archive while it is being sent."""
    routes = APIRouter(prefix="/runs", tags=["exports"])

    @routes.post("/{name}/export", response_class=FileResponse, responses={200: {"content": {"application/zip": {}}}})
    async def export(actor: Operator, name: Name, body: ExportOrder) -> FileResponse:
        """A version read out at a rank, as a zip of a PEFT folder; X-Glora-Export says what it is."""
        folder = await asyncio.to_thread(_make_folder, work_dir)
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
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        return FileResponse(
            archive,
            media_type="application/zip",
            filename=f"{name}-v{record.version_number}-r{record.rank}-{record.flavour}.zip",
            headers={"X-Glora-Export": ExportAnswer.of(record).model_dump_json(), "Cache-Control": "no-store"},
            background=BackgroundTask(shutil.rmtree, folder, ignore_errors=True),
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
    shutil.rmtree(record.folder, ignore_errors=True)
    return archive
