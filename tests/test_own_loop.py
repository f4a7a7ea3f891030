"""A training loop of one's own, from public parts."""

import torch

import rite_diffusion as rite

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


def test_a_loop_of_ones_own_learns_and_writes_an_adapter(photos, tmp_path):
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
