import pytest
import torch

from predictions import prediction, prediction_in_diffusers
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.adapters.learned_embeddings import tokens_of
from rite_diffusion.backbones.families import POCKET
from rite_diffusion.errors import ConfigError
from rite_diffusion.methods import METHODS
from rite_diffusion.methods.new_embeddings import new_placeholders
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.training.plan import plan_training
from rite_diffusion.training.settings import configure
from rite_diffusion.training.trainer import Job, train_steps
from rite_diffusion.types import Concept, LoraPair
from runs import QUICK, Stop, config_of, crash_at, same_run, train
from shared_bases import shared_base
from wordy import RATES, random_data, steps_of, wordy_config

WORDY = [name for name in METHODS if name != "lora"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_every_optimizer(pocket, name, optimizer):
    found = {"options": {"d0": 1e-3}} if optimizer == "prodigy" else {}  # 1e-6 moves too little
    config = wordy_config(name, batch=3, optim={"name": optimizer} | RATES | found)
    tables = [table.clone() for table in pocket.token_tables]
    method, trainer = steps_of(pocket, config, masked=True)
    before = {n: p.detach().clone() for g in method.groups() for n, p in g["params"]}
    for step in range(3):
        loss, _, good = trainer.step(step)
        assert good and loss > 0
    after = {n: p.detach() for group in method.groups() for n, p in group["params"]}
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert not still and len(after) > 1
    state = trainer.optimizer.state_dict()["state"]
    assert sum(v.numel() for each in state.values() for v in each.values()) < 10 * sum(
        value.numel() for value in after.values()
    )
    for table, copy in zip(pocket.token_tables, tables, strict=True):
        assert torch.equal(table, copy) and table.grad is None
    method.remove()
    assert not pocket.embeddings


@pytest.mark.parametrize("optimizer", ["adamw", "rite"])
@pytest.mark.parametrize("name", WORDY)
def test_an_interrupted_run_equals_the_uninterrupted_one(photos, tmp_path, name, optimizer):
    settings = {
        "method": name, "steps": 5, "checkpoints": {"every": 2}, "previews": {"every": 0},
        "optim": {"name": optimizer, "warmup": 3},
    }  # fmt: skip
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(3), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_saved_adapter_acts_like_the_trained_method(pocket, tmp_path, name):
    config = wordy_config(name, trigger="<odd> <thing>", optim={"lr": 1e-2} | RATES)
    method, trainer = steps_of(pocket, config, masked=True)
    with torch.enable_grad():
        for step in range(3):
            trainer.step(step)
    prompt = ["a <odd> <thing> on a red background"]
    noisy, timesteps = torch.randn(1, 8, 16, 24), torch.tensor([500])
    trained = pocket.denoise(noisy, timesteps, pocket.encode_prompts(prompt))
    adapter = Adapter(method.pairs(), AdapterInfo(), tokens_of(method.embeddings()))
    save_adapter(tmp_path / "a.safetensors", adapter)
    method.remove()
    plain = pocket.denoise(noisy, timesteps, pocket.encode_prompts(prompt))
    attach(pocket, load_adapter(tmp_path / "a.safetensors"), "a")
    loaded = pocket.denoise(noisy, timesteps, pocket.encode_prompts(prompt))
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert (plain - trained).abs().max() > 1e-2


@pytest.mark.parametrize("optimizer", ["adamw", "rite"])
def test_all_layers_of_the_blocks_train_and_other_tools_read_them(pocket, tmp_path, optimizer):
    lora, optim = {"layers": "blocks", "rank": 2}, {"name": optimizer, "lr": 1e-2}
    method, trainer = steps_of(pocket, wordy_config("lora", lora=lora, optim=optim | RATES))
    plain = prediction(pocket)
    for step in range(2):
        trainer.step(step)
    pairs = [LoraPair(p.name, p.down.detach(), p.up.detach(), p.scale) for p in method.pairs()]
    kinds = {tuple(pair.down.shape[2:]) for pair in pairs}
    assert kinds == {(), (1, 1), (3, 3)} and all(pair.up.abs().max() > 0 for pair in pairs)
    save_adapter(tmp_path / "a.safetensors", Adapter(pairs, AdapterInfo(trigger="<thing>")))
    ours = prediction(pocket)
    method.remove()
    assert (ours - plain).abs().max() > 1e-2
    theirs = prediction_in_diffusers(POCKET, tmp_path / "a.safetensors")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_removing_a_method_restores_the_base(pocket, name):
    plain = prediction(pocket)
    before = {name: part.state_dict() for name, part in pocket.components.items()}
    method, trainer = steps_of(pocket, wordy_config(name), masked=True)
    trainer.step(0)
    method.remove()
    assert torch.equal(prediction(pocket), plain)
    for part, state in before.items():
        now = pocket.components[part].state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in now.items())


@pytest.mark.parametrize("name", WORDY)
@pytest.mark.parametrize("trigger", ["<a>", "<a> <b>", "<a> <b> <c>"])
def test_every_new_word_of_a_trigger_trains(own_pocket, name, trigger):
    method, trainer = steps_of(own_pocket, wordy_config(name, trigger, optim=RATES), masked=True)
    assert list(own_pocket.embeddings) == trigger.split()
    before = {word: [each.clone() for each in rows] for word, rows in method.embeddings().items()}
    trainer.step(0)
    for word, rows in method.embeddings().items():
        for now, then in zip(rows, before[word], strict=True):
            moved = (now - then).abs().amax(-1)  # (layers, vectors)
            trains = len(moved[0]) - (name == "custom_diffusion" and word == trigger.split()[-1])
            assert (moved[:, :trains] > 0).all() and (moved[:, trains:] == 0).all()


@pytest.mark.parametrize("name", WORDY)
def test_methods_train_on_every_kind_of_base(name, tiny_folder, tiny_folder_xl):
    for folder in (tiny_folder, tiny_folder_xl):
        backbone = shared_base(str(folder))
        config = wordy_config(name, base=str(folder), lora={"rank": 2}, optim=RATES)
        method, trainer = steps_of(backbone, config, masked=True, cells=(8, 24))
        before = {n: p.detach().clone() for g in method.groups() for n, p in g["params"]}
        _, _, good = trainer.step(0)
        assert good
        after = {n: p for group in method.groups() for n, p in group["params"]}
        words = [n for n in after if n.startswith("tokens.")]
        assert len(words) == len(backbone.token_tables)
        assert not any(torch.equal(after[n], before[n]) for n in words)
        method.remove()


def test_the_last_vector_starts_as_the_class_and_others_as_noise(pocket):
    config = wordy_config("pivotal", "<a> <b>", tokens={"vectors": 2})
    method = METHODS["pivotal"](pocket, config)
    [first], [last] = method.embeddings().values()
    dog = pocket.token_tables[0][pocket.token_ids("dog")[0]]
    assert torch.equal(last[0, 1], dog)
    noise = torch.cat([first.flatten(), last[0, 0]])
    assert noise.std().item() == pytest.approx(pocket.token_tables[0].std().item(), rel=0.2)
    method.remove()
    again = METHODS["pivotal"](pocket, config).embeddings()
    assert torch.equal(again["<a>"][0], first)


def test_an_embedding_can_start_from_a_word_or_noise(pocket):
    def start(**tokens):
        method = METHODS["pivotal"](pocket, wordy_config("pivotal", tokens=tokens))
        [[rows]] = method.embeddings().values()
        method.remove()
        return rows[0, 0].detach()

    fish = pocket.token_tables[0][pocket.token_ids("fish")[0]]
    assert torch.equal(start(init="fish"), fish)
    assert start(init="", deviation=0.5).std() == pytest.approx(0.5, rel=0.2)


def test_pivotal_tuning_trains_embeddings_first_and_pairs_after(pocket):
    config = wordy_config("pivotal", steps=6, tokens={"first": 2}, optim={"schedule": "linear"})
    method, trainer = steps_of(pocket, config)
    rows = method.embeddings()["<thing>"][0]
    rates, moved = [], []
    assert method.pairs() == []
    for step in range(6):
        before = [rows.detach().clone(), [p.detach().clone() for p in _pairs(method)]]
        trainer.step(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"] / config.optim.lr_unet)
        ups = zip(_pairs(method), before[1], strict=True)
        moved.append(
            (not torch.equal(rows, before[0]), not all(torch.equal(*each) for each in ups))
        )
    assert moved == [(True, False)] * 2 + [(False, True)] * 4
    # Phases this short leave no step for the warm-up; each decays from its own beginning.
    expected = [1.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates == pytest.approx(expected) and len(method.pairs()) == 64


def _pairs(method):
    return [p for group in method.groups() if group["name"] != "tokens" for _, p in group["params"]]


def test_embeddings_that_reach_the_stop_norm_stay_fixed(pocket):
    norm = pocket.token_tables[0][pocket.token_ids("dog")[0]].norm().item()
    tokens = {"stop_norm": norm * 1.02}
    config = wordy_config("pivotal", steps=12, tokens=tokens, optim={"lr_tokens": 2e-3} | RATES)
    method, trainer = steps_of(pocket, config)
    rows = method.embeddings()["<thing>"][0]
    norms = []
    for step in range(12):
        trainer.step(step)
        norms.append(rows.norm().item())
    grown = [value >= tokens["stop_norm"] for value in norms]
    assert 0 < grown.index(True) < 11
    assert len(set(norms[grown.index(True) :])) == 1 and len(set(norms)) > 3


def test_known_words_of_a_trigger_get_no_embedding(pocket):
    assert new_placeholders(pocket, Concept("<odd> cat <x>", "cat")) == ["<odd>", "<x>"]


@pytest.mark.parametrize("trigger", ["red robot", "dog"])
def test_a_trigger_of_known_words_is_refused(photos, trigger):
    with pytest.raises(ConfigError, match=f"such as '<{trigger.replace(' ', '-')}>'"):
        plan_training(config_of(photos, trigger=trigger, method="pivotal"))


def test_two_concepts_cannot_share_a_word(pocket):
    subsets = [{"trigger": "<a>", "class_noun": noun, "photos": noun} for noun in ("dog", "cat")]
    config = configure({"dataset": [{"subset": subsets}], "method": "pivotal"} | QUICK, "pocket")
    with pytest.raises(ConfigError, match="'<a>' has two meanings"):
        METHODS["pivotal"](pocket, config)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "lora", "tokens": {"vectors": 2}}, r"\[tokens\] is for method pivotal"),
        ({"method": "pivotal", "tokens": {"first": 3}}, "less than its steps"),
    ],
    ids=["lora", "first"],
)
def test_settings_of_other_methods_are_refused(photos, settings, words):
    with pytest.raises(ConfigError, match=words):
        config_of(photos, **settings)


def test_embeddings_train_in_fp32_with_half_precision(photos, tmp_path):
    adapter = load_adapter(train(photos, tmp_path / "half", method="pivotal", precision="bf16"))
    exact = load_adapter(train(photos, tmp_path / "single", method="pivotal"))
    rows = adapter.tokens["<thing>"]
    assert rows.dtype == torch.float32 and not torch.equal(rows, rows.bfloat16().float())
    torch.testing.assert_close(rows, exact.tokens["<thing>"], rtol=0.1, atol=0.01)


def test_averaged_embeddings_are_saved(photos, tmp_path):
    plain, averaged = (
        load_adapter(train(photos, tmp_path / str(ema), method="pivotal", ema=ema)).tokens[
            "<thing>"
        ]
        for ema in (0.0, 0.9)
    )
    assert not torch.equal(plain, averaged)
    torch.testing.assert_close(plain, averaged, rtol=0.1, atol=0.01)


def test_on_step_is_called_for_every_step(pocket):
    config = wordy_config("pivotal")
    method = METHODS["pivotal"](pocket, config)
    steps = []
    job = Job(pocket, method, random_data(pocket, ["a <thing>", "a cat"]), config)
    train_steps(job, lambda report: steps.append(report.step))
    assert steps == [1, 2, 3]


def test_full_weight_updates_act_like_changed_weights(own_pocket):
    config = wordy_config("custom_diffusion")
    method = METHODS["custom_diffusion"](own_pocket, config)
    states = own_pocket.encode_prompts(["a <thing> on a red background"])
    noisy, timesteps = torch.randn(1, 8, 16, 16), torch.tensor([500])
    deltas = {n: p for group in method.groups() for n, p in group["params"] if "delta" in n}
    assert len(deltas) == 14
    with torch.no_grad():
        for delta in deltas.values():
            delta.normal_(std=0.05)
        trained = own_pocket.denoise(noisy, timesteps, states)
        exact = {pair.name: pair.up @ pair.down for pair in method.pairs()}
        method.remove()
        for name, delta in deltas.items():
            path = name.removeprefix("unet.").removesuffix(".delta")
            weight = own_pocket.unet.get_submodule(path).weight
            weight.add_(delta)
            assert torch.equal(exact[f"lora_unet_{path.replace('.', '_')}"], delta)
        torch.testing.assert_close(
            own_pocket.denoise(noisy, timesteps, states), trained, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_keys_and_values_get_no_gradient_from_the_begin_token(pocket, weights):
    config = wordy_config("custom_diffusion", custom_diffusion={"weights": weights})
    method = METHODS["custom_diffusion"](pocket, config)
    module = pocket.cross_attentions[0]
    states = torch.randn(2, 5, 192, requires_grad=True)
    for layer in (module.to_k, module.to_v):
        layer(states).square().sum().backward()
        assert (states.grad[:, 0] == 0).all() and (states.grad[:, 1:] != 0).all()
    with torch.no_grad():
        held = module.to_k(states)
        method.remove()
        assert torch.equal(held, module.to_k(states))  # values are as ever


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_custom_diffusion_trains_only_keys_and_values(own_pocket, weights):
    config = wordy_config("custom_diffusion", custom_diffusion={"weights": weights}, optim=RATES)
    method, trainer = steps_of(own_pocket, config)
    trainer.step(0)
    names = [pair.name for pair in method.pairs()]
    assert len(names) == 14 and all(n.endswith(("attn2_to_k", "attn2_to_v")) for n in names)


@torch.no_grad()
def test_a_modifier_is_encoded_before_its_class_noun(own_pocket):
    METHODS["custom_diffusion"](own_pocket, wordy_config("custom_diffusion"))
    said = own_pocket.encode_prompts(["a <thing> on a red background"]).states
    assert own_pocket.token_positions("a <thing> on red", "<thing>") == [2, 3]
    own_pocket.embeddings.clear()
    METHODS["custom_diffusion"](own_pocket, wordy_config("custom_diffusion", "<thing> dog"))
    assert own_pocket.token_positions("a <thing> dog", "<thing>") == [2]
    written = own_pocket.encode_prompts(["a <thing> dog on a red background"]).states
    torch.testing.assert_close(said, written)


def test_ed_lora_starts_as_the_paper_does(pocket):
    method = METHODS["ed_lora"](pocket, wordy_config("ed_lora", lora={"rank": 4}))
    [[rows]] = method.embeddings().values()
    assert rows.shape == (7, 2, 192)
    assert all(torch.equal(rows[0], layer) for layer in rows)
    dog = pocket.token_tables[0][pocket.token_ids("dog")[0]]
    assert torch.equal(rows[0, 1], dog) and not torch.equal(rows[0, 0], dog)
    assert {pair.scale for pair in method.pairs()} == {1.0}
    for pair in method.pairs():  # a linear layer's start: uniform up to 1 / sqrt(in)
        assert pair.down.abs().max() <= pair.down.shape[1] ** -0.5
        assert pair.down.std().item() == pytest.approx((3 * pair.down.shape[1]) ** -0.5, rel=0.2)
        assert pair.up.abs().max() == 0


def test_masks_confine_ed_loras_attention_to_the_subject(pocket):
    losses = []
    for weight in (0.0, 0.5):
        config = wordy_config("ed_lora", attention={"weight": weight}, optim=RATES)
        method, trainer = steps_of(pocket, config, masked=True)
        losses.append(trainer.step(0)[0])
        method.remove()
    assert losses[1] > losses[0]
