"""`rite doctor` and `rite studio`. Heavy imports are inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from rite_diffusion.cli.settings import say

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Show versions, devices and missing packages, with the command that installs them."""
    from rite_diffusion.api.doctor import examine
    from rite_diffusion.cli.output import describe_findings

    describe_findings(examine())


@app.command()
def studio(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(envvar="RITE_AUTH", help="user:password; several times for several users."),
    ] = None,
    workspace: Annotated[
        Path, typer.Option(help="Folder for photos, runs, adapters and pictures.")
    ] = Path("studio"),
    share: Annotated[
        bool, typer.Option("--share", help="A public link through gradio.live; needs --auth.")
    ] = False,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also serve as tools for assistants (MCP).")
    ] = False,
) -> None:
    """Serve the web page: train, generate, fuse, compare, manage adapters."""
    from rite_diffusion.studio.serve import Settings, launch

    page = launch(Settings(workspace, host, port, tuple(auth or ()), share, mcp))
    say(f"studio      {page.local_url}")
    if page.share_url:
        say(f"public      {page.share_url}")
    say(f"workspace   {workspace.absolute()}")
    print("Ctrl-C ends the studio; trainings go on and are found again.", flush=True)
    page.block_thread()
