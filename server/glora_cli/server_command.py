"""`glora server`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glora_cli.group import single
from glora_server.config import Settings, prepare_data_dir, settings_table

app = single()
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings, TOML (default: DATA_DIR/glora.toml, ./glora.toml)."),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Database, keys, blobs and the admin token (~/.local/share/glora)."),
]


@app.command()
def server(
    *,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    grpc_port: Annotated[int | None, typer.Option(help="Where devices work, mutual TLS (7443).")] = None,
    enrolment_port: Annotated[int | None, typer.Option(help="Where devices join (7444).")] = None,
    http_port: Annotated[int | None, typer.Option(help="REST, metrics, health (8080).")] = None,
    http_host: Annotated[str | None, typer.Option(help="Address of the HTTP port (127.0.0.1).")] = None,
    public_name: Annotated[
        list[str] | None, typer.Option(help="A name or address by which devices reach this server; may be repeated.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (info).")] = None,
    show_settings: Annotated[bool, typer.Option("--show-settings", help="List every setting and exit.")] = False,
) -> None:
    """Run the server until it is told to stop.

    \b
    glora server                                       all defaults, data in ~/.local/share/glora
    glora server --data-dir /srv/glora --public-name glora.example.org
    GLORA__HTTP__PORT=9090 glora server                every setting has a variable: --show-settings

    The first start makes the certificate authority and writes admin.token into the data folder.
    """
    if show_settings:
        typer.echo(settings_table(), nl=False)
        return
    flags: dict[str, object] = {
        "grpc.port": grpc_port,
        "enrolment.port": enrolment_port,
        "http.port": http_port,
        "http.host": http_host,
        "grpc.public_names": tuple(public_name) if public_name else None,
        "log.level": log_level,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = Settings.load(config, data_dir, overrides=given)
    prepare_data_dir(settings.data_dir)
    from glora_server.main import serve

    serve(settings)
