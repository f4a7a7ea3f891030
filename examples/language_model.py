"""LoRA-RITE on a language model: any PEFT model and `transformers.Trainer` will do.

The model here is a small GPT-2 with random weights that learns to count, so that the example runs
anywhere in seconds; put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from rite_diffusion.optim import LoraRite, lora_param_groups


def counting(length: int = 16, words: int = 32) -> list[dict[str, torch.Tensor]]:
    """One sequence per start: 3, 4, 5, …, and around."""
    rows = [(start + torch.arange(length)) % words for start in range(words)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main(steps: int = 60) -> list[float]:
    """Train the adapter; returns the losses."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2)
    )
    config = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = (LoraRite, {"params": lora_param_groups(model), "lr": 1e-2})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_steps=10,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = Trainer(
            model, arguments, train_dataset=counting(), optimizer_cls_and_kwargs=optimizer
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print("loss", *[f"{loss:.2f}" for loss in main()])
