"""An index served over HTTP, with a page to search it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from repkit.cli.options import Device
from repkit.cli.printing import say
from repkit.cli.threads import wait_briefly


def serve(
    index: Annotated[Path, typer.Argument(help="a folder that repkit index wrote")],
    host: Annotated[str, typer.Option(help="address to listen on; other machines need a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    images: Annotated[
        Path | None, typer.Option(help="folder of the pictures to show; default: where they were when indexed")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="where the weights are, if not where they were")
    ] = None,
    device: Device = "cpu",
    key_file: Annotated[Path | None, typer.Option(help="keys that may read and write, one a line")] = None,
    read_key_file: Annotated[Path | None, typer.Option(help="keys that may only read, one a line")] = None,
    max_body: Annotated[int, typer.Option(min=1000, help="bytes of a request at most")] = 20_000_000,
    max_queue: Annotated[int, typer.Option(min=1, help="searches that may wait")] = 256,
    restore: Annotated[str | None, typer.Option(help="begin from this snapshot; what came after it is lost")] = None,
    workers_decode: Annotated[int, typer.Option(min=1, help="processes that decode pictures")] = 2,
) -> None:
    """Serve an index over HTTP, with a page to search it by pictures.

    Keys are asked for as Authorization: Bearer KEY once there is a key file. SIGTERM ends the service when what it
    has begun is done.
    """
    wait_briefly()
    from repkit.progress import Progress
    from repkit.service.keys import read_keys
    from repkit.service.settings import Settings

    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is no folder; give the one that the pictures of the index lie in")
    settings = Settings(
        index=index,
        images=images,
        model=model,
        device=device,
        host=host,
        port=port,
        keys=read_keys(key_file, read_key_file),
        max_body=max_body,
        most_waiting=max_queue,
        decoders=workers_decode,
    )
    run = _imported()
    if restore is not None:
        from repkit.service.live import LiveIndex

        LiveIndex.restore(index, restore)
        say(f"restored {restore}")
    with Progress("import", "items") as progress:
        run(settings, _ready, progress)


def _imported() -> Callable[..., None]:
    try:
        from repkit.service.run import serve as run
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("repkit"):
            raise
        raise ValueError(f"no module {error.name}; the service needs pip install 'repkit[serve]'") from error
    return run


def _ready(address: str) -> None:
    print(address, flush=True)
    say("repkit: ready; the page is at this address, Ctrl-C ends the service")
