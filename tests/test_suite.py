"""What holds for the tests themselves."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch

FILES = sorted(Path(__file__).parent.rglob("*.py"))


def imported_by(path: Path) -> set[str]:
    """The last part of every module name that a file imports, or imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
    return {name.rpartition(".")[2] for name in names}


def test_no_test_file_imports_another():
    found = {
        path.name: sorted(names)
        for path in FILES
        if (names := imported_by(path) & {path.stem for path in FILES if path.match("test_*")})
    }
    assert not found, "what two test files need belongs in a module beside them"


def test_no_file_is_longer_than_400_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_a_process_and_its_children_compute_on_one_thread():
    wanted = os.environ["OMP_NUM_THREADS"]
    assert "PYTEST_XDIST_WORKER" not in os.environ or wanted == "1"
    assert torch.get_num_threads() == int(wanted)
    code = "import torch; print(torch.get_num_threads())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == wanted


def test_no_function_of_the_package_is_longer_than_60_lines():
    package = Path(__file__).parents[1] / "rite_diffusion"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, functions) and node.end_lineno
    }
    assert len(lengths) > 500 and not {k: v for k, v in lengths.items() if v > 60}
