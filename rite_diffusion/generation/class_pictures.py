"""Class pictures drawn by the base, for prior preservation."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.files.cache import writing
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.generation.denoise import sample

STEPS = 25


def class_pictures(
    backbone: Backbone, prompts: list[str], count: int, progress: Callable[[str], None]
) -> Path:
    """A folder with `count` pictures of the prompts in turn, with seeds from 0 on.

    It is in the cache, named by the base's fingerprint and a digest of all that decides the
    pictures; existing pictures are not drawn again. `progress` is called with a line about those
    that are.
    """
    guidance = backbone.defaults.guidance
    facts = f"{prompts}\n{count}\n{STEPS}\n{guidance}\n{backbone.resolution}\n{backbone.dtype}"
    if backbone.memory.weights != "full" or backbone.memory.encoder_weights != "full":
        facts += f"\n{backbone.memory.weights}\n{backbone.memory.encoder_weights}"
    name = sha256(facts.encode()).hexdigest()[:16]
    folder = cache_folder() / "class_pictures" / backbone.fingerprint / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in range(count) if not (folder / f"{seed:05d}.png").exists()]
    if missing:
        progress(f'drawing {len(missing)} pictures of "{prompts[0]}" and the like')
    for seed in missing:
        prompt = prompts[seed % len(prompts)]
        [image] = sample(backbone, [prompt], [seed], steps=STEPS, guidance=guidance)
        partial = folder / f".{seed:05d}.png.partial"
        with writing(folder):
            (folder / f"{seed:05d}.txt").write_text(prompt, encoding="utf-8")
            image.save(partial, "PNG")
            partial.replace(folder / f"{seed:05d}.png")
    return folder
