"""Prompts as users write them: weights, brackets, BREAK, any length; and what is refused."""

import re

import pytest
import torch
from torch.nn import functional as F

from random_adapters import random_adapter
from rite_diffusion.adapters import AdapterInfo
from rite_diffusion.adapters.adapter import Adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.backbones.chunks import chunks_of
from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer
from rite_diffusion.backbones.prompt_syntax import Passage, read_prompt
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.denoise import guided
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import Region
from shared_bases import shared_base
from wordy import tokens_adapter

LONG = ", ".join(
    f"a {noun} in the garden" for noun in "cat dog fox bear frog pig crab tree".split()
)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return shared_base(str(tiny_folder))


# --- how a prompt is read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),  # holds to the end, as in A1111
        ("[(unbalanced", [("unbalanced", 1.1 / 1.1)]),
        ("unbalanced), too]", [("unbalanced), too]", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"(a \(b\):1.5)", [("a (b)", 1.5)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
             (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ),
        ("a:b c:1.5) :)", [("a:b c:1.5) :)", 1)]),
        ("(a: 1.2 ) (b:-0.5)", [("a", 1.2), (" ", 1), ("b", -0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        (r"C:\dogs \\ x", [(r"C:\dogs \ x", 1)]),
        ("", []),
    ],
)  # fmt: skip
def test_weights_are_read_as_in_a1111(prompt, expected):
    [section] = read_prompt(prompt)
    assert [(each.text, pytest.approx(each.weight)) for each in section] == expected


def test_break_begins_a_section_inside_brackets_too():
    sections = read_prompt("a cat BREAK (a dog BREAK fox:1.2) BREAKFAST")
    assert [[each.text for each in section] for section in sections] == [
        ["a cat"], ["a dog"], ["fox", " BREAKFAST"],
    ]  # fmt: skip
    assert sections[2][0].weight == sections[1][0].weight == 1.2


@pytest.mark.parametrize(
    ("prompt", "remedy"),
    [
        ("a cat <lora:fox_v2:0.8>", "--adapter fox_v2.safetensors:0.8"),
        ("a cat <lora:fox>", "--adapter fox.safetensors:1"),
        ("a <lyco:x:1:te=0>", "--adapter x.safetensors:1"),
        ("a cat, embedding:style", "--adapter style.safetensors"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5] would change"),
        ("a [fox: 10 ]", "would change"),
        ("a [fox::3]", "would change"),
        ("a [cat|dog]", "would change"),
        ("(a [(cat:1.2)|dog]:1.1)", "would change"),
        ("a cat AND a dog", "AND"),
        ("(a:1.2.3)", "'1.2.3' is not a number"),
    ],
)
def test_syntax_that_is_not_supported_is_refused(prompt, remedy):
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        read_prompt(prompt)


def test_brackets_that_are_no_syntax_are_not_refused():
    for prompt in ("[a (cat:1.2)]", r"\[cat|dog\]", "a | b", "brAND AND1", "a [cat|dog", "a:b:0.5"):
        read_prompt(prompt)


def test_triggers_of_adapters_are_literal_text():
    words = ["<robot>", "[V]", "<lora:x>", "(sks)", "R AND B"]
    prompt = "a <robot> and ([V]:1.5) <lora:x> (sks) r AND b"
    assert read_prompt(prompt, words) == [
        [Passage("a <robot> and "), Passage("[V]", 1.5), Passage(" <lora:x> (sks) r AND b")]
    ]


# --- how it is cut into chunks -----------------------------------------------------------------


def literal_chunks(tokens: list[str], size: int, reach: int) -> list[list[str]]:
    """A1111's rule on tokens one by one; BREAK is one, <w> stands for a word of 4."""
    chunks, current = [], []
    for token in tokens:
        if token == "BREAK":
            chunks.append(current)
            current = []
            continue
        new = ["<w>"] * 4 if token == "<w>" else [token]
        if len(current) + len(new) > size:
            commas = [place for place, each in enumerate(current) if each == ","]
            keep = len(current)
            if token != "," and commas and len(current) - commas[-1] <= reach:
                keep = commas[-1] + 1
            chunks.append(current[:keep])
            current = current[keep:]
        current += new
    return [*chunks, current] if current or not chunks else chunks


@pytest.mark.parametrize("size", [10, 30, 75])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_follow_the_rule_token_by_token(size, seed):
    tokenizer = clip_tokenizer()
    draws = torch.Generator().manual_seed(seed)
    kinds = ["cat", "dog", "red", "tree", "house", ",", "<w>", "BREAK"]
    odds = torch.tensor([10.0, 10, 10, 10, 10, 4, 2, 0.3])
    picks = torch.multinomial(odds, 250, replacement=True, generator=draws).tolist()
    words = [kinds[pick] for pick in picks]
    expected = literal_chunks(words, size, round(size * 20 / 75))
    vectors = {"<w>": [torch.zeros(1, 4, 8)]}
    found = chunks_of(tokenizer, read_prompt(" ".join(words)), vectors, size, [])
    ids = {word: tokenizer(word).input_ids[1] for word in kinds if word[0] not in "<B"}
    ids["<w>"] = tokenizer("*").input_ids[1]
    assert [each.ids for each in found] == [[ids[word] for word in chunk] for chunk in expected]
    assert [[(s.position, s.number) for s in each.slots] for each in found] == [
        [(1 + place, sum(1 for w in chunk[:place] if w == "<w>") % 4)
         for place, word in enumerate(chunk) if word == "<w>"]
        for chunk in expected
    ]  # fmt: skip


@pytest.mark.parametrize("before", range(25, 32))
def test_a_trigger_of_ordinary_tokens_stays_whole(pocket, before):
    text = "red " * before + "<zorblax>. a cat"
    pieces = pocket.tokenizer("<zorblax>.", add_special_tokens=False).input_ids
    split = chunks_of(pocket.tokenizer, read_prompt(text), {}, 30, [])
    whole = chunks_of(pocket.tokenizer, read_prompt(text), {}, 30, ["<zorblax>"])
    joined = [token for chunk in whole for token in chunk.ids]
    assert joined == [token for chunk in split for token in chunk.ids]
    last = pieces[-1]  # ">." may be one token, which belongs to the trigger then
    name = pieces[:-1] if last == pocket.tokenizer(".").input_ids[1] else pieces
    runs = [chunk.ids[i : i + len(name)] for chunk in whole for i in range(len(chunk.ids))]
    assert len(name) > 2 and name in runs


def test_an_embedding_longer_than_a_chunk_is_split(pocket):
    vectors = {"<w>": [torch.zeros(1, 40, 192)]}
    first, second = chunks_of(pocket.tokenizer, read_prompt("<w>"), vectors, 30, ["<w>"])
    assert [slot.number for slot in (*first.slots, *second.slots)] == list(range(40))


# --- what the text encoder says of it ----------------------------------------------------------


def encoded(encoder, tokenizer, ids, skip=False):
    """States (tokens, width) of one chunk's tokens between marks, and the model's output."""
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row))
    found = encoder(torch.tensor([row]), output_hidden_states=True)
    return (found.hidden_states[-2] if skip else found.last_hidden_state)[0], found


def encoders(backbone):
    pairs = [(backbone.text_encoder, backbone.tokenizer)]
    if len(backbone.token_tables) > 1:
        pairs.append((backbone.text_encoder_2, backbone.tokenizer_2))
    return pairs


@torch.no_grad()
def test_a_plain_prompt_equals_the_text_encoders_output(backbone):
    prompts = ["a red cat", "a dog, on a <thing>.", "a red cat"]
    found = backbone.encode_prompts(prompts)
    expected = []
    for encoder, tokenizer in encoders(backbone):
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                        max_length=tokenizer.model_max_length).input_ids  # fmt: skip
        made = encoder(ids, output_hidden_states=True)
        two = len(encoders(backbone)) > 1
        expected.append(made.hidden_states[-2] if two else made.last_hidden_state)
    assert torch.equal(found.states, torch.cat(expected, -1))
    if found.extra:
        assert torch.equal(found.extra["pooled"], made.text_embeds)
    assert torch.equal(found.states, backbone.encode_captions(prompts).states)


@torch.no_grad()
def test_long_prompts_are_their_chunks_one_after_the_other(backbone):
    size, two = backbone.token_budget, len(encoders(backbone)) > 1
    prompt = f"{LONG}, {LONG} BREAK a red house"
    expected, pooled = [], None
    for encoder, tokenizer in encoders(backbone):
        chunks = chunks_of(tokenizer, read_prompt(prompt), {}, size, [])
        assert len(chunks) >= 3 and len(chunks[-1].ids) == 3
        parts = [encoded(encoder, tokenizer, chunk.ids, two) for chunk in chunks]
        expected.append(torch.cat([states for states, _ in parts]))
        pooled = parts[0][1]
    found = backbone.encode_prompts([prompt, "a cat", ""])
    torch.testing.assert_close(found.states[0], torch.cat(expected, -1), rtol=1e-4, atol=1e-4)
    short, empty = (
        torch.cat([encoded(*pair, pair[1](text, add_special_tokens=False).input_ids, two)[0]
                   for pair in encoders(backbone)], -1)
        for text in ("a cat", "")
    )  # fmt: skip
    padded = torch.cat([short, *[empty] * (len(chunks) - 1)])
    torch.testing.assert_close(found.states[1], padded, rtol=1e-4, atol=1e-4)
    if two:
        torch.testing.assert_close(found.extra["pooled"][0], pooled.text_embeds[0])
        assert found.states[2].eq(0).all() and found.extra["pooled"][2].eq(0).all()
    cut = backbone.encode_captions([prompt]).states
    assert cut.shape[1] == size + 2


@torch.no_grad()
def test_the_length_of_states_is_known_without_encoding(backbone):
    for prompts in (
        ["a cat"],
        ["", "a cat BREAK a dog"],
        ["(a fluffy cat, " * 2 * backbone.token_budget, "a [dog]"],
    ):
        states = backbone.encode_prompts(prompts).states
        assert backbone.encoded_length(prompts) == states.shape[-2]


def test_weights_multiply_states_and_keep_each_chunks_mean(backbone):
    """Literally what A1111 documents as the original emphasis."""
    two = len(encoders(backbone)) > 1
    found = backbone.encode_prompts(["a (red:1.5) [cat] BREAK (dog)", "a house"])
    chunks = [(["a", "red", "cat"], [1, 1.5, 1 / 1.1]), (["dog"], [1.1])]
    expected = []
    for words, weights in chunks:
        sides = []
        for encoder, tokenizer in encoders(backbone):
            ids = [token for word in words for token in tokenizer(word).input_ids[1:-1]]
            assert len(ids) == len(weights)
            z, _ = encoded(encoder, tokenizer, ids, two)
            row = torch.ones(len(z), 1)
            row[1 : 1 + len(weights), 0] = torch.tensor(weights)
            sides.append(z * row * (z.mean() / (z * row).mean()))
        expected.append(torch.cat(sides, -1))
    torch.testing.assert_close(found.states[0], torch.cat(expected), rtol=1e-4, atol=1e-4)
    plain = backbone.encode_prompts(["a house", "a house BREAK"]).states[0]
    torch.testing.assert_close(found.states[1, : len(plain)], plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_escaped_brackets_are_text(tiny):
    found = tiny.encode_prompts([r"a \(red\) cat"]).states
    assert torch.equal(found, tiny.encode_captions(["a (red) cat"]).states)
    assert not torch.equal(found, tiny.encode_prompts(["a (red) cat"]).states)


@torch.no_grad()
def test_layer_wise_embeddings_work_in_long_and_weighted_prompts(pocket):
    layers = len(pocket.cross_attentions)
    attach(pocket, tokens_adapter({"<w>": [torch.randn(layers, 2, 192)]}), "a")
    long = pocket.encode_prompts([f"{LONG} BREAK a <w> cat", ""]).states
    alone = pocket.encode_prompts(["a <w> cat", ""]).states
    assert long.shape[:2] == (2, layers) and long.shape[2] % 32 == 0
    torch.testing.assert_close(long[0, :, -32:], alone[0], rtol=1e-4, atol=1e-5)
    weighted = pocket.encode_prompts(["a (<w>:1.4) cat", ""]).states[0]
    row = torch.ones(32, 1)
    row[2:4] = 1.4
    scaled = alone[0] * row
    ratio = alone[0].mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True)
    torch.testing.assert_close(weighted, scaled * ratio, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_plain_adapters_trigger_may_hold_brackets(tiny):
    adapter = random_adapter(tiny)
    info = AdapterInfo(trigger="[V]")
    attach(tiny, Adapter(adapter.pairs, info), "a", 0.0)
    literal = tiny.encode_prompts(["a [V] dog"]).states
    assert torch.equal(literal, tiny.encode_captions(["a [V] dog"]).states)
    detach(tiny, "a")
    assert not torch.equal(tiny.encode_prompts(["a [V] dog"]).states, literal)


@pytest.mark.parametrize("length", [20, 77])
def test_the_token_limit_is_the_smaller_of_encoder_and_tokenizer(pocket, length, monkeypatch):
    """A tokenizer without a limit of its own does not decide; a shorter one does."""
    limit = length if length < 32 else int(1e30)
    monkeypatch.setattr(pocket.tokenizer, "model_max_length", limit)
    assert pocket.token_budget == min(length, 32) - 2
    assert pocket.encode_prompts(["a cat"]).states.shape[1] == min(length, 32)


# --- in drawing --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_long_prompt_in_a_region_is_drawn_as_one_without(tiny):
    """One region over all of the picture, long where the whole's prompt is short."""
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor([500])
    prompt = f"{LONG} BREAK (a red house:1.3)"
    region = Region(0, 0, 1, 1, prompt, negative="dark")
    adapters: list[Attached] = []
    found = regionally_guided(
        tiny, "a park", [region], negative="", guidance=2.0, width=64, height=64, adapters=adapters
    )(latents, time)
    expected = guided(tiny, [prompt], "dark", 2.0)(latents, time)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, guided(tiny, [LONG], "dark", 2.0)(latents, time))


@torch.no_grad()
def test_cross_attention_covers_the_second_chunk(tiny):
    """Attention over all tokens of both chunks, against torch's on the joined states."""
    states = tiny.encode_prompts([f"{LONG} BREAK a fox"]).states
    module = tiny.cross_attentions[0]
    hidden = torch.randn(1, 16, module.to_q.in_features)
    each = [module.to_q(hidden), module.to_k(states), module.to_v(states)]
    heads = [values.unflatten(-1, (module.heads, -1)).transpose(1, 2) for values in each]
    literal = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    found = module(hidden, encoder_hidden_states=states)
    torch.testing.assert_close(found, module.to_out[0](literal), rtol=1e-4, atol=1e-5)
    assert states.shape[1] > 77
