"""The optimizers outside this toolkit: a language model, several processes, loss scaling."""

import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from factors import FAST
from forks import forked
from rite_diffusion.errors import OptimizerError
from rite_diffusion.optim import OPTIMIZERS, LoraRite, lora_param_groups


def test_a_language_model_learns_in_transformers_trainer():
    example = Path(__file__).parents[1] / "examples/language_model.py"
    losses = runpy.run_path(str(example))["main"](steps=60)
    assert losses[-1] < 0.7 * math.log(32)  # a guess among 32 words costs log 32


def tiny_llama():
    """A random Llama of two layers with LoRA on its attention and a trained head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    return get_peft_model(LlamaForCausalLM(config), lora)


def hugging_face_trainer(model, folder, rule, steps=6, **options):
    """Trainer with checkpoints every three steps; the options are the optimizer's."""
    rows = [(start + torch.arange(12)) % 32 for start in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, save_steps=3, report_to=[],
        logging_steps=1, use_cpu=True, gradient_accumulation_steps=2, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(
        model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(rule, options)
    )  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_transformers_trainer_builds_an_optimizer_and_resumes_it(name, tmp_path):
    def run(folder, steps, checkpoint=None):
        model = tiny_llama()
        groups = lora_param_groups(model)
        options = {"params": groups, "lr": OPTIMIZERS[name].lr}
        trainer = hugging_face_trainer(model, folder, FAST[name], steps, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {n: p for n, p in model.named_parameters() if p.requires_grad}

    losses, whole = run(tmp_path / "whole", 6)
    assert losses[-1] < losses[0]
    run(tmp_path / "parts", 3)
    _, parts = run(tmp_path / "parts", 6, str(tmp_path / "parts/checkpoint-3"))
    assert sum("lm_head" in name for name in whole) == 1
    for key, parameter in whole.items():
        assert torch.equal(parameter, parts[key]), key


def test_transformers_trainer_without_names_is_told_what_to_pass(tmp_path):
    trainer = hugging_face_trainer(tiny_llama(), tmp_path, LoraRite, lr=1e-3)
    with pytest.raises(OptimizerError, match="'params': lora_param_groups"):
        trainer.create_optimizer()


def test_the_package_imports_torch_alone():
    code = (
        "import sys, rite_diffusion.optim as o; o.LoraRite\n"
        "print([m for m in ('peft', 'diffusers', 'transformers', 'accelerate', 'pydantic') "
        "if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class Net(nn.Module):
    """A line of two LoRA layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = nn.Linear(8, 3, bias=False)
        self.lora_B = nn.Linear(3, 6, bias=True)

    def forward(self, x):
        return self.lora_B(self.lora_A(x))


def train(model, optimizer, x, steps=10):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def worker(rank, port, folder):
    """One of two processes, each with half of the batch."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    x, results = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), {}
    for name in FAST:
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        groups = [group | {"lr": 0.01} for group in lora_param_groups(wrapped)]
        train(wrapped, OPTIMIZERS[name].build(groups), x[rank::2])
        results[name] = [p.detach().clone() for p in model.parameters()]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(unused_port, tmp_path):
    for process in [forked(worker, rank, unused_port, tmp_path) for rank in range(2)]:
        process.join(120)
        assert process.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    for name in FAST:
        model = Net()
        groups = [group | {"lr": 0.01} for group in lora_param_groups(model)]
        train(model, OPTIMIZERS[name].build(groups), torch.cat([x[0::2], x[1::2]]))
        both = zip(model.parameters(), *(result[name] for result in results), strict=True)
        for one, first, second in both:
            assert torch.equal(first, second)
            torch.testing.assert_close(one.detach(), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_loss_scaling_skips_an_overflow_and_goes_on(name):
    model = Net()
    optimizer = FAST[name](lora_param_groups(model), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x = torch.randn(8, 8)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((model(x) - 1).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (factor != 1.0)


def test_compiled_models_and_clipping_work():
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = LoraRite(lora_param_groups(compiled), lr=0.02)
    x = torch.randn(8, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (compiled(x) - 1).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
