"""A method of one's own in `rite train`: LoRA on the values of the cross-attentions alone."""

import rite_diffusion as rite
from rite_diffusion.methods import METHODS, Method
from rite_diffusion.methods.weights import LoraWeights


class ValuesOnly(Method):
    """Pairs where the denoiser takes up what the text says; where it looks stays the base's."""

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        denoiser = backbone.denoiser_name
        paths = [path for path in backbone.lora_targets(denoiser) if path.endswith("attn2.to_v")]
        self.weights = LoraWeights(
            backbone, {denoiser: paths}, rank=config.lora.rank, seed=config.seed
        )

    def groups(self):
        """One group at the denoiser's rate."""
        [parameters] = self.weights.named.values()
        return [{"name": "values", "params": parameters, "lr": self.config.optim.lr_unet}]

    def conditioning(self, captions):
        """The text encoder's states, which do not train."""
        return self.backbone.encode_captions(captions)

    def pairs(self):
        """What goes into the adapter file."""
        return self.weights.pairs()

    def remove(self):
        """Take the pairs out of the backbone again."""
        self.weights.remove()
        super().remove()


def main(photos: str = "examples/photos/robot", **settings):
    """Train with the method; returns the adapter's path."""
    METHODS["values"] = ValuesOnly
    return rite.train(photos, trigger="<robot>", class_noun="robot", method="values", **settings)


if __name__ == "__main__":
    print(main())
