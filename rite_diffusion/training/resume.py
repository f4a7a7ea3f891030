"""Going on with a run that was stopped or killed, and refusing to where something has changed."""

from collections.abc import Sequence
from hashlib import sha256

from rite_diffusion._version import __version__
from rite_diffusion.config import TrainConfig, flatten, from_toml, to_toml
from rite_diffusion.errors import RunError
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.snapshot import Snapshot
from rite_diffusion.types import Photo

# Settings that may change: they teach nothing. What lies in the folders is compared itself.
FREE = {"photos", "class_photos", "previews", "checkpoints", "trackers", "cache", "compile"}


def inputs_of(photos: Sequence[Photo], base_fingerprint: str) -> dict[str, str]:
    """What a run learns from and with: a digest of each photo with its caption, base, version."""
    found: dict[str, str] = {}
    for photo in photos:
        name = f"photo {photo.path.parent.name}/{photo.path.name}"
        while name in found:
            name += " again"
        found[name] = _digest(photo)
    return {"version": __version__, "base": base_fingerprint} | found


def _digest(photo: Photo) -> str:
    facts = f"{photo.digest} {photo.mask_digest} {photo.repeats} {photo.weight} {photo.caption}"
    return sha256(facts.encode()).hexdigest()[:16]


def with_earlier_rates(run: RunFolder, config: TrainConfig) -> TrainConfig:
    """With `optim.lr = "auto"`, the rates that the folder's run was given by its probe."""
    optim = config.optim
    if optim.lr != "auto" or not run.has_settings():
        return config
    before = from_toml(run.read_settings()[0]).optim
    if before.lr != "auto":
        return config
    rates = {"lr_unet": before.lr_unet, "lr_text_encoder": before.lr_text_encoder}
    return config.model_copy(update={"optim": optim.model_copy(update=rates)})


def changes(run: RunFolder, config: TrainConfig, inputs: dict[str, str]) -> list[str]:
    """Each difference from what a run folder was begun with, as "optim.lr: 0.001 -> 0.002"."""
    old_config, old_inputs = run.read_settings()
    before, now = (
        flatten(each.model_dump(exclude=FREE)) | own
        for each, own in ((from_toml(old_config), old_inputs), (config, inputs))
    )
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in keys]


def begin_or_continue(
    run: RunFolder, config: TrainConfig, inputs: dict[str, str], override: bool
) -> Snapshot | None:
    """Where an interrupted run goes on, None for a fresh one; what is trained on is written down.

    Raises RunError naming what has changed since, unless `override` accepts it.
    """
    snapshot = run.newest_snapshot()
    if snapshot is not None:
        found = changes(run, config, inputs)
        if found and not override:
            raise RunError(
                f"{run.path} was begun differently ({'; '.join(found)}). Choose another --out, or "
                "pass --override to go on with the new settings."
            )
        for change in found:
            run.log(f"overridden: {change}")
        run.log(f"goes on after step {snapshot.step}")
    run.keep_metrics(snapshot.step if snapshot else 0)
    run.write_settings(to_toml(config), inputs)
    return snapshot
