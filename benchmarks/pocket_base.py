"""How well the pocket base draws what a prompt says: `python benchmarks/pocket_base.py`.

Every noun that the judge knows is drawn alone, in both styles, and beside another, and the judge
says what each picture shows. Writes results/pocket_base.json and, with one picture of each noun,
results/pocket_base.png.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from machine import RESULTS, write_result
from PIL import Image, ImageDraw, ImageFont
from prompts import article

from rite_diffusion.evaluation.judge import Judge, load_judge

ROOT = Path(__file__).parents[1]
STYLES = {"flat": "", "3d": "3d style, "}  # how a prompt begins
STEPS, GUIDANCE, BATCH = 25, 3.0, 32


@dataclass(frozen=True)
class Request:
    """A prompt and what a right picture of it shows."""

    nouns: tuple[str, ...]  # one, or left and right
    colour: str
    style: str

    @property
    def prompt(self) -> str:
        """The request in the pocket base's grammar."""
        words = [article(noun) for noun in self.nouns]
        things = (
            words[0] if len(words) == 1 else "{} on the left and {} on the right".format(*words)
        )
        return f"{STYLES[self.style]}{things} on {article(self.colour)} background"


def requests(judge: Judge, seeds: int) -> list[Request]:
    """Per noun and seed one picture in each style, and one of it beside another noun."""
    nouns, colours, found = judge.noun_names, judge.colour_names, []
    for seed in range(seeds):
        for i, noun in enumerate(nouns):
            colour = colours[(i + 3 * seed) % len(colours)]
            second = nouns[(i + 5 + 7 * seed) % len(nouns)]
            found += [Request((noun,), colour, style) for style in STYLES]
            found += [Request((noun, second), colour, list(STYLES)[(i + seed) % 2])]
    return found


def draw(folder: Path, wanted: list[Request]) -> list[Image.Image]:
    """One picture per request; the n-th request has seed n, whatever the batch."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(wanted), BATCH):
        seeds = range(first, min(first + BATCH, len(wanted)))
        pictures += pipeline(
            [wanted[seed].prompt for seed in seeds],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        print(f"{len(pictures)}/{len(wanted)} pictures", flush=True)
    return pictures


def share(hits: list[bool]) -> float:
    """Share of hits, to four digits."""
    return round(sum(hits) / len(hits), 4)


def single_figures(judge: Judge, wanted: list[Request], pictures: list[Image.Image]) -> dict:
    """Shares of right objects and backgrounds among pictures of one object, and the worst nouns."""
    nouns, colours = judge.nouns(pictures), judge.colours(pictures)
    object_right = [(noun,) == request.nouns for noun, request in zip(nouns, wanted, strict=True)]
    ground_right = [colour == r.colour for colour, r in zip(colours, wanted, strict=True)]
    of_noun = {noun: [] for noun in judge.noun_names}
    for request, right in zip(wanted, object_right, strict=True):
        of_noun[request.nouns[0]].append(right)
    worst = sorted((share(hits), noun) for noun, hits in of_noun.items())[:10]
    return {
        "pictures": len(pictures),
        "object": share(object_right),
        "background": share(ground_right),
        "both": share([a and b for a, b in zip(object_right, ground_right, strict=True)]),
        "worst_nouns": {noun: hits for hits, noun in worst},
    }


def pair_figures(judge: Judge, wanted: list[Request], pictures: list[Image.Image]) -> dict:
    """Shares of right objects and backgrounds among pictures of two objects."""
    answers = zip(judge.pairs(pictures), judge.colours(pictures), wanted, strict=True)
    sides = [
        (pair[0] == request.nouns[0], pair[1] == request.nouns[1], colour == request.colour)
        for pair, colour, request in answers
    ]
    return {
        "pictures": len(pictures),
        "left": share([left for left, _, _ in sides]),
        "right": share([right for _, right, _ in sides]),
        "both": share([left and right for left, right, _ in sides]),
        "background": share([ground for _, _, ground in sides]),
    }


def figures(judge: Judge, wanted: list[Request], pictures: list[Image.Image]) -> dict:
    """All shares, singles by style."""

    def pick(kind: str) -> tuple[list[Request], list[Image.Image]]:
        kinds = [request.style if len(request.nouns) == 1 else "pairs" for request in wanted]
        rows = [row for row, found in enumerate(kinds) if found == kind]
        return [wanted[row] for row in rows], [pictures[row] for row in rows]

    singles = {style: single_figures(judge, *pick(style)) for style in STYLES}
    return {"singles": singles, "pairs": pair_figures(judge, *pick("pairs"))}


def sheet(judge: Judge, wanted: list[Request], pictures: list[Image.Image]) -> Image.Image:
    """The first picture of each noun, the styles in turn, with labels."""
    columns, cell, line = 8, 128, 18
    rows = -(-len(judge.noun_names) // columns)
    paper = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + line + 8) + 8), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(13)
    for index, noun in enumerate(judge.noun_names):
        alone = [i for i, request in enumerate(wanted) if request.nouns == (noun,)]
        picture = pictures[alone[(index + index // columns) % 2]]
        x, y = 8 + index % columns * (cell + 8), 8 + index // columns * (cell + line + 8)
        paper.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        pen.text((x + cell / 2, y + cell + line / 2), noun, "black", font, anchor="mm")
    return paper


def main() -> None:
    """Draw, judge, and write the results."""
    parser = argparse.ArgumentParser(description="Judge the pocket base.")
    weights = ROOT / "rite_diffusion/backbones/pocket/weights"
    parser.add_argument("--base", type=Path, default=weights, help="a diffusers folder")
    parser.add_argument("--seeds", type=int, default=4, help="pictures per noun, style and kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="pocket_base", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge = load_judge()
    wanted = requests(judge, options.seeds)
    start = time.time()
    pictures = draw(options.base, wanted)
    report = figures(judge, wanted, pictures) | {
        "judge_accuracy": judge.accuracy,
        "sampling": {"scheduler": "DDIM", "steps": STEPS, "guidance_scale": GUIDANCE},
        "seconds_drawing": round(time.time() - start),
    }
    print(write_result(options.name, report).read_text())
    sheet(judge, wanted, pictures).save(RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
