"""The command line run in this process: one of its own takes seconds."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from rite_diffusion.cli.app import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run_command(*arguments) -> Done:
    """What `rite` with these arguments ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rite", *map(str, arguments)])
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            with pytest.raises(SystemExit) as exit:
                main()
                sys.exit(0)
    return Done(exit.value.code or 0, out.getvalue(), errors.getvalue())
