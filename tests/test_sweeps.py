"""Sweeps without processes: axes, names, schedules, and what stops a sweep before it begins."""

import csv
import json
import random
from pathlib import Path

import pytest
from PIL import Image

import rite_diffusion as rite
from rite_diffusion.errors import ConfigError, RunError
from rite_diffusion.sweeps import conduct
from rite_diffusion.sweeps.axes import Range
from rite_diffusion.sweeps.cluster import train_run
from rite_diffusion.sweeps.definition import read_definition
from rite_diffusion.sweeps.report import newest_previews
from rite_diffusion.sweeps.runner import SweepStopped
from rite_diffusion.sweeps.runs import runs_of
from rite_diffusion.sweeps.schedule import rungs
from rite_diffusion.training.lock import Lock
from runs import QUICK

BASE = {"photos": "photos", "trigger": "<thing>", "class_noun": "toy", "steps": 2}
HALVING = {"search": "halving", "first_steps": 2, "factor": 2}


def tree(axes: dict, **settings) -> dict:
    """A sweep's settings with `[sweep]` keys given as `sweep`."""
    section = {"axes": axes} | settings.pop("sweep", {})
    return BASE | settings | {"sweep": section}


def names(axes: dict, **settings) -> list[str]:
    """The names of the runs."""
    return [run.name for run in runs_of(read_definition(tree(axes, **settings)))]


def quick(photos: Path, axes: dict, **settings) -> dict:
    """A sweep of the shortest trainings on the pocket base, with validation."""
    small = {"steps": 2, "previews": {"every": 0}, "resolution": 32, "validation": {"photos": 1}}
    return tree(axes, **QUICK | {"photos": str(photos)} | small | settings)


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run in this process, one after another; the list has the name and steps of each."""
    done = []

    def run(jobs, on_end, parallel=None):
        for job in jobs:
            job.write_settings()
            try:
                train_run(str(job.path), job.settings, job.preset, job.steps, str(Path.cwd()))
            except rite.RiteError as error:
                on_end(job, str(error))
            else:
                done.append((job.run.name, job.steps))
                on_end(job, None)

    monkeypatch.setattr(conduct, "run_here", run)
    return done


# --- axes and names -------------------------------------------------------------------------------


def test_a_grid_has_every_combination_and_conditions_come_outermost():
    assert names({"optim.lr": [1e-4, 0.001], "seed": [0, 1]}) == [
        "optim.lr=0.0001,seed=0",
        "optim.lr=0.001,seed=0",
        "optim.lr=0.0001,seed=1",
        "optim.lr=0.001,seed=1",
    ]


def test_the_order_of_axes_in_the_file_does_not_change_names():
    one = names({"seed": [0], "optim": {"lr": [0.1], "name": ["rite"]}})
    other = names({"optim.name": ["rite"], "optim.lr": [0.1], "seed": [0]})
    assert one == other == ["optim.lr=0.1,optim.name=rite,seed=0"]


def test_photo_folders_are_called_by_their_last_part_and_told_apart():
    assert names({"photos": ["a/dog", "b/dog", "b/Dog/"]}) == [
        "photos=dog", "photos=dog-2", "photos=Dog-3",
    ]  # fmt: skip


def test_settings_that_change_together_are_tables_with_a_name():
    axes = {
        "how": [
            {"name": "whole", "method": "custom_diffusion"},
            {"method": "custom_diffusion", "custom_diffusion.weights": "lora", "name": "a/b, c"},
            {"method": "lora", "lora": {"rank": 2}},
        ]
    }
    runs = runs_of(read_definition(tree(axes)))
    assert [run.name for run in runs] == ["how=whole", "how=a-b-c", "how=lora"]
    assert runs[1].config.custom_diffusion.weights == "lora" and runs[2].config.lora.rank == 2
    assert runs[0].config.steps == BASE["steps"]


def test_a_long_name_is_cut_and_stays_distinct():
    axes = {"templates": [["x" * 300], ["x" * 301]], "optim.options": [{"damping": 0.1}, {}]}
    axes |= {f"{key}": [0.5] for key in ("prior.weight", "optim.weight_decay", "captions.dropout")}
    axes |= {"objective.noise_offset": [0.25], "objective.input_perturbation": [0.125]}
    found = names(axes)
    assert len(set(found)) == 4 and max(map(len, found)) == 150


def test_values_become_parts_of_names_that_every_file_system_takes():
    axes = {"lora.text_encoder": [True, False], "base": ["pocket"], "checkpoints.milestones": [[1]]}
    assert names(axes)[0] == "base=pocket,checkpoints.milestones=1,lora.text_encoder=true"


def test_random_combinations_are_distinct_repeatable_and_extend_shorter_draws():
    axes = {
        "optim.lr": {"low": 1e-5, "high": 1e-2, "scale": "log"},
        "lora.rank": {"low": 1, "high": 3},
        "seed": [0, 1],
    }
    draw = {"search": "random", "runs": 5, "seed": 3}
    found = names(axes, sweep=draw)
    assert len(set(found)) == 10 and found == names(axes, sweep=draw)
    assert found[:5] == names(axes, sweep=draw | {"runs": 9})[:5]
    assert found != names(axes, sweep=draw | {"seed": 4})
    conditions = {name.partition(",optim")[0] for name in found}
    assert conditions <= {f"lora.rank={rank}" for rank in (1, 2, 3)}


def test_a_log_range_draws_evenly_over_decades_and_whole_numbers_stay_whole():
    generator = random.Random(0)
    rates = [Range(low=1e-5, high=1e-1, scale="log").draw(generator) for _ in range(2000)]
    assert 1e-5 <= min(rates) and max(rates) <= 1e-1
    for decade in (1e-5, 1e-4, 1e-3, 1e-2):
        assert 400 < sum(decade <= rate < 10 * decade for rate in rates) < 600
    ranks = {Range(low=1, high=4).draw(generator) for _ in range(200)}
    assert ranks == {1, 2, 3, 4} and all(isinstance(rank, int) for rank in ranks)


@pytest.mark.parametrize(
    ("first", "steps", "factor", "expected"),
    [(2, 8, 2, [2, 4, 8]), (3, 8, 2, [3, 6, 8]), (10, 200, 3, [10, 30, 90, 200])],
)
def test_rungs_grow_by_the_factor_and_end_with_all_steps(first, steps, factor, expected):
    assert rungs(first, steps, factor) == expected


# --- messages -------------------------------------------------------------------------------------

RANGE = {"low": 1e-5, "high": 1e-2}
BAD = {
    "no table": (BASE, "has no [sweep] table"),
    "no axes": (BASE | {"sweep": {}}, "setting 'axes'"),
    "empty axes": (tree({}), "[sweep.axes] is empty"),
    "unknown key": (tree({"seed": [0]}, sweep={"serch": "grid"}), "did you mean 'search'?"),
    "unknown search": (tree({"seed": [0]}, sweep={"search": "best"}), "setting 'search' = 'best'"),
    "unknown score": (tree({"seed": [0]}, sweep={"score": "beauty"}), "choose validation"),
    "unknown setting": (tree({"optim.lrr": [1]}), "did you mean 'optim.lr'?"),
    "unknown and unlike": (tree({"zzzz": [1]}), "axis 'zzzz' is no setting: For settings"),
    "no list": (tree({"seed": 3}), "axis 'seed' = 3: give a list of values"),
    "empty list": (tree({"seed": []}), "axis 'seed' = []: give a list of values"),
    "twice": (tree({"seed": [0, 1, 0]}), "axis 'seed' has a value twice"),
    "both": (tree({"a": [{"seed": 1}], "seed": [0]}), "'a' and 'seed' both set seed"),
    "empty entry": (tree({"a": [{}]}), "has a table without settings"),
    "range in a grid": (tree({"optim.lr": RANGE}), "axis 'optim.lr' is a range"),
    "range in halving": (
        tree({"optim.lr": RANGE}, sweep=HALVING, steps=8), "axis 'optim.lr' is a range"
    ),
    "turned range": (tree({"optim.lr": {"low": 2, "high": 1}}), "low = 2 is not below high = 1"),
    "log of zero": (
        tree({"optim.lr": {"low": 0, "high": 1, "scale": "log"}}), "on a log scale lies above 0"
    ),
    "half a range": (tree({"optim.lr": {"low": 0}}), "axis 'optim.lr': setting 'high'"),
    "random without runs": (tree({"optim.lr": RANGE}, sweep={"search": "random"}), "needs runs"),
    "grid with runs": (tree({"seed": [0]}, sweep={"runs": 3}), "a grid has all combinations"),
    "too many draws": (
        tree({"lora.rank": [1, 2]}, sweep={"search": "random", "runs": 3}), "more than 2 different"
    ),
    "nothing to choose": (
        tree({"seed": [0, 1]}, sweep={"search": "random", "runs": 1}), "change only photos or seed"
    ),
    "too many": (
        tree({"seed": list(range(101)), "lora.rank": list(range(1, 101))}), "make 10,100 runs"
    ),
    "halving without a rung": (
        tree({"lora.rank": [1, 2]}, sweep={"search": "halving"}), "needs first_steps"
    ),
    "rung of a grid": (tree({"seed": [0]}, sweep={"first_steps": 3}), "other searches have none"),
    "late rung": (tree({"lora.rank": [1, 2]}, sweep=HALVING), "is not below steps = 2"),
    "steps as an axis": (tree({"steps": [4, 8]}, sweep=HALVING), "have [4, 8]: set steps"),
    "no validation": (
        tree({"lora.rank": [1, 2]}, sweep=HALVING, steps=8), "set validation.photos"
    ),
    "bad value": (tree({"optim.lr": [1e-3, 20]}), "run optim.lr=20: setting 'optim.lr"),
    "conflict": (
        tree({"lora.kind": ["lora", "dora"]}, memory={"weights": "int8"}), "run lora.kind=dora:"
    ),
    "no preset": (tree({"seed": [0]}, sweep={"preset": "nothing"}), "no preset 'nothing'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sweep_is_refused_before_anything_is_written(name, tmp_path):
    settings, message = BAD[name]
    with pytest.raises(ConfigError) as error:
        rite.sweep(settings, out=tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_folder_and_a_file_without_a_sweep(command, tmp_path):
    (tmp_path / "plain.toml").write_text("steps = 3\n")
    for file, message in (("plain.toml", "no [sweep] table"), (".", "is not a sweep's folder")):
        done = command("sweep", file)
        assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_ray_and_parallel_exclude_each_other(photos, tmp_path):
    settings = quick(photos, {"seed": [0]})
    with pytest.raises(ConfigError, match="sweep.cpus and sweep.gpus"):
        rite.sweep(settings, out=tmp_path / "out", parallel=2, ray="auto")
    with pytest.raises(ConfigError, match="parallel = 0"):
        rite.sweep(settings, out=tmp_path / "out", parallel=0)


# --- runs -----------------------------------------------------------------------------------------


def test_a_sweep_writes_run_folders_a_table_plots_and_a_sheet(photos, tmp_path, in_process):
    axes = {"optim.lr": [1e-4, 1e-2], "seed": [0, 1]}
    settings = quick(photos, axes, previews={"every": 2, "steps": 1})
    lines: list[str] = []
    result = rite.sweep(settings, out=tmp_path / "out", on_line=lines.append)
    assert [row.state for row in result.rows] == ["finished"] * 4 and len(lines) == 4
    for row in result.rows:
        assert (row.path / "adapter.safetensors").exists()
        recorded = rite.inspect(row.path / "adapter.safetensors").info.config
        assert f"lr = {float(row.values['optim.lr'])}" in recorded
    with (tmp_path / "out/table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    last = [json.loads(line) for line in
            (result.rows[3].path / "metrics.jsonl").read_text().splitlines()][-1]  # fmt: skip
    assert table[3]["run"] == "optim.lr=0.01,seed=1" and table[3]["steps"] == "2"
    assert float(table[3]["validation"]) == pytest.approx(last["validation"], rel=1e-5)
    # The best is the rate with the lowest mean over both seeds.
    scores = {(row.values["optim.lr"], row.values["seed"]): row.score for row in result.rows}
    means = {f"optim.lr={lr}": (scores[lr, "0"] + scores[lr, "1"]) / 2 for lr in ("0.0001", "0.01")}
    assert result.best.name == min(means, key=means.__getitem__)
    assert result.best.score == pytest.approx(min(means.values()))
    for name in ("plots/optim.lr.png", "plots/seed.png", "sheet.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300
    assert len(newest_previews(result.rows[0].path)) == 2  # one for each prompt


def test_a_failed_run_is_told_and_tried_again_while_finished_ones_are_not(
    photos, tmp_path, in_process, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = quick(photos, {"photos": ["nothing", str(photos)]})
    result = rite.sweep(settings)
    assert [row.state for row in result.rows] == ["failed", "finished"]
    assert "nothing" in result.rows[0].reason and result.ranking == []
    photos.rename(tmp_path / "nothing")
    photos.symlink_to("nothing")
    assert rite.sweep_status(settings).rows[0].state == "failed"
    again = rite.sweep(tmp_path / "runs/sweep")
    assert [row.state for row in again.rows] == ["finished"] * 2
    assert [name for name, _ in in_process] == [f"photos={photos.name}", "photos=nothing"]
    assert again.rows[0].reason == ""


def test_halving_drops_the_worst_and_continues_the_best(photos, tmp_path, in_process):
    axes = {"optim.lr": [1e-5, 1e-3, 1e-2, 3e-3]}
    optim = {"schedule": "constant", "warmup": 0}
    settings = quick(photos, axes, sweep=HALVING, steps=8, optim=optim)
    result = rite.sweep(settings, out=tmp_path / "out")
    assert [sum(steps == rung for _, steps in in_process) for rung in (2, 4, 8)] == [4, 2, 1]
    first = {}
    for row in result.rows:  # what the first rung saw, from each run's own metrics
        lines = [json.loads(x) for x in (row.path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, row.steps + 1))
        first[row.name] = lines[1]["validation"]
    best_two = sorted(first, key=first.__getitem__)[:2]
    assert {name for name, steps in in_process if steps == 4} == set(best_two)
    assert {row.state for row in result.rows} == {"finished", "dropped"}
    assert len(result.ranking) == 1 and {job.steps for job in result.best.jobs} == {8}
    log = (result.best.jobs[0].path / "log.txt").read_text()
    assert "goes on after step 4 to 8" in log


def test_an_interrupted_sweep_goes_on_with_what_is_missing(
    photos, tmp_path, in_process, monkeypatch
):
    settings = quick(photos, {"optim.lr": [1e-4, 1e-2]}, sweep=HALVING, steps=4)
    whole = rite.sweep(settings, out=tmp_path / "whole")
    complete, full = list(in_process), conduct.run_here
    in_process.clear()

    def one_more(jobs, on_end, parallel=None):
        full(jobs[:1], on_end)
        raise SweepStopped(15)

    monkeypatch.setattr(conduct, "run_here", one_more)
    for _ in range(2):
        with pytest.raises(SweepStopped):
            rite.sweep(settings, out=tmp_path / "parts")
    monkeypatch.setattr(conduct, "run_here", full)
    parts = rite.sweep(settings, out=tmp_path / "parts")
    assert in_process == complete
    assert [row.score for row in parts.rows] == [row.score for row in whole.rows]


def test_changed_settings_are_refused_and_more_steps_or_values_are_not(
    photos, tmp_path, in_process
):
    settings = quick(photos, {"seed": [0]})
    rite.sweep(settings, out=tmp_path / "out")
    more = quick(photos, {"seed": [0, 1]}, steps=3, previews={"every": 0, "steps": 5})
    rite.sweep(more, out=tmp_path / "out")
    assert in_process == [("seed=0", 2), ("seed=0", 3), ("seed=1", 3)]
    for changed, message in (
        (quick(photos, {"seed": [0]}, batch=1, steps=3), "batch: 2 -> 1"),
        (settings, "has done 3 steps, 2 are wanted"),
        (more | {"sweep": more["sweep"] | {"preset": "pocket"}}, "begun with preset by default"),
    ):
        with pytest.raises(RunError, match=message):
            rite.sweep(changed, out=tmp_path / "out")
    assert len(in_process) == 3


def test_a_folder_of_other_things_and_one_in_use_are_refused(photos, tmp_path, in_process):
    settings = quick(photos, {"seed": [0]})
    with pytest.raises(RunError, match="is not a sweep's folder"):
        rite.sweep(settings, out=photos)
    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out/lock")
    lock.acquire()
    with pytest.raises(RunError, match="is in use by process"):
        rite.sweep(settings, out=tmp_path / "out")
    lock.release()
    assert in_process == []


def test_status_writes_nothing(photos, command, tmp_path):
    lines = [f'{key} = "{value}"' for key, value in BASE.items() if key not in ("photos", "steps")]
    text = "\n".join([f'photos = "{photos}"', *lines, "[sweep.axes]", "optim.lr = [1e-3, 1e-4]"])
    (tmp_path / "lr.toml").write_text(text)
    done = command("sweep", "lr.toml", "--status")
    assert done.returncode == 0 and "2 waiting" in done.stdout
    assert "best        unknown" in done.stdout
    assert not (tmp_path / "runs").exists()
