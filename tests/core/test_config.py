"""Configurations validate themselves, field by field, and survive a round trip."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorasmith as ls
from lorasmith.core.patterns import first_matching_key
from lorasmith.errors import ConfigError, UnknownNameError

LOW_RANK = [ls.LoRAConfig, ls.DoRAConfig]
ALL = [*LOW_RANK, ls.IA3Config, ls.IA3FFConfig]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("targets", [None, [], "", 5, [1], ["q", ""]]),
        ("exclude", [3, [""], [None]]),
        ("layers", [5, [], [0.5], "12", [True]]),
        ("modules_to_save", [3, [""]]),
    ],
)
def test_common_fields(make: Any, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            make(**{field: value})
        assert caught.value.key == field


@pytest.mark.parametrize("make", LOW_RANK)
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [0, -1, 2.0, "8", True, None]),
        ("alpha", [float("nan"), float("inf"), "16", None, True]),
        ("dropout", [-0.1, 1.0, 2, float("nan"), "0.1", None]),
        ("scaling", ["rs", "", None, 3]),
        ("init", [5, None]),
        ("rank_pattern", [None, [("q", 2)], {1: 2}, {"": 2}, {"q": 0}, {"q": 1.5}, {"(": 2}]),
        ("alpha_pattern", [None, {1: 2.0}, {"q": float("nan")}, {"q": "2"}, {"[": 2.0}]),
    ],
)
def test_low_rank_fields(make: Any, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            make(**{field: value})
        assert str(caught.value.key).startswith(field)


def test_the_error_says_what_to_write() -> None:
    with pytest.raises(ConfigError) as caught:
        ls.LoRAConfig(dropout=1.5)
    assert caught.value.expected == "0 <= dropout < 1"
    assert caught.value.got == "1.5"


@pytest.mark.parametrize("make", ALL)
def test_round_trip(make: Any) -> None:
    config = make(targets=["q_proj", "v_proj"], exclude="lm_head", layers=[0, -1])
    values = json.loads(json.dumps(config.to_dict()))
    assert ls.config_from_dict(values) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config  # noqa: S301
    assert hash(ls.config_from_dict(values)) == hash(config)
    assert make(targets=("q_proj",)) == make(targets="q_proj")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.targets = "x"
    with pytest.raises(ConfigError, match="rankk"):
        ls.config_from_dict({**values, "rankk": 3})
    with pytest.raises(UnknownNameError):
        ls.config_from_dict({**values, "variant": "lorra"})


def test_a_pattern_dictionary_of_the_caller_is_copied() -> None:
    pattern = {"q_proj": 2}
    config = ls.LoRAConfig(rank_pattern=pattern)
    pattern["q_proj"] = 99
    assert config.rank_of("layers.0.q_proj") == 2


def test_ranks_alphas_and_scalings() -> None:
    config = ls.LoRAConfig(
        r=16, alpha=8, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 2.0}
    )
    assert config.scaling_of("layers.0.k_proj") == 8 / 16
    assert config.scaling_of("layers.0.q_proj") == 8 / 4
    assert config.scaling_of("layers.1.q_proj") == 2 / 4
    assert dataclasses.replace(config, scaling="rslora").scaling_of("layers.0.q_proj") == 4.0


_names = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "10", "q_proj", "proj", "q", "mlp", "a.b"]),
    min_size=1,
    max_size=5,
).map(".".join)
_keys = st.one_of(
    _names,
    st.sampled_from(
        [
            r"q.*",
            r"layers\.\d+\.mlp",
            "^model",
            "^q_proj$",
            "q|proj",
            r".*\.0",
            "proj$",
            "[qk]_proj",
        ]
    ),
)


@given(st.lists(_keys, max_size=4, unique=True), _names)
def test_patterns_mean_what_they_mean_to_peft(keys: list[str], name: str) -> None:
    utils = pytest.importorskip("peft.utils.other")
    theirs = utils.get_pattern_key(keys, name)
    ours = first_matching_key(keys, name)
    # PEFT answers with the name itself where nothing matches.
    assert (ours if ours is not None else name) == theirs
