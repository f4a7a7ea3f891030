"""What a GPU may do differently: `make test-gpu` on a machine that has one.

RITE_TEST_DEVICE=cpu runs them without a GPU, to test the tests.
"""

import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rite_diffusion as rite
from flow_models import PIPELINES, with_random_weights
from random_adapters import random_adapter
from rite_diffusion.adapters.attach import attach
from rite_diffusion.backbones import source
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.generation.denoise import sample
from rite_diffusion.methods.lora import Lora
from rite_diffusion.optim import OPTIMIZERS
from rite_diffusion.training.precision import MixedPrecision
from runs import whole_and_resumed

pytestmark = pytest.mark.gpu

ABOUT = {"trigger": "<thing>", "class_noun": "toy"}
QUICK = {
    "steps": 4, "batch": 2, "resolution": 64, "prior": {"weight": 0}, "previews": {"every": 0},
    "lora": {"text_encoder": False, "rank": 2}, "optim": {"name": "rite"},
}  # fmt: skip
WAITS = {"rite": 1, "lora_muon": 1}  # for the device in one step; the others never wait
SHAPES = [(320, 320), (320, 768), (1280, 1280), (64, 64)]


@pytest.fixture(scope="module", autouse=True)
def device():
    """The GPU; float32 products there are whole, as on a CPU."""
    if os.environ.get("RITE_TEST_DEVICE") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return source.default_device()


@pytest.fixture
def exact(monkeypatch):
    """Algorithms that give the same bits each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def factors(device, rank=8):
    """A model of LoRA pairs, named as PEFT names them, with gradients."""
    draws = torch.Generator().manual_seed(0)

    def layer(rows, columns):
        own = nn.Module()
        for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            value = nn.Parameter(torch.randn(shape, generator=draws) / rank)
            value.grad = torch.randn(shape, generator=draws)
            own.register_module(name, nn.ParameterDict({"default": value}))
        return own

    model = nn.ModuleList([layer(*shape) for shape in SHAPES]).to(device)
    for parameter in model.parameters():
        assert parameter.grad is not None
    return model


def optimizer_of(name, model, rate=1e-3):
    return OPTIMIZERS[name].build([{"params": list(model.named_parameters()), "lr": rate}])


def products(model):
    return [layer.lora_B["default"] @ layer.lora_A["default"] for layer in model]


# --- optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_moves_pairs_as_on_a_cpu(name, device):
    found = []
    for place in (torch.device("cpu"), device):
        model = factors(place)
        optimizer = optimizer_of(name, model)
        before = [product.detach().clone() for product in products(model)]
        for _ in range(3):
            optimizer.step()
        moved = zip(products(model), before, strict=True)
        found.append([(after - first).detach().cpu() for after, first in moved])
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert (ours - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_rarely_waits_for_the_gpu(name, device):
    if device.type != "cuda":
        pytest.skip("counted by CUDA")
    model = factors(device)
    optimizer = optimizer_of(name, model)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) <= WAITS.get(name, 0), [str(each.message) for each in waits]


# --- drawing -----------------------------------------------------------------------------------


def test_a_picture_is_the_cpus(device, tiny_folder):
    """The noise is drawn on the CPU, so a seed gives the same picture everywhere."""
    pictures = []
    for place in (torch.device("cpu"), device):
        backbone = load_backbone(str(tiny_folder), "fp32", place)
        attach(backbone, random_adapter(backbone), "a")
        image = sample(backbone, ["a red cat"], [3], negative="a dog", steps=5)[0]
        pictures.append(np.asarray(image, int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


def test_released_encoders_leave_the_gpu_and_come_back(device, tiny_folder):
    backbone = load_backbone(str(tiny_folder), "fp32", device)
    wanted = backbone.encode_prompts(["a red cat"]).states.cpu()
    backbone.release(["vae", "text_encoder"])
    assert backbone.parts.as_it_is("text_encoder").device.type != "cuda"
    backbone.recall()
    found = backbone.encode_prompts(["a red cat"]).states.cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flows")

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            with_random_weights(PIPELINES[name]()).save_pretrained(root / name)
        return str(root / name)

    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_every_flow_family_trains_and_draws_in_bf16(name, folders, photos, tmp_path):
    base = folders(name)
    adapter = rite.train(photos, base=base, out=tmp_path, precision="bf16", **QUICK, **ABOUT)
    assert any(pair.up.any() for pair in rite.inspect(adapter).pairs)
    options = {"base": base, "steps": 2, "width": 64, "height": 64}
    plain, learned = (
        rite.generate("a <thing>", adapters=own, **options)[0] for own in ([], [adapter])
    )
    assert plain.tobytes() != learned.tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_in_every_precision(
    optimizer, precision, device, tiny_folder, photos, tmp_path
):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("fp16 does not train on a CPU")
    settings = QUICK | {"optim": {"name": optimizer}, "precision": precision}
    adapter = rite.train(photos, base=str(tiny_folder), out=tmp_path, **settings, **ABOUT)
    assert all(pair.up.isfinite().all() for pair in rite.inspect(adapter).pairs)
    assert any(pair.up.any() for pair in rite.inspect(adapter).pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_goes_on_bit_for_bit(precision, device, exact, tiny_folder, photos, tmp_path):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("fp16 does not train on a CPU")
    settings = QUICK | {"base": str(tiny_folder), "precision": precision}
    one, other = whole_and_resumed(photos, tmp_path, **ABOUT, **settings)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_compiled_and_checkpointed_steps_train(device, tiny_folder, photos, tmp_path):
    if device.type == "cpu":
        pytest.skip("compiling for a CPU takes minutes")
    settings = QUICK | {"gradient_checkpointing": True, "compile": True, "precision": "bf16"}
    adapter = rite.train(photos, base=str(tiny_folder), out=tmp_path, **settings, **ABOUT)
    assert all(pair.up.isfinite().all() for pair in rite.inspect(adapter).pairs)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_gradients_in_bf16_are_near_those_of_fp32(kind, device, tiny_folder):
    backbone = load_backbone(str(tiny_folder), "fp32", device)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.tensor([300, 700], device=device)
    found = {}
    for precision in ("fp32", "bf16"):
        lora = Lora(backbone, rank=4, kind=kind)
        mixed = MixedPrecision(device, precision)
        with mixed.autocast():
            states = backbone.encode_prompts(["a cat", "a dog"])
            loss = backbone.denoise(latents, times, states).float().square().mean()
        mixed.backward(loss)
        ups = [pair.up.grad for pair in lora.pairs() if pair.up.grad is not None]
        found[precision] = torch.cat([up.flatten() for up in ups]).cpu()
        lora.remove()
    near = torch.nn.functional.cosine_similarity(found["fp32"], found["bf16"], dim=0)
    assert near > 0.98


def test_predictions_are_finite_in_fp16(device, tiny_folder):
    if device.type == "cpu":
        pytest.skip("fp16 is for GPUs")
    backbone = load_backbone(str(tiny_folder), "fp16", device)
    with torch.no_grad():
        noisy = torch.randn(1, 4, 16, 16).to(device)
        states = backbone.encode_prompts(["a cat"])
        assert backbone.denoise(noisy, torch.tensor([500], device=device), states).isfinite().all()
