"""The server of `rite studio`; Gradio is imported after all settings are checked."""

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
from rite_diffusion.studio.access import login_check, read_logins, require_password
from rite_diffusion.studio.jobs import find_process
from rite_diffusion.studio.workspace import Workspace

LARGEST_UPLOAD = "1gb"  # per file: the size of an SDXL adapter of rank 128
QUEUE_SIZE = 64  # requests that may wait
KNOWN_HOSTS = ["127.0.0.1", "localhost"]


@dataclass(frozen=True)
class Settings:
    """The options of `rite studio`."""

    workspace: Path = Path("studio")
    host: str = "127.0.0.1"
    port: int | None = 7860  # None: the first that is free from 7860
    auth: tuple[str, ...] = ()  # user:password
    share: bool = False
    mcp: bool = False


def launch(settings: Settings):
    """Start the server and return Gradio's page: `block_thread` waits, `close` ends it.

    StudioError where other machines could use it without a password, where the workspace cannot be
    written or is in use, and where the port is taken.
    """
    logins = read_logins(settings.auth)
    require_password(settings.host, settings.share, logins)
    if settings.mcp and find_spec("mcp") is None:
        raise StudioError("--mcp needs one more package: pip install 'gradio[mcp]'.")
    root = _claim(_folder(settings.workspace))
    # Holds uploads and copies for the page; nothing else of the workspace is served.
    shutil.rmtree(root / ".page", ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(root / ".page")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # prompts stay on this machine, not in browsers

    from rite_diffusion.studio.app import build
    from rite_diffusion.studio.state import Studio
    from rite_diffusion.studio.theme import CSS, theme

    for user in logins:
        Workspace(root / "users" / user).folder("runs")
    studio = Studio(root, bool(logins))
    page = build(studio)
    page.queue(max_size=QUEUE_SIZE)
    try:
        page.launch(
            server_name=settings.host,
            server_port=settings.port,
            auth=cast(Any, login_check(logins)) if logins else None,  # Gradio also takes coroutines
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
    studio.start_threads()
    return page


def _only_known_hosts(settings: Settings, logins: dict[str, str]) -> dict[str, Any]:
    """Server settings that refuse requests to other host names, for a studio without logins.

    Otherwise a web page whose domain resolves to 127.0.0.1 could use it (DNS rebinding).
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if logins or settings.host not in KNOWN_HOSTS:
        return {}
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=KNOWN_HOSTS)]}


def _folder(workspace: Path) -> Path:
    """The workspace's absolute path; StudioError where it cannot be a writable folder."""
    try:
        return folder_output(workspace).absolute()
    except OutputError as error:
        raise StudioError(str(error).replace("--out", "--workspace")) from None


def _claim(root: Path) -> Path:
    """The workspace, made and marked as in use; StudioError where another studio uses it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark = read_json(root / "studio.json")
        if mark and mark["pid"] != os.getpid() and find_process(mark["pid"], mark["born"]):
            raise StudioError(
                f"another studio, process {mark['pid']}, uses {root}: open its page, or choose "
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
