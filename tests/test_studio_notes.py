"""What the studio tells of adapters and fusions, beside pictures and files."""

from dataclasses import replace
from pathlib import Path

import pytest

from random_adapters import random_adapter
from rite_diffusion.adapters import load_adapter, save_adapter
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import FusionError
from rite_diffusion.fusion.merge import Merged
from rite_diffusion.generation.request import PictureRequest
from rite_diffusion.studio import fusing
from rite_diffusion.studio.conflicts import fusion_html
from rite_diffusion.studio.engine import Engine
from rite_diffusion.studio.sheet_requests import SheetRequest, draw_sheet
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace


@pytest.fixture
def space(tmp_path) -> Workspace:
    """A workspace with two adapters of the pocket base, and one whose alphas are 0."""
    space, pocket = Workspace(tmp_path / "space"), load_backbone("pocket")
    for seed, name in enumerate(("one", "two", "silent")):
        made = random_adapter(pocket, 2, 0.2, seed)
        if name == "silent":
            made = replace(made, pairs=[replace(pair, scale=0.0) for pair in made.pairs])
        info = replace(
            made.info, trigger=f"<{name}>", base="pocket", base_fingerprint=pocket.fingerprint
        )
        save_adapter(space.folder("adapters") / f"{name}.safetensors", replace(made, info=info))
    return space


def test_the_studio_notes_adapters_without_effect(space):
    told = list[str]()
    files = [space.root / "adapters/one.safetensors", space.root / "adapters/silent.safetensors"]
    wish = PictureRequest(prompt="a cat", steps=1)
    list(Engine().draw(space, [wish], told.append, [f"{files[0]}:0", str(files[1])], "pocket"))
    count = len(load_adapter(files[1]).pairs)
    silent = f"silent.safetensors: {count} of {count} layers have no effect, as their alpha is 0"
    assert told == ["one.safetensors: its layers have no effect at weight 0", silent]
    told.clear()
    order = SheetRequest(["a cat"], [["silent"]], steps=1)
    draw_sheet(Studio(space.root, False), space, order, lambda done, total: None, told.append)
    assert told == [silent]


def test_the_studio_refuses_or_reports_a_lossy_fusion(space, tmp_path):
    studio, out = Studio(space.root, False), tmp_path / "f.safetensors"
    chosen = [("one", 1.0), ("two", 0.5)]

    def fused(rank, allow_loss=False):
        order = fusing.fusion_request(space, chosen, "concat", rank, allow_loss)
        return fusing.fuse(studio, space, order, out, lambda words, share: None)

    with pytest.raises(FusionError, match="cut in rank.*relative error 0."):
        fused(2)
    assert not out.exists()
    made = fused(2, allow_loss=True)
    assert load_adapter(out).ranks() == [2] and isinstance(made, Merged) and made.loss > 0.01
    assert f"relative error {made.loss:.2g}" in fusion_html(made)
    assert fusion_html(fused(4)) == "" and Path(out).exists()
