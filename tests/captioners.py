"""Small captioning models with transformers' own classes, and words that they know."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of the texts."""
    words = dict.fromkeys([*SPECIAL, *(word for text in texts for word in text.split())])
    whole = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", bos_token="[CLS]", eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def blip(folder: Path, pictures: list[Image.Image], captions: list[str], steps: int) -> Path:
    """A BLIP that has learned the captions of the pictures, saved in a folder."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(captions)
    text = {
        "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 40,
        "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16}
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=32)
    )
    size = {"height": 32, "width": 32}
    processor = BlipProcessor(BlipImageProcessor(size=size), tokenizer)
    lines = [f"[CLS] {each} [SEP]" for each in captions]
    inputs = processor(images=pictures, text=lines, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(folder: Path, words: list[str]) -> Path:
    """A random LLaVA with a chat template, saved in a folder."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(words)
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=16)
    text = LlamaConfig(
        **SMALL, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, pad_token_id=0
    )
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_seq_length=4)
    ).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
        "{% endfor %}{% endfor %}",
    ).save_pretrained(folder)
    return folder
