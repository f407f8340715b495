"""Commands for the storage of studies: storage serve, storage copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.terminal import Storage

app = typer.Typer(help="Serve the studies to many workers, or copy them to another database.", no_args_is_help=True)


@app.command()
def serve(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="The interface to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 13000,
) -> None:
    """Serve a storage through Optuna's gRPC proxy. Workers use it as --storage grpc://HOST:PORT.

    It has no password: listen on a network only where you trust everybody. Example: tuner storage serve --host 10.0.0.5
    """
    from tuner.study.servers import serve
    from tuner.study.storage import open_storage

    with serve(open_storage(storage, must_exist=True), host, port) as server:
        print(f"serving at grpc://{host}:{port}", flush=True)
        server.wait_for_termination()


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Database URL.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TO", help="Database URL.", show_default=False)],
    study: Annotated[
        list[str] | None, typer.Option(help="Copy only this study and its full runs. May be repeated.")
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder of the files of studies that are in no SQLite file.")] = Path(
        "runs"
    ),
) -> None:
    """Copy studies with all they have to another database. Stop their launches first.

    Example: tuner storage copy sqlite:///runs/tuner.db postgresql://me@host/studies
    """
    from tuner.study.storage import open_storage
    from tuner.study.storage_copy import copy_studies

    copied = copy_studies(open_storage(source, must_exist=True), open_storage(target), study, run_root=run_root)
    for name, num_trials in copied.items():
        print(f"{name}: {num_trials} trials")
