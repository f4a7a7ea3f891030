"""An adapter's model card for a hub, made from its metadata."""

import json
from shlex import quote

from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.files.writing import printable

_UNSTATED = "not stated"


def card(adapter: Adapter, file_name: str) -> str:
    """The text of a README.md with a hub's YAML front matter; `file_name` is the adapter's."""
    info = adapter.info
    trigger, noun = _plain(info.trigger), _plain(info.class_noun)
    prompt = f"a {trigger}" if trigger else "a prompt"
    name = printable(file_name)
    title = trigger or name.removesuffix(".safetensors")
    return "\n".join(
        [
            *_front_matter(adapter),
            f"# {title}",
            "",
            f"A LoRA adapter{f' that teaches a {noun}' if noun else ''}.",
            *([f"Write `{trigger}` where it should appear."] if trigger else []),
            "",
            *_table(adapter),
            "",
            "```sh",
            f"rite generate {quote(prompt)} --adapter {quote(name)}{_base_option(info.base)}",
            "```",
            "",
            *_diffusers(name, info.base),
        ]
    )


def _front_matter(adapter: Adapter) -> list[str]:
    """The YAML block that hubs read; values are quoted as JSON, which is valid YAML."""
    info = adapter.info
    facts = {"base_model": info.base if "/" in info.base else "", "instance_prompt": info.trigger}
    stated = [f"{key}: {json.dumps(value)}" for key, value in facts.items() if value]
    licence = info.licence if info.licence not in ("", "unspecified") else "other"
    tags = [f"- {tag}" for tag in ("text-to-image", "lora", "rite-diffusion")]
    return ["---", f"license: {json.dumps(licence)}", *stated, "tags:", *tags, "---", ""]


def _table(adapter: Adapter) -> list[str]:
    info = adapter.info
    facts = {
        "trained on": info.base,
        "method": info.method,
        "rank": ", ".join(str(rank) for rank in adapter.ranks()),
        "optimizer": info.optimizer,
        "steps": info.steps,
        "pictures": info.images,
        "licence": info.licence,
        "made with": f"rite_diffusion {info.version}" if info.version else "",
    }
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items()]
    return ["| | |", "|---|---|", *rows]


def _plain(value: str) -> str:
    """A header's text on one line, without backticks and control codes."""
    return printable(" ".join(value.replace("`", "").split()))


def _cell(value: str) -> str:
    plain = _plain(value)
    return f"`{plain}`".replace("|", "\\|") if plain else _UNSTATED


def _base_option(base: str) -> str:
    return "" if base in ("", "pocket") else f" --base {quote(printable(base))}"


def _diffusers(file_name: str, base: str) -> list[str]:
    """Python code that loads it with diffusers, where the base is a hub id."""
    if "/" not in base:
        return []
    return [
        "```python",
        "from diffusers import AutoPipelineForText2Image",
        "",
        f"pipeline = AutoPipelineForText2Image.from_pretrained({json.dumps(base)})",
        f'pipeline.load_lora_weights(".", weight_name={json.dumps(file_name)})',
        "```",
        "",
    ]
