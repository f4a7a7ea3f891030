import tomllib
from typing import get_type_hints

import pytest
from pydantic import BaseModel

import rite_diffusion as rite
from rite_diffusion import config
from rite_diffusion.config import (
    TrainConfig,
    from_toml,
    load_preset,
    parse_assignments,
    resolve,
    to_toml,
)
from rite_diffusion.config.typed import TrainSettings
from rite_diffusion.errors import ConfigError
from rite_diffusion.fusion.settings import FusionOptions, FusionSettings
from rite_diffusion.training.settings import configure

NEEDED = {"photos": "p", "trigger": "<t>", "class_noun": "dog"}


def test_toml_round_trip_is_exact():
    chosen = resolve(
        NEEDED | {"optim": {"lr": 1e-4, "name": "sgd"}, "augment": {"flip": True}, "seed": 7}
    )
    assert from_toml(to_toml(chosen)) == chosen


def test_every_preset_resolves():
    assert "pocket" in config.preset_names()
    for name in config.preset_names():
        assert resolve(NEEDED | load_preset(name)).steps > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim": {"lrr": 1.0}}, ["optim.lrr", "did you mean 'optim.lr'"]),
        ({"stpes": 3}, ["stpes", "did you mean 'steps'"]),
        ({"steps": 0}, ["steps", "greater than or equal to 1"]),
        ({"lora": {"rank": -1}}, ["lora.rank"]),
        ({"optim": {"lr": float("inf")}}, ["optim.lr"]),
        ({"optim": {"lr": "fast"}}, ["optim.lr", "'fast'"]),
    ],
)
def test_bad_settings_name_the_key_and_what_to_do(settings, words):
    with pytest.raises(ConfigError) as caught:
        resolve(NEEDED | settings)
    assert all(word in str(caught.value) for word in words)


def test_assignments_read_toml_values_and_bare_words():
    tree = parse_assignments(["optim.lr=1e-4", "optim.name=sgd", "augment.flip=true", "base=a/b"])
    assert tree == {"optim": {"lr": 1e-4, "name": "sgd"}, "augment": {"flip": True}, "base": "a/b"}
    assert parse_assignments(["precision = fp32", "steps = 9"]) == {"precision": "fp32", "steps": 9}
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignments(["optim.lr"])


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="pocket, .*sd15, .*sdxl"):
        load_preset("nope")


def test_broken_preset_file_is_named(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("steps = = 3")
    with pytest.raises(ConfigError, match="x.toml"):
        load_preset(str(path))


def test_rates_follow_the_optimizer_unless_given():
    adamw = configure(NEEDED | {"base": "some/model"}).optim
    assert (adamw.name, adamw.lr, adamw.lr_text_encoder) == ("adamw", 1e-4, 1e-5)
    sgd = configure(NEEDED | {"base": "some/model", "optim": {"name": "sgd"}}).optim
    assert sgd.lr > 1e-2 and sgd.lr_text_encoder == sgd.lr / 2
    given = configure(NEEDED | {"base": "some/model", "optim": {"lr": 3e-4}}).optim
    assert (given.lr, given.lr_text_encoder) == (3e-4, 1.5e-4)
    both = configure(NEEDED | {"optim": {"lr": 3e-4, "lr_text_encoder": 1e-6}}).optim
    assert both.lr_text_encoder == 1e-6


def test_unknown_optimizer_names_the_known_ones():
    with pytest.raises(ConfigError, match="adamw, adamw_plus, adamw_schedule_free, lora_muon"):
        configure(NEEDED | {"optim": {"name": "adam"}})


def test_presets_have_no_unused_keys():
    for name in config.preset_names():
        text = (config.preset_folder() / f"{name}.toml").read_text()
        known = set(config.known_keys())
        tree = tomllib.loads(text)
        leaves = [
            f"{key}.{leaf}" if isinstance(value, dict) else key
            for key, value in tree.items()
            for leaf in (value if isinstance(value, dict) else [""])
        ]
        assert set(leaves) <= known


def test_keyword_arguments_of_training_are_the_settings():
    names = TrainConfig.model_fields.keys() - {"photos"}
    assert get_type_hints(TrainSettings).keys() == names
    assert get_type_hints(FusionOptions).keys() == FusionSettings.model_fields.keys()


def test_several_concepts_train_from_python(photos, tmp_path):
    table = {"photos": str(photos), "class_noun": "toy"}
    adapter = rite.train(
        dataset=[table | {"trigger": "<one>"}, table | {"trigger": "<two>", "class_noun": "cup"}],
        out=tmp_path / "run", steps=1, batch=2, resolution=32, previews={"every": 0},
        prior={"weight": 0},
    )  # fmt: skip
    assert rite.inspect(adapter).info.trigger == "<one>, <two>"


def undescribed(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Settings that say nothing of themselves."""
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += undescribed(kind, f"{prefix}{name}.")
        elif not field.description:
            found.append(prefix + name)
    return found


@pytest.mark.parametrize("model", [TrainConfig, FusionSettings])
def test_every_setting_is_described(model):
    assert undescribed(model) == []
