"""Resuming a run that was stopped or killed, unless its settings or inputs have changed."""

from collections.abc import Sequence
from hashlib import sha256

from rite_diffusion._version import __version__
from rite_diffusion.config import TrainConfig, flatten, from_toml, to_toml
from rite_diffusion.errors import RunError
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.snapshot import Snapshot
from rite_diffusion.types import Photo

# Settings that may change without effect on the weights. The folders' content is compared itself.
FREE = {"photos", "class_photos", "previews", "checkpoints", "trackers", "cache", "compile"}


def inputs_of(photos: Sequence[Photo], base_fingerprint: str) -> dict[str, str]:
    """Version, base fingerprint, and a digest of each photo with caption, mask and weight."""
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
    """The settings, with the rates that an earlier probe of the run found if `lr` is "auto"."""
    optim = config.optim
    if optim.lr != "auto" or not run.has_settings():
        return config
    before = from_toml(run.read_settings()[0]).optim
    if before.lr != "auto":
        return config
    rates = {"lr_unet": before.lr_unet, "lr_text_encoder": before.lr_text_encoder}
    return config.model_copy(update={"optim": optim.model_copy(update=rates)})


def changes(run: RunFolder, config: TrainConfig, inputs: dict[str, str]) -> list[str]:
    """Differences from the run folder's settings and inputs, as "optim.lr: 0.001 -> 0.002"."""
    old_config, old_inputs = run.read_settings()
    before, now = (
        flatten(each.model_dump(exclude=FREE)) | own
        for each, own in ((from_toml(old_config), old_inputs), (config, inputs))
    )
    if not config.trains_text_encoder:  # its rate has no effect
        before.pop("optim.lr_text_encoder", None)
        now.pop("optim.lr_text_encoder", None)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in keys]


def refuse_finished(run: RunFolder, config: TrainConfig) -> None:
    """RunError for a finished run, unless the settings ask for more steps."""
    if not run.is_finished():
        return
    before = from_toml(run.read_settings()[0]).steps if run.has_settings() else None
    if before is None or config.steps <= before:
        more = f", ask for more than its {before} steps" if before else ""
        raise RunError(
            f"{run.path} already holds an adapter. Choose another --out{more}, or delete the "
            "folder."
        )
    if not run.checkpoints():
        raise RunError(
            f"{run.path} holds a finished run of {before} steps without its last state "
            "(checkpoints/), which more steps would go on from. Choose another --out."
        )


def begin_or_continue(
    run: RunFolder, config: TrainConfig, inputs: dict[str, str], override: bool
) -> Snapshot | None:
    """The snapshot to resume from, None for a new run; writes settings and inputs.

    A finished run is resumed if more steps are wanted. Raises RunError where settings or inputs
    have changed, unless `override`, and where the run has done more steps than are wanted.
    """
    refuse_finished(run, config)
    longer = run.is_finished()
    snapshot = run.newest_snapshot()
    if snapshot is not None:
        if snapshot.step > config.steps:
            raise RunError(
                f"{run.path} has done {snapshot.step} steps, {config.steps} are wanted: ask for as "
                "many or more, or choose another --out."
            )
        found = changes(run, config, inputs)
        if longer:
            found = [change for change in found if not change.startswith("steps: ")]
        if found and not override:
            raise RunError(
                f"{run.path} was begun differently ({'; '.join(found)}). Choose another --out, or "
                "pass --override to go on with the new settings."
            )
        for change in found:
            run.log(f"overridden: {change}")
        run.log(f"goes on after step {snapshot.step}" + (f" to {config.steps}" if longer else ""))
    run.truncate_metrics(snapshot.step if snapshot else 0)
    run.write_settings(to_toml(config), inputs)
    return snapshot
