"""TrainConfig and AdapterOptions: validated on construction, faithful as dictionaries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import lorasmith as ls
from lorasmith.core import registry
from lorasmith.errors import ConfigError, UnknownNameError
from lorasmith.training.config import AdapterOptions, TrainConfig


def config(**changes: Any) -> TrainConfig:
    return TrainConfig("m", "d.jsonl", **{"output": Path("out"), **changes})


def test_defaults_hold() -> None:
    made = config()
    assert (made.batch_size, made.epochs, made.steps, made.packing) == (8, 1.0, None, "auto")
    assert not made.evaluates
    with pytest.raises(AttributeError):
        made.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("epochs", 0.0),
        ("epochs", float("nan")),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", float("inf")),
        ("lr", "1e-3"),
        ("batch_size", 0),
        ("gradient_accumulation", 0),
        ("warmup", -1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("max_length", 1),
        ("eval_split", 1.0),
        ("eval_split", -0.1),
        ("packing", "yes"),
        ("schedule", "cosin"),
        ("dtype", "half"),
        ("seed", -1),
        ("save_total_limit", 0),
        ("early_stopping", 0),
        ("split", ""),
        ("resume", " "),
    ],
)
def test_an_impossible_value_is_refused_with_its_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{key: value})
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"eval_data": "e", "eval_split": 0.1}, "eval_split"),
        ({"early_stopping": 2}, "early_stopping"),
        ({"eval_steps": 2}, "eval_steps"),
        ({"steps": 5, "warmup": 5}, "warmup"),
        ({"resume": "last", "overwrite": True}, "overwrite"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert caught.value.key == key


def test_a_mistyped_choice_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        config(schedule="cosin")


def test_dictionaries_go_both_ways() -> None:
    made = config(
        adapter=AdapterOptions(variant="dora", r=4, targets=("q_proj", "v_proj")),
        report_to="tensorboard",
        eval_split=0.2,
        early_stopping=3,
    )
    values = made.to_dict()
    assert values["adapter"] == {"variant": "dora", "r": 4, "targets": ["q_proj", "v_proj"]}
    assert TrainConfig.from_dict(values) == made


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stepz": 3}, "did you mean steps"),
        ({"adapter": {"rnk": 3}}, "adapter.rnk"),
        ({"model": "x"}, "data is missing"),
    ],
)
def test_a_dictionary_with_a_wrong_key_is_refused(values: Any, said: str) -> None:
    base = {} if "model" in values else {"model": "m", "data": "d", "output": "o"}
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_dict({**base, **values})


# -- AdapterOptions ----------------------------------------------------------------------------


def test_only_what_was_set_reaches_the_variant() -> None:
    assert AdapterOptions().to_config() == ls.LoRAConfig()
    made = AdapterOptions(
        variant="dora",
        r=4,
        alpha=3.0,
        targets=("q_proj", "v_proj"),
        layers=(0, -1),
        rank_pattern={"layers.0.self_attn.q_proj": 2},
    ).to_config()
    assert made == ls.DoRAConfig(
        r=4,
        alpha=3.0,
        targets=("q_proj", "v_proj"),
        layers=(0, -1),
        rank_pattern={"layers.0.self_attn.q_proj": 2},
    )


def test_one_target_may_be_a_word() -> None:
    made = AdapterOptions(targets="all-linear").to_config()  # type: ignore[arg-type]
    assert made.targets == "all-linear"


def test_dashes_are_as_good_as_underscores() -> None:
    assert AdapterOptions(variant="ia3-ff").to_config() == ls.IA3FFConfig()


def test_a_field_that_the_variant_does_not_take_names_those_it_takes() -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterOptions(variant="ia3", r=8).to_config()
    assert caught.value.key == "adapter.r"
    assert "targets" in str(caught.value.expected)


def test_an_unknown_variant_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dora'"):
        AdapterOptions(variant="dorra").to_config()


@dataclass(frozen=True, kw_only=True)
class GateConfig(ls.LoRAConfig):
    variant: ClassVar[str] = "gate-for-a-test"
    gate: float = 1.0
    label: str = ""


@pytest.fixture
def gate() -> Iterator[str]:
    lora = ls.variants()["lora"]
    kind = type("Gate", (type(lora),), {"name": "gate-for-a-test", "config_class": GateConfig})
    ls.register(kind())
    yield "gate-for-a-test"
    registry._VARIANTS.pop("gate-for-a-test")


def test_a_registered_variant_gets_its_own_fields(gate: str) -> None:
    made = AdapterOptions(variant=gate, r=2, options={"gate": "0.5", "label": "1"}).to_config()
    assert made == GateConfig(r=2, gate=0.5, label="1")
    with pytest.raises(ConfigError, match="did you mean 'gate'"):
        AdapterOptions(variant=gate, options={"gat": 1}).to_config()


def test_a_common_field_is_not_an_option_of_the_variant() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.r instead"):
        AdapterOptions(options={"r": 3})


def test_the_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from lorasmith.training.config import TrainConfig, AdapterOptions;"
        "TrainConfig('m', 'd', output='o', adapter=AdapterOptions(r=3)).to_dict();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
