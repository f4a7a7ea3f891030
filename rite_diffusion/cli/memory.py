"""What `rite train --dry-run` tells of memory before anything is loaded."""

from rite_diffusion.backbones.sizes import describe_bytes
from rite_diffusion.cli.output import PlanPrinter
from rite_diffusion.cli.settings import say
from rite_diffusion.training.estimate import Estimates, can_be_estimated
from rite_diffusion.training.fit import cheapest, describe_settings, fits, room
from rite_diffusion.training.plan import Plan


class DryRunPrinter(PlanPrinter):
    """Prints a plan with the memory that each stage needs."""

    def planned(self, plan: Plan) -> None:
        """Print the training, then its memory."""
        super().planned(plan)
        if can_be_estimated(plan.config):
            describe_memory(plan)


def describe_memory(plan: Plan) -> None:
    """Print the estimated memory of each stage, and the cheapest settings with which it fits."""
    config, device = plan.config, plan.backbone.device
    estimates = Estimates(plan.backbone, config, len(plan.photos) + len(plan.held_out))
    stages = estimates.stages(config)
    for number, stage in enumerate(stages):
        say(f"{'' if number else 'memory':<12}{stage.name:<9}{describe_bytes(stage.device)}")
    main = max((stage.main for stage in stages), key=lambda each: sum(each.values()))
    where = "beside the device" if device.type == "cuda" else "beside that"
    say(f"{'':<12}{where}, in main memory: {describe_bytes(main)}")
    most = room(device)[0] / 1e9
    if fits(stages, device):
        say(f"{'fits':<12}in {most:.1f} GB that may be used")
        return
    found = cheapest(estimates, device)
    remedy = "no settings of memory do" if found is None else f"{describe_settings(found)} does"
    say(f"{'too large':<12}for {most:.1f} GB that may be used: {remedy}")
