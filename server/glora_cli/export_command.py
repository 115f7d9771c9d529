"""`glora export`: a version of a run as a folder that PEFT loads."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from glora_cli.connection import connected
from glora_cli.group import single
from glora_cli.output import JsonFlag, show_json
from glora_cli.rest import Api, at
from glora_dashboard.run_models import ExportAnswer
from glora_wire.errors import GloraError, Reason

app = single()
_MAX_FILES: Final = 100


def export(
    api: Api,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or id of the run.")],
    *,
    rank: Annotated[int, typer.Option(min=1, max=4096, help="Rank to read out; any up to the run's.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; it must not hold anything yet.")],
    flavour: Annotated[
        Literal["peft", "serving"],
        typer.Option(
            help="peft: exact, a rank of its own per module. serving: one rank, alpha = rank (vLLM, llama.cpp)."
        ),
    ] = "peft",
    version: Annotated[
        int | None, typer.Option(min=0, help="Number of the version; left out, the current one.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Download a run's adapter as a PEFT folder.

    \b
    glora export demo --rank 8 --out adapter
    glora export demo --rank 4 --flavour serving --version 3 --out adapter-v3
    """
    try:
        _require_room(out)
        folder = out.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".glora-export-", dir=folder.parent) as beside:
            archive, unpacked = Path(beside) / "adapter.zip", Path(beside) / "adapter"
            headers = api.download(
                at("runs", run, "export"), {"rank": rank, "flavour": flavour, "version_number": version}, archive
            )
            unpack(archive, unpacked)
            unpacked.replace(folder)
    except OSError as error:
        raise GloraError(
            Reason.REQUEST_INVALID, f"{out} cannot be written: {error}. Name another folder with --out."
        ) from None
    record = ExportAnswer.model_validate_json(headers.get("x-glora-export", "{}"))
    if as_json:
        show_json(record)
        return
    typer.echo(f"{out}: version {record.version_number} at rank {record.rank}, {record.modules} modules")
    typer.echo(
        "Load it with:\n"
        "  from peft import PeftModel\n"
        "  model = ...  # the base model of the run\n"
        f"  model = PeftModel.from_pretrained(model, {str(out)!r})",
        err=True,
    )


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of the archive into the new `folder`; raises PAYLOAD_MALFORMED for anything but plain files."""
    try:
        with zipfile.ZipFile(archive) as source:
            names = source.namelist()
            if len(names) > _MAX_FILES or any(Path(name).name != name or name in {"", ".", ".."} for name in names):
                raise _malformed("holds more than the files of an adapter")
            folder.mkdir()
            for name in names:
                with source.open(name) as packed, (folder / name).open("xb") as file:
                    shutil.copyfileobj(packed, file, 1024 * 1024)
    except (zipfile.BadZipFile, EOFError) as error:
        raise _malformed(f"is damaged ({error})") from None


def _malformed(what: str) -> GloraError:
    return GloraError(Reason.PAYLOAD_MALFORMED, f"The archive that the server sent {what}; try again.")


def _require_room(out: Path) -> None:
    if out.exists() and (not out.is_dir() or out.samefile(Path.cwd()) or any(out.iterdir())):
        raise GloraError(Reason.REQUEST_INVALID, f"{out} exists already; name a new or an empty folder with --out.")


app.command()(connected(export))
