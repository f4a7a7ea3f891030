"""From `rite studio` to a page that listens; Gradio is imported once everything is checked."""

import json
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import psutil

from rite_diffusion.errors import OutputError, StudioError
from rite_diffusion.files.writing import folder_output, read_json, write_atomically
from rite_diffusion.studio.access import gatekeeper, read_logins, refuse_open_door
from rite_diffusion.studio.jobs import living
from rite_diffusion.studio.workspace import Workspace

LARGEST_UPLOAD = "1gb"  # of one file; an SDXL adapter of rank 128 has this size
WAITING = 64  # requests that may wait
KNOWN_HOSTS = ["127.0.0.1", "localhost"]


@dataclass(frozen=True)
class Settings:
    """What `rite studio` is told."""

    workspace: Path = Path("studio")
    host: str = "127.0.0.1"
    port: int | None = 7860  # None: the first that is free from 7860
    auth: tuple[str, ...] = ()  # user:password
    share: bool = False
    mcp: bool = False


def launch(settings: Settings):
    """Start serving and return Gradio's page, whose `block_thread` waits and `close` ends it.

    StudioError where the door would stand open, the workspace cannot be written or is in use, or
    the port is taken.
    """
    logins = read_logins(settings.auth)
    refuse_open_door(settings.host, settings.share, logins)
    if settings.mcp and find_spec("mcp") is None:
        raise StudioError("--mcp needs one more package: pip install 'gradio[mcp]'.")
    root = _take(_folder(settings.workspace))
    # Uploads and copies for the page lie here; nothing else of the workspace is served.
    shutil.rmtree(root / ".page", ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(root / ".page")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # prompts are kept here, not in browsers

    from rite_diffusion.studio.app import build
    from rite_diffusion.studio.state import Studio
    from rite_diffusion.studio.theme import CSS, theme

    for user in logins:
        Workspace(root / "users" / user).folder("runs")
    studio = Studio(root, bool(logins))
    page = build(studio)
    page.queue(max_size=WAITING)
    try:
        page.launch(
            server_name=settings.host,
            server_port=settings.port,
            auth=cast(Any, gatekeeper(logins)) if logins else None,  # it may be a coroutine
            share=settings.share,
            mcp_server=settings.mcp,
            max_file_size=LARGEST_UPLOAD,
            show_error=True,  # of what Gradio refuses itself, such as files that are not uploads
            allowed_paths=[],
            theme=theme(),
            css=CSS,
            footer_links=["api", "settings"],
            ssr_mode=False,
            app_kwargs=_only_known_hosts(settings, logins),
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise StudioError(f"cannot listen on port {settings.port}: {error}") from None
    studio.work()
    return page


def _only_known_hosts(settings: Settings, logins: dict[str, str]) -> dict[str, Any]:
    """Settings of the server that refuse other names for this machine, where nobody has to log in.

    Otherwise a foreign page whose domain is made to lead to 127.0.0.1 could use the studio.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if logins or settings.host not in KNOWN_HOSTS:
        return {}
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=KNOWN_HOSTS)]}


def _folder(workspace: Path) -> Path:
    """The workspace's absolute path; StudioError where it cannot be a folder to write in."""
    try:
        return folder_output(workspace).absolute()
    except OutputError as error:
        raise StudioError(str(error).replace("--out", "--workspace")) from None


def _take(root: Path) -> Path:
    """The workspace, made if need be and marked as ours; StudioError where it is another's."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark = read_json(root / "studio.json")
        if mark and mark["pid"] != os.getpid() and living(mark["pid"], mark["born"]):
            raise StudioError(
                f"another studio, process {mark['pid']}, works in {root}: use its page, or choose "
                "another --workspace."
            )
        own = {"pid": os.getpid(), "born": psutil.Process().create_time()}
        write_atomically(root / "studio.json", json.dumps(own).encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise StudioError(
            f"cannot write to {root}: {reason}. Choose another --workspace."
        ) from None
    return root
