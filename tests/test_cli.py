import re
import subprocess
import sys
import time

import pytest
from PIL import Image

from rite_diffusion.config import resolve
from rite_diffusion.methods import METHODS
from rite_diffusion.optim import OPTIMIZERS

ALONE = ("--set", "prior.weight=0")  # without pictures of the class, which take time to draw


def fastest(code: str) -> float:
    """Seconds that a fresh interpreter needs beyond an empty one, the best of five."""
    best = {}
    for program in ("pass", code):
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            runs.append(time.perf_counter() - start)
        best[program] = min(runs)
    return best[code] - best["pass"]


def test_help_and_import_take_less_than_half_a_second():
    assert fastest("import rite_diffusion") < 0.3
    assert (
        fastest(
            "import sys; sys.argv[1:] = ['--help']\nfrom rite_diffusion.cli.app import app\napp()"
        )
        < 0.5
    )


def test_help_names_every_command(command):
    text = command("--help").stdout
    assert all(word in text for word in ("train", "generate", "inspect", "doctor", "demo"))
    options = command("train", "--help").stdout
    names = "--base --method --preset --steps --rank --optimizer --lr --seed --out --set --dry-run"
    assert all(name in options for name in names.split())
    assert all(re.search(rf"\b{name}\b", options) for name in (*OPTIMIZERS, *METHODS))


def test_dry_run_reports_and_writes_nothing(command, photos, tmp_path):
    (photos / "broken.jpg").write_text("x")
    done = command("train", photos, "--trigger", "<thing>", "--class", "toy", "--dry-run", *ALONE)
    assert done.returncode == 0, done.stderr
    assert "3 in" in done.stdout and "80x70 to 100x70" in done.stdout
    assert "skipped     broken.jpg: not a picture" in done.stdout
    assert re.search(
        r"cost        about 0:\d\d:\d\d \(\d+\.\d\d s a step\), \d\.\d GB", done.stdout
    )
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_report_names_possible_mistakes_in_the_photos(command, photos, tmp_path):
    Image.new("RGB", (5000, 20)).save(photos / "strip.png")
    Image.new("RGB", (32, 32), "pink").save(photos / "little.png")
    Image.new("RGB", (80, 70), "red").save(photos / "twin.png")
    (photos / "twin.txt").write_text("a <superlongtrigger>, " + "very " * 500)
    done = command(
        "train", photos, "--trigger", "<superlongtrigger>", "--class", "toy", "--dry-run",
        "--set", "precision=fp16", *ALONE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in (
        "skipped     strip.png: 5000x20 is too small or too long a strip",
        "scaled up   little.png: smaller than 64 pixels",
        "alike       0.png, twin.png: nearly one picture",
        "is longer than 30 tokens",
        'no trigger  "a <thing> on a red background" does not contain the trigger',
        "long        <superlongtrigger> is read as 10 tokens of 30",
        "precision fp32: fp16 does not train on a CPU",
        "64 pixels, fp32, attention sdpa",
    ):
        assert words in done.stdout, words


def test_train_generate_and_inspect_run_from_a_photo_folder(command, photos, tmp_path):
    done = command(
        "train", photos, "--trigger", "<thing>", "--class", "toy", "--steps", 2, "--rank", 2,
        "--optimizer", "sgd", "--lr", 0.5, "--seed", 3, "--out", tmp_path / "run",
        "--set", "previews.every=0", "--set", "optim.lr_text_encoder=0.1", *ALONE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run/adapter.safetensors"
    assert re.search(r"adapter     .*adapter.safetensors \(\d\.\d MB\)", done.stdout)
    line = next(line for line in done.stdout.splitlines() if line.startswith("try"))
    assert line.split(None, 1)[1].startswith(
        "rite generate 'a <thing> on a blue background' --adapter"
    )
    made = command("generate", "a <thing>", "--adapter", f"{adapter}:0.8", "--num", 2, "--steps", 2,
                "--out", tmp_path / "out")  # fmt: skip
    assert made.returncode == 0 and made.stderr == ""
    assert [line.rsplit("/", 1)[1] for line in made.stdout.split()] == ["00000.png", "00001.png"]
    shown = command("inspect", adapter).stdout
    for words in (
        "<thing>",
        "pocket",
        "rank             2",
        "137 (129 UNet, 8 text encoder)",
        "sgd",
    ):
        assert words in shown


BAD = {
    "empty folder": (["train", "{empty}"], "no images in"),
    "no folder": (["train", "{tmp}/nowhere"], "does not exist"),
    "broken images only": (["train", "{broken}"], "not a picture"),
    "unknown key": (["train", "{photos}", "--set", "optim.lrr=1"], "did you mean 'optim.lr'"),
    "known trigger": (["train", "{photos}", "--trigger", "robot"], "'<robot>'"),
    "unknown base": (["train", "{photos}", "--base", "poket"], "no base model 'poket'"),
    "unwritable": (["train", "{photos}", "--out", "/proc/rite"], "cannot write to /proc/rite"),
    "unknown optimizer": (
        ["train", "{photos}", "--optimizer", "adam"],
        "choose one of adamw, adamw_plus, adamw_schedule_free,",
    ),
    "word for a rate": (["train", "{photos}", "--lr", "fast"], "optim.lr"),
    "no settings file": (["train", "{tmp}/x.toml"], "cannot read"),
    "unknown preset": (["train", "{photos}", "--preset", "x"], "no preset 'x'"),
    "rank beyond the layers": (
        ["train", "{photos}", "--rank", "1000"],
        "narrowest layer of pocket",
    ),
    "negative rank": (["train", "{photos}", "--rank", "-1"], "'lora.rank' = -1"),
    "endless rate": (["train", "{photos}", "--lr", "inf"], "optim.lr"),
    "negative steps": (["train", "{photos}", "--steps", "-3"], "'steps' = -3"),
    "no adapter": (["generate", "x", "--adapter", "nope.safetensors"], "no adapter file"),
    "not an adapter": (["inspect", "{photos}/0.png"], "not a safetensors file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(command, case, photos, tmp_path):
    arguments, words = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_text("x")
    names = {"tmp": tmp_path, "photos": photos} | {n: tmp_path / n for n in ("empty", "broken")}
    line = [argument.format(**names) for argument in arguments]
    if line[0] == "train":
        line += ["--class", "toy", *ALONE] + (
            [] if "--trigger" in line else ["--trigger", "<thing>"]
        )
    done = command(*line)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "outputs").exists()


def test_doctor_names_versions_and_devices(command):
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    for words in ("torch", "diffusers", "device", "attention", "disk", "pocket base"):
        assert words in done.stdout


def test_settings_given_as_tables_reach_the_configuration():
    needed = {"photos": "p", "trigger": "<t>", "class_noun": "dog"}
    assert resolve(needed | {"previews": {"every": 0}}).previews.every == 0


def test_an_error_is_one_line_without_traceback_in_a_subprocess(tmp_path):
    code = "from rite_diffusion.cli.app import main; main()"
    line = [sys.executable, "-c", code, "train", "x.toml"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "rite: cannot read x.toml: No such file or directory\n"


def test_train_command_takes_two_concepts_from_a_toml_file(command, photos, tmp_path):
    (tmp_path / "two.toml").write_text(
        f"""
        steps = 1
        previews.every = 0
        dataset = [
            {{photos = "{photos}", trigger = "<one>", class_noun = "toy"}},
            {{photos = "{photos}", trigger = "<two>", class_noun = "cup"}},
        ]
        """
    )
    done = command("train", "two.toml", "--out", "run", "--set", "batch=1", *ALONE)
    assert done.returncode == 0, done.stderr
    assert "concept     <one>, class toy\nconcept     <two>, class cup" in done.stdout
    assert "<one>, <two>" in command("inspect", "run/adapter.safetensors").stdout


def test_command_prints_no_warnings_of_libraries(tmp_path):
    line = [sys.executable, "-m", "rite_diffusion", "generate", "a cat", "--steps", "1"]
    done = subprocess.run(
        [*line, "--out", str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and done.stdout == f"{tmp_path / 'a.png'}\n"
