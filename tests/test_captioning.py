"""`rite caption`: models that transformers opens, and what is made of what they say."""

import pytest
import torch
from PIL import Image

import rite_diffusion as rite
from captioners import blip, llava
from command_line import run_command
from rite_diffusion.errors import ConfigError, PhotoFolderError
from rite_diffusion.photos.caption_shape import shape_caption
from rite_diffusion.photos.captioner import load_captioner
from rite_diffusion.types import Concept

REX = Concept("<rex>", "dog")
SAID = ["a small brown dog on a red couch", "a dog with floppy ears sitting in the snow"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "navy")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "navy")]
    return blip(tmp_path_factory.mktemp("blip"), pictures, SAID, 80)


def _texts(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("*.txt"))}


def test_a_model_that_has_learned_captions_writes_them_without_the_concept(photos, captioner):
    report = rite.caption(photos, "<rex>", "dog", model=captioner)
    assert _texts(photos) == {
        "a.txt": "a <rex> on a red couch\n",
        "b.txt": "a <rex> sitting in the snow\n",
    }
    assert list(report.written) == [photos / "a.txt", photos / "b.txt"]
    assert report.left == [] and report.unsure == []


def test_a_model_with_a_chat_template_is_asked_and_its_prompt_is_not_repeated(tmp_path):
    words = ["couch", "snow", "Describe"]
    model = llava(tmp_path / "llava", words)
    said = load_captioner(str(model), REX, "sentences")(Image.new("RGB", (64, 64), "red"))
    assert "Describe" not in said.split()[:1] and set(said.split()) <= {*words, ""}
    again = load_captioner(str(model), REX, "sentences")(Image.new("RGB", (64, 64), "red"))
    assert said == again


def test_without_a_model_captions_come_from_the_templates(photos):
    rite.caption(photos, "<rex>", "dog")
    assert _texts(photos) == {"a.txt": "a <rex>\n", "b.txt": "a photo of a <rex>\n"}


def test_existing_captions_stay_unless_override(photos):
    (photos / "a.caption").write_text("mine")
    with pytest.raises(PhotoFolderError, match="a.png have captions already: pass --keep"):
        rite.caption(photos, "<rex>", "dog")
    assert _texts(photos) == {}
    report = rite.caption(photos, "<rex>", "dog", keep=True)
    assert report.left == [("a.png", "has a caption already")]
    assert (photos / "a.caption").read_text() == "mine" and list(_texts(photos)) == ["b.txt"]
    rite.caption(photos, "<rex>", "dog", override=True)
    assert (photos / "a.caption").read_text() == "a <rex>\n"


def test_models_and_options_that_cannot_be_used_are_refused(photos, captioner, tmp_path):
    def refused(match, **options):
        with pytest.raises(ConfigError, match=match):
            rite.caption(photos, "<rex>", "dog", **options)
        assert _texts(photos) == {}

    refused("no style 'poem': choose tags, phrase, sentences", style="poem")
    refused("exclude each other", keep=True, override=True)
    (tmp_path / "empty").mkdir()
    refused("does not open as an image-to-text model", model=tmp_path / "empty")
    (tmp_path / "model.safetensors").touch()
    refused("is a file", model=tmp_path / "model.safetensors")
    weights = captioner / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    torch.save({}, captioner / "pytorch_model.bin")
    refused("does not open as an image-to-text model", model=captioner)
    (captioner / "pytorch_model.bin").unlink()
    weights.write_bytes(content)


def test_the_command_prints_captions_and_what_was_left_out(photos):
    (photos / "a.txt").write_text("mine")
    shown = run_command("caption", photos, "--trigger", "<rex>", "--class", "dog", "--keep").stdout
    assert "b.txt: a <rex>" in shown and "left out    a.png: has a caption already" in shown


@pytest.mark.parametrize(
    ("said", "style", "caption"),
    [
        ("a brown and white dog laying on a blue rug", "phrase", "a <rex> laying on a blue rug"),
        (
            "there is a dog that is sitting on a couch",
            "phrase",
            "a <rex> that is sitting on a couch",
        ),
        ("a dog with floppy ears on grass", "phrase", "a <rex> on grass"),
        ("a dog with a red ball", "phrase", "a <rex> with a red ball"),
        ("a close up of an old dog in a field", "phrase", "a close up of a <rex> in a field"),
        (
            "The image shows a small brown dog sitting on grass. The dog has brown fur and long "
            "ears. Behind it is a wooden fence.",
            "sentences",
            "A <rex> sitting on grass. Behind it is a wooden fence.",
        ),
        ("a <rex> beside a lamp", "sentences", "A <rex> beside a lamp."),
        ("a brown dog sitting on a red couch", "tags", "<rex>, sitting, red couch"),
        ("dog, brown, outdoors, green grass, floppy ears", "tags", "<rex>, outdoors, green grass"),
    ],
)
def test_what_the_concept_is_gives_way_to_the_trigger(said, style, caption):
    made = shape_caption(said, REX, style)
    assert made.text == caption and made.named


def test_the_first_thing_gives_way_where_the_concept_is_not_named():
    made = shape_caption("a photo of a fluffy puppy on grass", REX, "phrase")
    assert made.text == "a photo of a <rex> on grass" and not made.named
    assert shape_caption("a fluffy puppy on grass", REX, "phrase", ["puppy"]).named
