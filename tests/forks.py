"""Processes forked from one that has imported everything: one from scratch takes seconds to start.

A fork has the environment of who asks for it, and starts with one thread.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest


def forked(work: Callable, *arguments, **environment: str) -> ForkServerProcess:
    """A process that has begun to do some work, a module's function, with these variables set."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    process = context.Process(target=_in, args=(os.environ | environment, work, arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the process that forks
        process.start()
    return process


def forked_command(line: list[str], output: Path, **environment: str) -> ForkServerProcess:
    """The same for `rite` with a line of arguments; what it prints goes to a file."""
    return forked(_command, line, output, **environment)


def _in(environment: dict[str, str], work: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)


def _command(line: list[str], output: Path) -> None:
    from rite_diffusion.cli.app import main

    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["rite", *line]
    main()
