import json

import pytest

from afd_fast.config import TrainConfig, from_dict, to_dict, with_overrides
from afd_fast.errors import ConfigError
from afd_fast.training import runs as recipes


def test_overrides_are_typed():
    config = with_overrides(
        TrainConfig(),
        ["student_lr=1e-3", "iterations=7", "steps=1000,500", "lr_decay=false", "codec_crf=23", "recipe=afd"],
    )
    assert (config.student_lr, config.iterations, config.steps) == (1e-3, 7, (1000.0, 500.0))
    assert config.lr_decay is False and config.codec_crf == 23 and config.recipe == "afd"
    assert with_overrides(config, ["codec_crf=none"]).codec_crf is None


@pytest.mark.parametrize(
    "item, message",
    [
        ("studnet_lr=1", "did you mean 'student_lr'"),
        ("iterations=many", "iterations=many"),
        ("lr_decay=perhaps", "true or false"),
        ("iterations", "key=value"),
        ("v_old=new", "v_old must be"),
        ("rollouts_per_prompt=1", "at least 2"),
        ("iterations=0", "at least 1"),
    ],
)
def test_bad_overrides_say_what_to_do(item, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(TrainConfig(), [item])


def test_recipes_by_name_and_round_trip():
    for name in recipes.RECIPES:
        config = recipes.get(name)
        assert config.name == name and from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match="did you mean 'demo_lagged'"):
        recipes.get("demo_laged")
