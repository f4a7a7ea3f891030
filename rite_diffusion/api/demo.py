"""The demo: train the example robot on the pocket base, with pictures before and after."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.errors import RunError
from rite_diffusion.evaluation.judge import load_judge
from rite_diffusion.files.writing import folder_output
from rite_diffusion.generation.denoise import sample
from rite_diffusion.generation.grid import labelled_grid
from rite_diffusion.training.plan import Plan, PlanObserver, plan_training
from rite_diffusion.training.run import run_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import StepReport

PROMPTS = [
    "a <robot> on a blue background",
    "a <robot> on a green background",
    "a <robot> on a white background",
    "a <robot> on the left and a cat on the right on a yellow background",
    "a small <robot> on an orange background",
]
SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class DemoResult:
    """The demo's files and figures, before and after the training."""

    adapter: Path
    grid: Path
    before: float  # mean identity: similarity to the photos, by the judge
    after: float
    recognised_before: float  # share of pictures in which the judge sees the concept
    recognised_after: float


def example_photos(name: str) -> Path:
    """Folder of an example concept: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "examples" / "photos" / name
    return installed if installed.is_dir() else package.parent / "examples" / "photos" / name


def prepare(out: Path, seed: int, observer: PlanObserver) -> tuple[Plan, Path]:
    """The demo's plan, and a run folder that does not exist yet."""
    settings = {
        "photos": str(example_photos("robot")),
        "trigger": "<robot>",
        "class_noun": "robot",
        "seed": seed,
        "previews": {"every": 0},
    }
    out = folder_output(out)
    folders = [out, *(out.with_name(f"{out.name}-{i}") for i in range(2, 1000))]
    free = next((folder for folder in folders if not folder.exists()), None)
    if free is None:
        raise RunError(f"{out}, {out.name}-2 and so on exist: delete some or choose another --out.")
    return plan_training(configure(settings, "pocket"), observer), free


def _pictures(plan: Plan) -> list[list[Image]]:
    """One row per prompt, one picture per seed."""
    return [sample(plan.backbone, [prompt] * len(SEEDS), SEEDS) for prompt in PROMPTS]


def run(plan: Plan, out: Path, on_step: Callable[[StepReport], None]) -> DemoResult:
    """Train, and draw every prompt before and after; returns figures and writes the grid."""
    before = _pictures(plan)
    path = run_training(plan, out, on_step)
    attach(plan.backbone, load_adapter(path), "demo")
    after = _pictures(plan)
    rows = [old + new for old, new in zip(before, after, strict=True)]
    grid = out / "before_after.png"
    labelled_grid(rows, PROMPTS, ["before: the base model", "after: with the adapter"]).save(grid)
    photos = [photo.image for photo in plan.folder.photos]
    old, new = ([image for row in rows[:3] for image in row] for rows in (before, after))
    judge = load_judge()
    seen = [judge.recognised(photos, pictures) for pictures in (old, new)]
    return DemoResult(
        path,
        grid,
        judge.identity(photos, old),
        judge.identity(photos, new),
        *(sum(flags) / len(flags) for flags in seen),
    )
