import pytest
import torch
from safetensors.torch import save_file

import rite_diffusion as rite
from predictions import prediction
from random_adapters import random_adapter
from reference.learned_words import layerwise_states, literal_cross_attentions
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.adapters.choice import choose_adapters, notes
from rite_diffusion.backbones.clip_tokenizer import clip_tokenizer
from rite_diffusion.backbones.learned_embeddings import ids_of, tokens_of
from rite_diffusion.backbones.protocols import LearnedEmbedding
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import AdapterError
from wordy import PROMPT, random_words, tokens_adapter


@pytest.mark.parametrize(
    "prompt",
    ["a red cat", "  it's (a)  Cat's, 3-legged <thing>! ", "", "naïve – \U0001f600", "a" * 300],
)
@pytest.mark.parametrize("name", ["pocket", "clip"])
def test_prompts_without_embeddings_are_tokenized_by_the_tokenizer(pocket, name, prompt):
    tokenizer = pocket.tokenizer if name == "pocket" else clip_tokenizer()
    ids, slots = tokens_of(tokenizer, prompt, {})
    assert ids == tokenizer(prompt).input_ids[1:-1] and not slots


def test_text_around_an_embedding_is_tokenized_as_without_it(pocket):
    vectors = {"<x>": [torch.zeros(1, 2, 192)]}
    ids, slots = tokens_of(pocket.tokenizer, "a big <X>, on a\tred background <x>", vectors)
    [star] = ids_of(pocket.tokenizer, "*")
    expected = [ids_of(pocket.tokenizer, part) for part in ("a big", ", on a red background")]
    assert ids == [*expected[0], star, star, *expected[1], star, star]
    first = 1 + len(expected[0])
    assert [slot.position for slot in slots[:2]] == [first, first + 1]
    assert [slot.number for slot in slots] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a <a1> and <a12>", ["<a1>", "<a12>"]),
        ("sks sksx xsks", ["sks"]),
        ("SKS <A1>s", ["sks", "<a1>"]),
    ],
)
def test_embeddings_are_found_as_whole_words(pocket, prompt, said):
    vectors = {word: [torch.zeros(1, 1, 192)] for word in ("<a1>", "<a12>", "sks")}
    slots = tokens_of(pocket.tokenizer, prompt, vectors)[1]
    assert [slot.word for slot in slots] == said


@torch.no_grad()
def test_layerwise_states_equal_a_literal_expansion_of_the_prompt(backbone):
    layers = len(backbone.cross_attentions)
    words = random_words(backbone, layers)
    attach(backbone, tokens_adapter(words), "a")
    prompts = ["a red cat", PROMPT, "", PROMPT]
    found = backbone.encode_prompts(prompts).states
    two = len(backbone.token_tables) > 1
    encoders = [(backbone.text_encoder, backbone.tokenizer)]
    if two:
        encoders.append((backbone.text_encoder_2, backbone.tokenizer_2))
    expected = [
        layerwise_states(*pair, PROMPT, {w: r[i] for w, r in words.items()}, layers, skip=two)
        for i, pair in enumerate(encoders)
    ]
    torch.testing.assert_close(found[1], torch.cat(expected, -1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], found[3]) and found.shape[:2] == (4, layers)
    plain = load_backbone(backbone.name, "fp32").encode_prompts(["a red cat"]).states
    for layer in range(layers):
        torch.testing.assert_close(found[0, layer], plain[0], rtol=1e-4, atol=1e-5)
    assert (found[1, 0] - found[1, 1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cells", [(16, 16), (8, 24)])
def test_each_cross_attention_takes_its_own_states(backbone, cells, monkeypatch):
    layers = len(backbone.cross_attentions)
    attach(backbone, tokens_adapter(random_words(backbone, layers)), "a")
    conditioning = backbone.encode_prompts([PROMPT, "a cat"])
    literal, count = literal_cross_attentions(backbone.unet)
    assert count == layers
    noisy = torch.randn(2, backbone.latent_channels, *cells)
    timesteps = torch.tensor([500, 20])
    found = backbone.denoise(noisy, timesteps, conditioning)
    monkeypatch.setattr(type(backbone), "denoiser", property(lambda _: literal))
    expected = backbone.denoise(noisy, timesteps, conditioning)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_only_embedding_vectors_get_gradients(backbone):
    layers = len(backbone.cross_attentions)
    rows = [
        torch.randn(layers, 2, table.shape[1], requires_grad=True)
        for table in backbone.token_tables
    ]
    backbone.embeddings["<w>"] = LearnedEmbedding("test", lambda: rows)
    noisy = torch.randn(1, backbone.latent_channels, 16, 16)
    states = backbone.encode_prompts(["a <w> on a red background"])
    backbone.denoise(noisy, torch.tensor([500]), states).square().mean().backward()
    for each in rows:
        assert (each.grad.abs().sum(-1) > 0).all()
    for table in backbone.token_tables:
        assert table.grad is None and not table.requires_grad
    used = {id(each) for each in rows}
    parameters = [p for part in backbone.components.values() for p in part.parameters()]
    assert all(p.grad is None for p in parameters if id(p) not in used)


@torch.no_grad()
def test_detaching_embeddings_restores_every_bit(backbone):
    layers = len(backbone.cross_attentions)
    before = {name: part.state_dict() for name, part in backbone.components.items()}
    tables = [table.clone() for table in backbone.token_tables]
    plain = prediction(backbone)
    text = backbone.encode_prompts([PROMPT]).states
    attach(backbone, tokens_adapter(random_words(backbone, layers)), "first")
    assert torch.equal(prediction(backbone), plain)  # prompts without the words stay as they were
    assert backbone.encode_prompts([PROMPT]).states.shape != text.shape
    detach(backbone, "first")
    assert torch.equal(backbone.encode_prompts([PROMPT]).states, text) and not backbone.embeddings
    for table, copy in zip(backbone.token_tables, tables, strict=True):
        assert torch.equal(table, copy)
    for name, part in backbone.components.items():
        state = part.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())


@torch.no_grad()
def test_embeddings_of_several_adapters_are_attached(pocket):
    words = random_words(pocket, 7)
    one, two = (Adapter(random_adapter(pocket, seed=i).pairs, AdapterInfo(), {word: rows[0]})
                for i, (word, rows) in enumerate(words.items()))  # fmt: skip
    attach(pocket, one, "one")
    attach(pocket, two, "two", 0.5)
    both = pocket.encode_prompts([PROMPT]).states
    detach(pocket, "two")
    attach(pocket, two, "two", 0.5)
    assert torch.equal(pocket.encode_prompts([PROMPT]).states, both)
    detach(pocket, "one")
    assert list(pocket.embeddings) == ["<two>"]
    assert pocket.encode_prompts([PROMPT]).states.ndim == 3


def test_an_embedding_name_of_two_adapters_is_renamed(tmp_path, pocket, capsys):
    rows = torch.randn(2, 7, 1, 192)
    for name, tokens in (("a", {"<dog>": rows[0]}), ("b", {"<Dog>": rows[1], "<dog-2>": rows[0]})):
        info = AdapterInfo(trigger=" ".join(tokens))
        save_adapter(tmp_path / f"{name}.safetensors", Adapter([], info, tokens))
    chosen = choose_adapters([tmp_path / "a.safetensors", tmp_path / "b.safetensors:0.5"])
    assert notes(chosen) == [
        "b.safetensors: its <Dog> is called <Dog-3> here, as another adapter has that word"
    ]
    assert chosen[1].adapter.info.trigger == "<Dog-3> <dog-2>" and chosen[1].weight == 0.5
    assert torch.equal(chosen[1].adapter.tokens["<Dog-3>"], rows[1])
    files = [str(each.path) for each in chosen]
    [image] = rite.generate("a <dog> beside a <dog-3>", adapters=files, steps=1)
    assert image.size == (64, 64) and "is called <Dog-3>" in capsys.readouterr().err
    attach(pocket, chosen[0].adapter, "a")
    with pytest.raises(AdapterError, match="'a' already has the word '<DOG>'"):
        attach(pocket, Adapter([], AdapterInfo(), {"<DOG>": rows[1]}), "b")


@pytest.mark.parametrize(
    "tokens, words",
    [
        ({"<w>": torch.zeros(1, 1, 768)}, "vectors of 768 numbers, .* take 192"),
        ({"<w>": torch.zeros(16, 1, 192)}, "for 16 cross-attentions, pocket has 7"),
        ({"<w>": torch.zeros(1, 1, 192), "<w>@2": torch.zeros(1, 1, 192)}, "192 and 192 numbers"),
    ],
    ids=["width", "layers", "encoders"],
)
def test_embeddings_of_another_base_are_refused(pocket, tokens, words):
    with pytest.raises(AdapterError, match=words):
        attach(pocket, Adapter([], AdapterInfo(), tokens), "a")
    assert not pocket.embeddings


@torch.no_grad()
def test_an_embedding_of_another_tool_works_in_a_prompt(tmp_path, pocket):
    rows = torch.randn(3, 192)
    save_file({"emb_params": rows}, tmp_path / "style.safetensors")
    attach(pocket, load_adapter(tmp_path / "style.safetensors"), "a")
    found = pocket.encode_prompts(["a style cat"]).states[0]
    words = {"style": rows[None]}
    literal = layerwise_states(pocket.text_encoder, pocket.tokenizer, "a style cat", words, 1)
    torch.testing.assert_close(found, literal[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_caption_too_long_is_cut_before_an_embedding(pocket):
    attach(pocket, tokens_adapter({"<w>": [torch.randn(7, 4, 192)]}), "a")
    long = "a red cat " * 10
    cut = pocket.encode_captions([f"{long}<w>"]).states
    assert torch.equal(cut[0, 0], cut[0, 6])
    torch.testing.assert_close(cut[0, 0], pocket.encode_captions([long]).states[0])
    assert pocket.token_positions(f"{long}<w>", "<w>") == []
    assert pocket.token_positions("a <w> on red", "<w>") == [2, 3, 4, 5]
    assert pocket.token_positions("a cat on a red background", "red background") == [5, 6]
    assert pocket.token_count("a <w> cat") == 6


def test_an_embedding_name_is_not_a_regular_expression(pocket):
    vectors = {"<a.b*>": [torch.zeros(1, 1, 192)]}
    slots = tokens_of(pocket.tokenizer, "an <axb> and an <a.b*>", vectors)[1]
    assert [slot.word for slot in slots] == ["<a.b*>"]


@pytest.mark.parametrize("layers", [1, 7])
def test_convert_reports_the_loss_of_averaged_embeddings(pocket, tmp_path, layers):
    draws = torch.Generator().manual_seed(0)
    tokens = {"<w>": torch.randn(layers, 1, 192, generator=draws)}
    adapter = random_adapter(pocket)
    info = AdapterInfo(trigger="<w>", base="pocket")
    save_adapter(tmp_path / "a.safetensors", Adapter(adapter.pairs, info, tokens))
    export = rite.convert(tmp_path / "a.safetensors", "kohya", allow_loss=True)
    assert len(export.lossy) == (layers > 1)
    assert export.pixels is not None and (export.pixels > 8) == (layers > 1)
