"""PEFT 0.21.2 as the referee: the same logits whoever writes and whoever reads."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorasmith as ls
from lorasmith.errors import AdapterFileError
from lorasmith.io import peft as conventions
from tests.io import support

hf_peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21.2 asks Transformers 5 for an attribute that has another name now.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    # One configuration for all architectures.
    "ignore:(rank|alpha)_pattern names .* does nothing:UserWarning",
)

OURS = {
    "lora": ls.LoRAConfig(r=4, alpha=6),
    "rslora": ls.LoRAConfig(r=4, alpha=3, scaling="rslora", targets="attention"),
    "patterns": ls.LoRAConfig(
        r=4,
        rank_pattern={"q_proj": 2, r".*\.0\..*(c_attn|q_lin)": 6, "nowhere": 3},
        alpha_pattern={"v_proj": 5, "v_lin": 1.5, "h.1.attn.c_attn": 9},
    ),
    "dora": ls.DoRAConfig(r=4),
    "pissa": ls.LoRAConfig(r=4, init="pissa"),
    "pissa-rslora-patterns": ls.LoRAConfig(
        r=4, init="pissa", scaling="rslora", rank_pattern={r".*\.1\..*": 3}, alpha_pattern={"0": 2}
    ),
    "dora-pissa": ls.DoRAConfig(r=4, init="pissa"),
    "one-layer": ls.LoRAConfig(r=2, layers=(-1,)),
    "ia3": ls.IA3Config(feedforward=("*down_proj", "*mlp.c_proj", "*lin2")),
    "ia3-one": ls.IA3Config(feedforward=("*0.mlp.down_proj", "*h.0.mlp.c_proj", "*0.ffn.lin2")),
    "ia3_ff": ls.IA3FFConfig(),
}


def _peft_logits(model: Any, path: Path) -> torch.Tensor:
    return support.logits(hf_peft.PeftModel.from_pretrained(model, path).eval())


@pytest.mark.parametrize("architecture", support.MODELS)
@pytest.mark.parametrize("kind", OURS)
def test_peft_and_we_read_what_we_write(kind: str, architecture: str, tmp_path: Path) -> None:
    config = OURS[kind]
    if architecture == "distilbert":
        values = {**config.to_dict(), "modules_to_save": ["classifier"]}
        config = ls.config_from_dict(values)
    make = support.MODELS[architecture]
    model = make()
    base = support.logits(model)
    adapter = support.attached(model, config)
    want = support.logits(model)
    ls.save(model, tmp_path / "a")

    # Warnings are errors in this suite: PEFT has nothing to complain about.
    assert torch.allclose(_peft_logits(make(), tmp_path / "a"), want, atol=1e-5)
    assert not torch.allclose(base, want, atol=1e-3)

    # Ourselves: bit for bit, with the configuration as the user gave it.
    again = make()
    loaded = ls.load(again, tmp_path / "a")
    assert loaded.config == config
    _same_state(loaded, adapter)
    assert torch.equal(support.logits(again), want)

    # Ourselves, if only PEFT's two files are there.
    other = make()
    ls.load(other, support.foreign(tmp_path / "a"))
    assert torch.allclose(support.logits(other), want, atol=1e-5)


def _same_state(one: ls.Adapter, other: ls.Adapter) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


THEIRS: dict[str, tuple[str, Any]] = {
    "lora": ("LORA", {"r": 4, "lora_alpha": 3}),
    "defaults": ("LORA", {}),
    "rslora": ("LORA", {"r": 4, "use_rslora": True}),
    "all-linear": ("LORA", {"r": 4, "target_modules": "all-linear"}),
    "regex": ("LORA", {"r": 4, "target_modules": r".*\.1\..*(q_proj|c_attn|q_lin)"}),
    "layers": ("LORA", {"r": 4, "layers_to_transform": [1]}),
    "exclude": ("LORA", {"r": 4, "exclude_modules": r".*\.0\..*"}),
    "dora": ("LORA", {"r": 4, "use_dora": True}),
    "gaussian": ("LORA", {"r": 4, "init_lora_weights": "gaussian"}),
    "patterns": (
        "LORA",
        {
            "r": 4,
            "rank_pattern": {"q_proj": 2, "q_lin": 3, r"h\.0\.attn\.c_attn": 6},
            "alpha_pattern": {"v_proj": 5, "v_lin": 7, r"h\.1\.attn\.c_attn": 9},
        },
    ),
    "ia3": ("IA3", {}),
    "ia3-regex": ("IA3", {"feedforward_modules": r".*(down_proj|mlp\.c_proj|lin2)"}),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "distilbert": ["q_lin", "v_lin", "lin2"],
}
# Without a dot before the end, as PEFT matches them.
FEEDFORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "distilbert": ["lin2"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "distilbert": "SEQ_CLS"}


def _peft_model(architecture: str, kind: str, options: dict[str, Any]) -> Any:
    options = {"target_modules": TARGETS[architecture], **options}
    options["task_type"] = TASKS[architecture]
    options["fan_in_fan_out"] = architecture == "gpt2"
    if kind == "IA3":
        options.setdefault("feedforward_modules", FEEDFORWARD[architecture])
        if isinstance(options["feedforward_modules"], str):
            options["target_modules"] = "|".join(
                rf".*{re.escape(t)}" for t in TARGETS[architecture]
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if key in options:  # PEFT warns of keys that match nothing
            names = [n for n, _ in support.MODELS[architecture]().named_modules()]
            options[key] = {
                k: v
                for k, v in options[key].items()
                if any(re.fullmatch(rf"(.*\.)?({k})", n) for n in names)
            }
    make = {"LORA": hf_peft.LoraConfig, "IA3": hf_peft.IA3Config}[kind]
    model = hf_peft.get_peft_model(support.MODELS[architecture](), make(**options)).eval()
    support.stir(p for _, p in model.named_parameters() if p.requires_grad)
    return model


# PEFT 0.21.2 itself fails where "all-linear" meets DistilBERT's head: it takes pre_classifier
# for an adapted layer and, by the end of its name, for one of modules_to_save.
CASES = [
    (case, architecture)
    for case in THEIRS
    for architecture in support.MODELS
    if (case, architecture) != ("all-linear", "distilbert")
]


@pytest.mark.parametrize(("case", "architecture"), CASES)
def test_we_read_what_peft_writes(case: str, architecture: str, tmp_path: Path) -> None:
    kind, options = THEIRS[case]
    theirs = _peft_model(architecture, kind, options)
    want = support.logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")

    model = support.MODELS[architecture]()
    base = support.logits(model)
    adapter = ls.load(model, tmp_path / "theirs")
    assert torch.allclose(support.logits(model), want, atol=1e-5)
    assert not torch.allclose(base, want, atol=1e-3)
    assert not any(p.requires_grad for p in model.parameters())

    # The configuration that was read means the same to us: attaching it anew adapts the
    # same layers with the same shapes.
    fresh = support.MODELS[architecture]()
    twin = ls.attach(fresh, adapter.config)
    assert twin.targets == adapter.targets
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in adapter.state_dict().items()
    }

    # And back again.
    ls.save(model, tmp_path / "ours")
    assert torch.allclose(
        _peft_logits(support.MODELS[architecture](), tmp_path / "ours"), want, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = _peft_model("llama", "LORA", {"r": 4})
    theirs.save_pretrained(tmp_path / "a")
    support.edit_tensors(
        tmp_path / "a" / "adapter_model.safetensors",
        lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}),
    )
    weights = ls.read_adapter(tmp_path / "a")
    adapter = ls.load(support.llama(), tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj"
    stored = weights.tensors[f"base_model.model.{name}.lora_A.weight"]
    mine = adapter.state_dict()[f"{name}.A"]
    assert stored.dtype == dtype == weights.dtype
    assert mine.dtype == torch.float32
    assert torch.equal(mine, stored.to(torch.float32))


def test_a_file_that_names_an_initialisation_does_not_run_it(tmp_path: Path) -> None:
    theirs = _peft_model("llama", "LORA", {"r": 4})
    want = support.logits(theirs)
    theirs.save_pretrained(tmp_path / "a")
    support.edit_json(tmp_path / "a" / "adapter_config.json", init_lora_weights="pissa")
    model = support.llama()
    adapter = ls.load(model, tmp_path / "a")
    assert torch.allclose(support.logits(model), want, atol=1e-5)
    assert isinstance(adapter.config, ls.LoRAConfig)
    assert adapter.config.init == "kaiming"
    ls.detach(model)
    assert torch.equal(support.logits(model), support.logits(support.llama()))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_of_peft_converted_to_rank_2r(tmp_path: Path) -> None:
    """PEFT's own conversion of PiSSA is a plain LoRA; over the original base it agrees."""
    model = support.llama()
    config = hf_peft.LoraConfig(
        r=4, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    theirs = hf_peft.get_peft_model(model, config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    support.stir((p for _, p in theirs.named_parameters() if p.requires_grad), 0.02)
    want = support.logits(theirs)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    mine = support.llama()
    ls.load(mine, tmp_path / "a")
    assert torch.allclose(support.logits(mine), want, atol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", REFUSED)
def test_features_that_we_lack_are_refused_but_can_be_read(case: str, tmp_path: Path) -> None:
    theirs = _peft_model("llama", "LORA", {"r": 4, "target_modules": ["q_proj"], **REFUSED[case]})
    options: dict[str, Any] = {} if case != "embedding" else {"save_embedding_layers": False}
    theirs.save_pretrained(tmp_path / "a", **options)
    model = support.llama()
    check = support.snapshot(model)
    with pytest.raises(AdapterFileError):
        ls.load(model, tmp_path / "a")
    check()
    weights = ls.read_adapter(tmp_path / "a")
    assert len(weights.factors) == 2
    if case != "bias":
        assert weights.extras
    weights.save(tmp_path / "b")
    again = ls.read_adapter(tmp_path / "b")
    assert set(again.tensors) == set(weights.tensors)
    assert all(torch.equal(again.tensors[k], t) for k, t in weights.tensors.items())
    assert again.peft == weights.peft
    with pytest.raises(AdapterFileError):
        ls.load(model, tmp_path / "b")


def test_fields_of_a_newer_peft_are_said(tmp_path: Path) -> None:
    path = support.foreign(support.saved(tmp_path / "a"))
    support.edit_json(path / "adapter_config.json", use_warp=True, unused_warp=None)
    with pytest.warns(UserWarning, match=r"does not know.*: use_warp\."):
        ls.load(support.llama(), path)


def test_our_list_of_fields_is_that_of_peft() -> None:
    kinds = {v.peft_type: v.peft_fields for v in ls.variants().values() if v.peft_fields}
    assert {"LORA", "IA3"} <= set(kinds)
    for kind, own in kinds.items():
        config = hf_peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        theirs = {f.name for f in dataclasses.fields(config)}
        # Some types lack these; in files of such a type they do no harm.
        theirs |= {"exclude_modules", "fan_in_fan_out"}
        assert theirs == conventions.COMMON_FIELDS | own, kind


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = support.foreign(support.saved(tmp_path / "a"))
    support.edit_json(path / "adapter_config.json", peft_type="PROMPT_TUNING")
    with pytest.raises(AdapterFileError, match="PROMPT_TUNING") as caught:
        ls.read_adapter(path)
    assert "IA3" in str(caught.value.expected)
    assert "LORA" in str(caught.value.expected)


def test_a_named_adapter_of_peft_lies_in_a_subdirectory(tmp_path: Path) -> None:
    model = support.llama()
    config = hf_peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = hf_peft.get_peft_model(model, config, adapter_name="mine").eval()
    support.stir(p for _, p in theirs.named_parameters() if p.requires_grad)
    want = support.logits(theirs)
    theirs.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    mine = support.llama()
    first = ls.load(mine, tmp_path / "a")
    second = ls.load(mine, tmp_path / "a")
    assert (first.name, second.name) == ("default", "mine")
    assert torch.allclose(support.logits(mine), want, atol=1e-5)

    theirs.add_adapter("other", config)
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="several") as caught:
        ls.load(support.llama(), tmp_path / "a")
    assert caught.value.got == "mine, other"
    ls.load(support.llama(), tmp_path / "a" / "other")


def test_a_classifier_without_modules_to_save_still_opens_in_peft(tmp_path: Path) -> None:
    """PEFT demands the head's weights of every sequence classifier, trained or not."""
    model = support.distilbert()
    adapter = support.attached(model, ls.LoRAConfig(r=4))
    want = support.logits(model)
    ls.save(model, tmp_path / "a")
    weights = ls.read_adapter(tmp_path / "a")
    assert weights.padding == (
        "classifier.bias",
        "classifier.weight",
        "pre_classifier.bias",
        "pre_classifier.weight",
    )
    assert weights.num_parameters == adapter.num_parameters()
    assert torch.allclose(_peft_logits(support.distilbert(), tmp_path / "a"), want, atol=1e-5)
    again = support.distilbert()
    assert ls.load(again, tmp_path / "a").saved_modules() == {}
    assert torch.equal(support.logits(again), want)


def test_an_adapter_on_the_head_itself_opens_in_peft(tmp_path: Path) -> None:
    model = support.distilbert()
    support.attached(model, ls.LoRAConfig(r=2, targets=("q_lin", "classifier")))
    want = support.logits(model)
    ls.save(model, tmp_path / "a")
    assert torch.allclose(_peft_logits(support.distilbert(), tmp_path / "a"), want, atol=1e-5)


def test_the_heads_own_weight_that_peft_writes_beside_it(tmp_path: Path) -> None:
    make = support.MODELS["llama"]
    model = hf_peft.get_peft_model(make(), hf_peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wanted = support.logits(model.eval())
    # Our base is tied; PEFT says that it saves the embedding since the head is a target.
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any("base_layer" in key for key in ls.read_adapter(tmp_path / "a").unexpected)
    loaded = make()
    ls.load(loaded, tmp_path / "a")
    torch.testing.assert_close(support.logits(loaded), wanted, rtol=0, atol=1e-5)

    other = make()
    with torch.no_grad():
        other.get_submodule("lm_head").get_parameter("weight")[0, 0] += 1
    with pytest.raises(AdapterFileError, match="with other values"):
        ls.load(other, tmp_path / "a")


def test_what_peft_cannot_tell_apart_is_said(tmp_path: Path) -> None:
    model = support.distilbert()
    config = ls.LoRAConfig(r=2, targets="pre_classifier", modules_to_save=("classifier",))
    support.attached(model, config)
    want = support.logits(model)
    with pytest.warns(UserWarning, match="PEFT cannot load this adapter.*'pre_classifier'"):
        ls.save(model, tmp_path / "a")
    again = support.distilbert()
    assert ls.load(again, tmp_path / "a").config == config
    assert torch.equal(support.logits(again), want)


def test_the_configuration_is_one_that_vllm_reads(tmp_path: Path) -> None:
    fields = json.loads((support.saved(tmp_path / "a") / "adapter_config.json").read_text())
    assert fields["r"] == 4
    assert fields["lora_alpha"] == 16
    assert type(fields["lora_alpha"]) is int
    assert fields["target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert (fields["bias"], fields["use_dora"], fields["modules_to_save"]) == ("none", False, None)
    assert fields["init_lora_weights"] is True
    assert fields["task_type"] == "CAUSAL_LM"
    known = {f.name for f in dataclasses.fields(hf_peft.LoraConfig)}
    assert set(fields) <= known


PARTS = st.sampled_from(["a", "b", "proj", "q_proj", "0", "1", "x.y", "c*", "w[0]"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, unique=True)


@given(NAMES, st.data())
def test_short_names_mean_the_same_modules_to_peft(names: list[str], data: Any) -> None:
    from peft.tuners.ia3.model import IA3Model
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    inner = data.draw(st.lists(st.sampled_from(chosen), unique=True))
    targets, feedforward = conventions.shorten(chosen, inner, names, ())
    config = hf_peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    assert {n for n in names if check_target_module_exists(config, n)} == set(chosen)
    found = {n for n in chosen if IA3Model._check_target_module_feedforward(config, n)}
    assert found == set(inner)
    fields = {"target_modules": targets}
    assert conventions.targeted(fields, names, lambda _: False) == set(chosen)


@given(
    NAMES,
    st.one_of(st.lists(PARTS, min_size=1), st.sampled_from([r".*proj", r"a\..*", "all-linear"])),
    st.one_of(st.none(), st.lists(PARTS, max_size=2), st.just(r".*\.0\..*")),
    st.one_of(st.none(), st.just([]), st.just([1]), st.just(0)),
    st.one_of(st.none(), st.just("a"), st.just(["b", "a"])),
)
def test_we_read_targets_as_peft_does(
    names: list[str], targets: Any, exclude: Any, layers: Any, pattern: Any
) -> None:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    if isinstance(targets, str):
        layers = pattern = None  # PEFT refuses the combination
    if layers in (None, []):
        pattern = None
    fields = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    mine = conventions.targeted(fields, names, lambda n: n == "a")
    assert mine is not None
    if targets == "all-linear":
        # PEFT expands it to names beforehand.
        fields["target_modules"] = [n for n in names if n != "a"] or ["none"]
        if "a" in mine or any(n == "a" or n.endswith(".a") for n in names):
            return
    config = hf_peft.LoraConfig(**fields)
    found = set()
    for name in names:
        result = check_target_module_exists(config, name)
        if result and not isinstance(result, _ExcludedModule):
            found.add(name)
    assert mine == found
