"""What the studio asks before it queues something: the questions of the commands themselves."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit

from rite_diffusion.errors import PhotoFolderError, StudioError
from rite_diffusion.studio.workspace import Workspace
from rite_diffusion.training.launch import device_environment

if TYPE_CHECKING:
    from rite_diffusion.backbones.protocols import Backbone
    from rite_diffusion.generation.request import PictureRequest

POCKET = "pocket"


def check_training(space: Workspace, tree: dict[str, Any]) -> list[str]:
    """Raise RiteError for a training that would fail; returns a line for each unused file.

    Settings and photos are checked for every base, and what the base says of them (triggers, rank,
    prompts of previews) for the pocket base: another may be too large to be opened for that, and
    says it under "Check first", or when the training begins.
    """
    from rite_diffusion.training.plan import check_on_base, find_pictures
    from rite_diffusion.training.settings import configure

    config = configure(tree)
    try:
        found = find_pictures(config)
    except PhotoFolderError as error:  # without the workspace's place on this machine
        raise StudioError(str(error).replace(f"{space.root}/", "")) from None
    if config.base == POCKET:
        check_on_base(_pocket(), config)
    return [f"{path.name}: {reason}" for path, reason in found.folder.skipped]


@cache
def _pocket() -> "Backbone":
    """A pocket base of the checks' own, without adapters."""
    from rite_diffusion.backbones.source import load_backbone

    return load_backbone(POCKET)


def check_prompt(prompt: str) -> None:
    """StudioError for an empty prompt."""
    if not prompt.strip():
        raise StudioError("write a prompt first: what should the picture show?")


def check_pictures(request: "PictureRequest", num: int, adapters: Sequence[str]) -> None:
    """Raise RiteError for pictures that no base would draw; `adapters` are `FILE:WEIGHT`."""
    from rite_diffusion.adapters.choice import choose_adapters, protected_words

    if not request.regions:
        check_prompt(request.prompt)
    request.check(protected_words(choose_adapters(adapters)), num)


class Reports:
    """Reports of `rite train --dry-run`, each by a process, one for each session."""

    def __init__(self):
        self._processes: dict[str, subprocess.Popen] = {}

    def end(self, session: str) -> None:
        """End the session's process, if there is one; its report ends as far as it is."""
        process = self._processes.pop(session, None)
        if process is not None:
            process.kill()

    def make(self, tree: dict[str, Any], session: str) -> Iterator[str]:
        """The report so far; its process ends with the iterator, or by `end`."""
        self.end(session)
        with tempfile.TemporaryDirectory() as folder:
            settings = Path(folder) / "job.toml"
            settings.write_text(tomlkit.dumps(tree), encoding="utf-8")
            command = [sys.executable, "-P", "-m", "rite_diffusion", "train", str(settings)]
            process = subprocess.Popen(
                [*command, "--dry-run"], cwd=folder, env=device_environment("cpu"),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            self._processes[session] = process
            text = ""
            try:
                for line in process.stdout or ():
                    text += line
                    yield text
                process.wait()
            finally:
                process.kill()
                process.wait()
        if self._processes.pop(session, None) is process and process.returncode:
            last = text.strip().split("\n")[-1].removeprefix("rite: ")
            raise StudioError(last or "the check failed")
