"""LoHa and LoKr that train: what they compute, how they start, their files, their optimizers."""

import logging

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from factors import FAST
from flow_bases import family
from predictions import prediction
from rite_diffusion.adapters import load_adapter
from rite_diffusion.adapters.attach import adaptable_layers, attach, detach
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.adapters.storage import read_header
from rite_diffusion.errors import RiteError
from rite_diffusion.methods.lora import Lora
from rite_diffusion.methods.products import Loha, Lokr, apply, divided
from rite_diffusion.optim import OPTIMIZERS, LoraRite, lora_param_groups
from rite_diffusion.types import ProductUpdate
from runs import Stop, crash_at, same_run, train
from shared_bases import shared_base

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
KINDS = {
    "loha": {"kind": "loha", "rank": 3, "alpha": 2.0},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 1.0, "factor": 4},
    "whole": {"kind": "lokr", "full_matrix": True, "factor": 4},
}
QUIET = {"previews": {"every": 0}, "checkpoints": {"every": 2}}


@pytest.fixture(scope="module")
def base(tiny_folder):
    return shared_base(str(tiny_folder))


def stirred(lora):
    """The matrices moved away from their start."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in lora.parameter_groups():
            for _, parameter in group["params"]:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return lora


def dense(update, shape):
    """The literal update of a weight of that shape."""
    return product_of(update.parts, update.scale, shape).detach()


def product_of(part, scale, shape):
    if "hada_w1_a" in part:
        product = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return scale * product.reshape(shape)
    if "lokr_w2" in part:
        second = part["lokr_w2"].flatten(1)
    else:
        second = part["lokr_w2_a"] @ part["lokr_w2_b"]
    return scale * torch.kron(part["lokr_w1"], second).reshape(shape)


@pytest.mark.parametrize("layers", ["attention", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_draws_what_the_model_in_training_drew(base, kind, layers, tmp_path):
    plain = prediction(base)
    lora = Lora(base, **KINDS[kind], layers=layers)
    assert torch.equal(prediction(base), plain) and not lora.pairs()
    stirred(lora)
    trained, updates = prediction(base), {each.name: each for each in lora.products()}
    path = lora.save(tmp_path / "a.safetensors", trigger="<a>")
    lora.remove()
    assert torch.equal(prediction(base), plain)
    adapter = load_adapter(path)
    for pair in adapter.pairs:
        found = delta_weight(pair)
        torch.testing.assert_close(found, dense(updates[pair.name], found.shape))
    attach(base, adapter, "a")
    drawn = prediction(base)
    detach(base, "a")
    assert (trained - plain).abs().max() > 0.01
    torch.testing.assert_close(drawn, trained, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_reads_the_file_as_the_same_updates(base, kind, tmp_path):
    lora = stirred(Lora(base, **KINDS[kind], layers="blocks"))
    updates = {each.name: each for each in lora.products()}
    tensors = load_file(lora.save(tmp_path / "a.safetensors", trigger="<a>"))
    header = read_header(tmp_path / "a.safetensors")
    assert header["ss_network_module"] == "lycoris.kohya"
    assert f'"{KINDS[kind]["kind"]}"' in header["ss_network_args"]
    module = LohaModule if kind == "loha" else LokrModule
    for name, (component, path) in adaptable_layers(base).items():
        if name not in updates:
            continue
        layer = base.components[component].get_submodule(path)
        layer = getattr(layer, "base_layer", layer)
        own = {key.split(".", 1)[1]: v for key, v in tensors.items() if key.split(".")[0] == name}
        stated = [own.pop(key, None) for key in module.weight_list]
        assert not own
        with torch.no_grad():
            made = module.make_module_from_state_dict(name, layer, *with_alpha(module, stated))
            found = made.get_weight(layer.weight.shape)
        torch.testing.assert_close(found, dense(updates[name], found.shape), rtol=1e-4, atol=1e-5)
    lora.remove()


def with_alpha(module, stated):
    """LyCORIS's own loader fills in an alpha where a file has none."""
    place = module.weight_list.index("alpha")
    return [*stated[:place], torch.tensor(1.0) if stated[place] is None else stated[place],
            *stated[place + 1 :]]  # fmt: skip


@pytest.mark.parametrize("name", ["z-image", "flux2"])
@pytest.mark.parametrize("kind", ["lokr", "whole"])
def test_diffusers_reads_a_flow_transformers_lokr(name, kind, tmp_path):
    base = family(name)
    lora = stirred(Lora(base, **KINDS[kind], text_encoder=False))
    updates = {each.name: each for each in lora.products()}
    path = lora.save(tmp_path / "a.safetensors", trigger="<a>")
    lora.remove()
    pipeline = base.pipeline
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    found = 0
    for place, layer in pipeline.transformer.named_modules():
        if hasattr(layer, "lokr_w1"):
            [adapter] = {*layer.lokr_w1, *layer.lokr_w1_a}
            delta = layer.get_delta_weight(adapter)
            wanted = dense(updates["lora_transformer_" + place.replace(".", "_")], delta.shape)
            torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5)
            found += 1
    pipeline.unload_lora_weights()
    assert found == len(updates)


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Conv2d(12, 8, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dense_update(kind, layer):
    torch.manual_seed(0)
    if kind == "loha":
        product = Loha(layer.weight.shape, 3, 2.0)
    else:
        product = Lokr(layer.weight.shape, None if kind == "whole" else 1, 2.0, 4)
    for parameter in product.parameters():
        nn.init.normal_(parameter, std=0.5)
    shape = (2, 12, 6, 6) if isinstance(layer, nn.Conv2d) else (2, 5, 12)
    one, other = (torch.randn(shape).requires_grad_() for _ in range(2))
    other.data.copy_(one.data)
    values = dict(product.named_parameters())
    update = ProductUpdate("a", values, product.scale)
    found = product(layer, one)
    found.square().sum().backward()
    ours = [one.grad, *(parameter.grad for parameter in product.parameters())]
    for parameter in product.parameters():
        parameter.grad = None
    attached = {key: value.detach().clone().requires_grad_() for key, value in values.items()}
    weight = product_of(attached, update.scale, layer.weight.shape)
    wanted = apply(layer, other, weight)
    wanted.square().sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ours, [other, *attached.values()], strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-3, atol=1e-3)


SIDES = [(320, 8, (8, 40)), (12, 8, (3, 4)), (7, 4, (1, 7)), (9, 1, (1, 9))]


@pytest.mark.parametrize(("side", "factor", "wanted"), SIDES)
def test_sides_are_divided_by_the_factor(side, factor, wanted):
    assert divided(side, factor) == wanted


class OneLoha(nn.Module):
    """A LoHa to be fitted to a random target, in float64."""

    def __init__(self, mixing):
        super().__init__()
        torch.manual_seed(0)
        self.loha = Loha((9, 12), 3, None).double()
        self.target = torch.randn(9, 12, dtype=torch.float64)
        with torch.no_grad():
            self.loha.hada_w2_a.normal_()
            for half in ("1", "2"):
                up, down = (getattr(self.loha, f"hada_w{half}_{end}") for end in "ab")
                up.copy_(up @ mixing)
                down.copy_(torch.linalg.solve(mixing, down))

    def product(self):
        part = dict(self.loha.named_parameters())
        return product_of(part, 1.0, (9, 12))

    def run(self, optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(self.product(), self.target).backward()
            optimizer.step()
        return self.product().detach()


@pytest.mark.parametrize("name", ["rite", "lora_muon", "adamw"])
def test_lora_aware_optimizers_see_the_pairs_of_a_loha(name):
    """Their steps do not depend on how each of the two products is split; AdamW's do."""
    mixing = torch.tensor([[3.0, 1, 0], [0, 0.2, 0], [0, 5, 10]], dtype=torch.float64)
    found = []
    for matrix in (torch.eye(3, dtype=torch.float64), mixing):
        model = OneLoha(matrix)
        make = FAST.get(name, torch.optim.AdamW)
        found.append(model.run(make(lora_param_groups(model), lr=1e-2)))
    same = torch.allclose(*found, rtol=1e-6, atol=1e-7)
    assert same == (name != "adamw")


def test_a_lokrs_factored_matrix_is_a_pair_and_the_other_is_not():
    model = nn.ModuleDict({"a": Lokr((12, 12), 1, None, 3)})
    optimizer = LoraRite(lora_param_groups(model), lr=1e-3)
    [pairs, others] = optimizer.param_groups
    assert pairs["param_names"] == ["a.lokr_w2_a", "a.lokr_w2_b"]
    assert others["param_names"] == ["a.lokr_w1"]


def settings_of(kind, tiny_folder, **others):
    return QUIET | {"base": str(tiny_folder), "lora": KINDS[kind]} | others


@pytest.mark.parametrize("optimizer", [n for n, o in OPTIMIZERS.items() if o.moves_pairs])
def test_whole_matrices_are_no_pairs_to_move(tiny_folder, photos, tmp_path, optimizer):
    settings = settings_of("whole", tiny_folder, optim={"name": optimizer})
    with pytest.raises(RiteError, match=rf"{optimizer} moves pairs .*whole matrices alone"):
        train(photos, tmp_path / "run", **settings)


TRAINED = [("loha", name) for name in OPTIMIZERS]
TRAINED += [("lokr", "rite"), ("lokr", "lora_muon"), ("whole", "adamw"), ("whole", "sgd")]


@pytest.mark.parametrize(("kind", "optimizer"), TRAINED)
def test_every_optimizer_trains_them(tiny_folder, photos, tmp_path, kind, optimizer):
    settings = settings_of(kind, tiny_folder, optim={"name": optimizer})
    pairs = load_adapter(train(photos, tmp_path / "run", **settings)).pairs
    assert 0 < max(delta_weight(pair).abs().max() for pair in pairs) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(tiny_folder, photos, tmp_path, kind):
    settings = settings_of(kind, tiny_folder, steps=4, ema=0.5)
    train(photos, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        train(photos, tmp_path / "parts", on_step=crash_at(2), **settings)
    train(photos, tmp_path / "parts", **settings)
    same_run(tmp_path / "whole", tmp_path / "parts")


METHODS = {
    "pivotal": {"tokens": {"first": 1}},
    "ed_lora": {},
    "custom_diffusion": {"custom_diffusion": {"weights": "lora"}},
}


@pytest.mark.parametrize("kind", ["lokr"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_them(tiny_folder, photos, tmp_path, kind, method):
    settings = settings_of(kind, tiny_folder, method=method) | METHODS[method]
    adapter = load_adapter(train(photos, tmp_path / "run", **settings))
    assert adapter.tokens and max(delta_weight(pair).abs().max() for pair in adapter.pairs) > 0


BAD = {
    "whole LoHa": ({"kind": "loha", "full_matrix": True}, "full_matrix is for lora.kind = lokr"),
    "alpha": ({"kind": "lokr", "full_matrix": True, "alpha": 2.0}, "alpha has no effect"),
    "start": ({"kind": "lokr", "init": "pissa"}, "lora.init = pissa is for lora.kind"),
    "file": ({"kind": "loha", "init_from": "a.safetensors"}, "init_from is for method lora"),
    "rank": ({"kind": "loha", "rank": 500}, "more than the narrowest layer"),
    "factor": ({"kind": "lokr", "factor": 0}, r"lora\.factor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_train_is_refused_at_first(photos, tiny_folder, tmp_path, case):
    lora, message = BAD[case]
    with pytest.raises(RiteError, match=message):
        train(photos, tmp_path / "run", base=str(tiny_folder), **QUIET, lora=lora)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_they_train_over_quantised_weights(photos, tmp_path, kind):
    settings = {"memory": {"weights": "int8", "encoder_weights": "int8"}, "lora": KINDS[kind]}
    pairs = load_adapter(train(photos, tmp_path / "run", steps=1, **QUIET, **settings)).pairs
    assert max(delta_weight(pair).abs().max() for pair in pairs) > 0
