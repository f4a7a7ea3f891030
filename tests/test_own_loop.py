"""A training loop of one's own, from public parts."""

import importlib.util
import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import torch

import rite_diffusion as rite
from rite_diffusion.adapters import load_adapter
from rite_diffusion.methods import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"

LOOP = """
base = rite.load_base("pocket")
data = rite.encode_photos(base, photos, trigger="<thing>", class_noun="toy")
lora = rite.Lora(base, rank=4, text_encoder=False)
optimizer = rite.optim.LoraRite(lora.parameter_groups(), lr=1e-3)
for step in range(steps):
    batch = rite.draw_batch(base, data, step, size=4, seed=0)
    loss = rite.diffusion_loss(base, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
lora.save(out, trigger="<thing>", class_noun="toy")
"""


def test_a_users_training_loop_learns_and_writes_an_adapter(photos, tmp_path):
    out, losses = tmp_path / "thing.safetensors", []
    exec(LOOP, {"rite": rite, "photos": photos, "out": out, "steps": 6, "losses": losses})
    adapter = rite.inspect(out)
    assert adapter.info.trigger == "<thing>" and adapter.info.base == "pocket"
    assert adapter.ranks() == [4] and any(pair.up.abs().max() > 0 for pair in adapter.pairs)
    [image] = rite.generate("a <thing>", adapters=[out], steps=2)
    assert image.size == (64, 64)
    again = []
    exec(LOOP, {"rite": rite, "photos": photos, "out": out, "steps": 6, "losses": again})
    assert again == losses


def test_removed_pairs_leave_the_base_as_it_was(pocket):
    before = {key: value.clone() for key, value in pocket.unet.state_dict().items()}
    lora = rite.Lora(pocket, rank=2)
    assert len(lora.pairs()) > 0
    lora.remove()
    after = pocket.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_public_names_are_complete_and_typed():
    for name in rite.__all__:
        assert getattr(rite, name) is not None
    assert set(dir(rite)) == set(rite.__all__)


def example(name: str):
    """An example's module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_users_method_trains(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "values", METHODS["lora"])  # put back at the end
    settings = {"steps": 2, "prior": {"weight": 0}, "previews": {"every": 0}}
    path = example("own_method").main(str(photos), out=tmp_path / "run", **settings)
    adapter = load_adapter(path)
    assert adapter.info.method == "values" and len(adapter.pairs) > 2
    assert all(pair.name.endswith("attn2_to_v") for pair in adapter.pairs)


def test_a_users_backbone_learns_and_draws(photos, tmp_path):
    out = tmp_path / "toy.safetensors"
    losses, image = example("own_backbone").main(str(photos), steps=60, out=str(out))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert image.size == (16, 16) and len(load_adapter(out).pairs) == 3


def test_types_of_public_signatures_are_public():
    public = {id(getattr(rite, name)) for name in rite.__all__}
    for name in rite.__all__:
        function = getattr(rite, name)
        for held in named_types(function) if inspect.isfunction(function) else ():
            assert id(held) in public, f"{held} of rite.{name}"


def named_types(function) -> set:
    """The toolkit's own types in a function's signature."""
    found, todo = set(), list(get_type_hints(function).values())
    while todo:
        kind = todo.pop()
        arguments = get_args(kind)
        for each in arguments:
            todo += each if isinstance(each, list) else [each]  # of a Callable
        if inspect.isclass(kind) and not arguments and kind.__module__.startswith("rite_"):
            found.add(kind)
    return found
