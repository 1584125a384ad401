"""Adapters for vLLM, SGLang and TGI, judged by the servers' own rules.

None of the three runs here. What they read is written down below from their sources, sharing no
code with the exporter: vLLM's ``vllm/lora/peft_helper.py`` (e745baf; the form of autumn 2026, which
refuses more), ``vllm/lora/utils.py`` (001e63a) and ``vllm/lora/lora_model.py`` (0306474); SGLang's
``python/sglang/srt/lora/lora_config.py`` (0ceb81f) and ``lora.py`` (db2a4cc); TGI's
``server/text_generation_server/adapters/lora.py`` (45d95bd).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import AdapterFileError, ConfigError
from tests.io import support

pytestmark = [
    pytest.mark.filterwarnings("ignore:The adapter names"),
    # PEFT on the newest Transformers.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

SERVERS = ("vllm", "sglang", "tgi")


def vllm(folder: Path, limit: int) -> dict[str, Tensor]:
    """Module → what vLLM adds to W; an AssertionError where vLLM refuses."""
    assert limit in (8, 16, 32, 64, 128, 256, 320, 512)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert 0 < config["r"] <= limit, "LoRA rank is greater than max_lora_rank"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert config.get("bias", "none") == "none"
    assert not config.get("lora_bias")
    start = config.get("init_lora_weights", True)
    assert not isinstance(start, str) or start in (
        "gaussian",
        "eva",
        "orthogonal",
        "mica",
        "lora_ga",
    )
    for key in ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        assert not config.get(key), key
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    # Versions that know patterns and those that do not must come to the same.
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.")
        parts = name.split(".")
        assert parts[-1] == "weight", "is unsupported LoRA weight"
        assert parts[-2] in ("lora_A", "lora_B"), "is unsupported LoRA weight"
        found.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = value.double()
    for name, pair in found.items():
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == config["r"], name
        leaf = name.rpartition(".")[2]
        assert any(t in (name, leaf) or name.endswith(f".{t}") for t in config["target_modules"])
    scaling = config["lora_alpha"] / divisor
    return {name: scaling * (p["lora_B"] @ p["lora_A"]) for name, p in found.items()}


def sglang(folder: Path, limit: int) -> dict[str, Tensor]:
    """The same for SGLang, which knows no rank-stabilised scaling."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"].lower() == "lora"
    assert config["r"] <= limit
    assert not config.get("use_dora")
    assert not (folder / "added_tokens.json").exists()
    for key, own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        assert all(v == config[own] for v in (config.get(key) or {}).values())
    assert isinstance(config["target_modules"], list)
    values = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in values:
        # normalize_qkv_proj, normalize_gate_up_proj: k and up may be missing, the others not.
        for stack, needed in ((("q", "k", "v"), ("q", "v")), (("gate", "up"), ("gate",))):
            for kind, other in itertools.product(stack, needed):
                assert name.replace(f".{kind}_proj.", f".{other}_proj.") in values, name
    for name, A in values.items():
        if name.endswith(".lora_A.weight"):
            B = values[name.replace("lora_A", "lora_B")]
            assert A.shape[0] == B.shape[1] == config["r"]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert module.split(".")[-1] in {t.split(".")[-1] for t in config["target_modules"]}
            found[module] = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
    assert len(values) == 2 * len(found)
    return found


def tgi(folder: Path, limit: int) -> dict[str, Tensor]:
    """The same for TGI: kinds of layers of which one is missing are left out without a word."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    assert config.r <= limit
    values = load_file(folder / "adapter_model.safetensors")
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    layers, kinds = 2, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    kinds += ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    found = {}
    for kind in kinds:
        names = [f"model.layers.{i}.{kind}" for i in range(layers)]
        keys = [f"base_model.model.{n}.lora_A.weight" for n in names]
        if not all(key in values for key in keys):
            continue
        for name, key in zip(names, keys, strict=True):
            A, B = values[key].double(), values[key.replace("lora_A", "lora_B")].double()
            found[name] = scaling * (B @ A)
        torch.stack([values[key] for key in keys])  # TGI stacks the layers: one rank
    return found


JUDGES = {"vllm": vllm, "sglang": sglang, "tgi": tgi}


def deltas(weights: Any) -> dict[str, Tensor]:
    """s B A of what stands in a PEFT directory, float64."""
    found = {}
    for module in weights.modules:
        A, B = (
            weights.tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB"
        )
        if weights.frozen:  # PEFT's pair is of rank 2 r there, with the same scaling
            assert A.shape[0] == 2 * weights.config.rank_of(module)
        found[module] = weights.config.scaling_of(module) * (B @ A)
    return found


def check(path: Path, out: Path, server: str, tolerance: float = 1e-6, **more: Any) -> Any:
    """Exports, lets the server's rules judge, and compares what it would add to W."""
    weights = ls.read_adapter(path)
    made = ls.export_adapter(path, out, server, **more)
    assert made.max_lora_rank is not None
    got = JUDGES[server](out, made.max_lora_rank)
    wanted = deltas(weights)
    assert wanted.keys() <= got.keys()
    for name, value in got.items():
        expected = wanted.get(name, torch.zeros_like(value))
        bound = tolerance * float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=0, atol=bound)
    return made


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "rslora": {"r": 6, "scaling": "rslora", "alpha": 7.0},
    "ranks": {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 9, "down_proj": 2}},
    "alphas": {"r": 4, "alpha_pattern": {"v_proj": 3.0, "layers.1.mlp.up_proj": 64.0}},
    "all of it": {
        "r": 3,
        "scaling": "rslora",
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {"q_proj": 1.5},
    },
    "pissa": {"r": 4, "init": "pissa"},
    "olora, rslora": {"r": 4, "init": "olora", "scaling": "rslora"},
    "regex": {"r": 4, "targets": ["re:.*layers.0.*(q|v)_proj"]},
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("case", CASES)
def test_the_server_adds_what_the_adapter_adds(tmp_path: Path, server: str, case: str) -> None:
    base = tmp_path / "base"
    support.llama().config.save_pretrained(base)
    config = ls.LoRAConfig(**{"targets": "all-linear", **CASES[case]})
    path = support.saved(tmp_path / "adapter", config)
    made = check(path, tmp_path / "out", server, base=base)
    assert str(tmp_path / "out") in made.commands[0]
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["init_lora_weights"] is True
    assert fields["use_rslora"] is False


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 12), min_size=2, max_size=2),
    alphas=st.lists(st.floats(0.5, 64), min_size=2, max_size=2),
    scaling=st.sampled_from(["standard", "rslora"]),
    rank=st.none() | st.integers(12, 20),
)
def test_any_ranks_and_alphas(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: list[int],
    alphas: list[float],
    scaling: str,
    rank: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    config = ls.LoRAConfig(
        r=ranks[0],
        alpha=alphas[0],
        scaling=scaling,
        rank_pattern={"v_proj": ranks[1]},
        alpha_pattern={"v_proj": alphas[1]},
        targets=["q_proj", "v_proj"],
    )
    path = support.saved(folder / "adapter", config)
    made = check(path, folder / "out", "vllm", rank=rank)
    assert made.rank == (rank or max(ranks))
    assert made.rounding < 1e-6


@pytest.mark.parametrize("server", SERVERS)
def test_a_uniform_adapter_keeps_every_bit(tmp_path: Path, server: str) -> None:
    path = support.saved(tmp_path / "adapter", ls.LoRAConfig(r=8, targets="all-linear"))
    made = ls.export_adapter(path, tmp_path / "out", server)
    before = load_file(path / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    assert made.rounding == 0
    assert made.conversion is None


def test_bfloat16_stays_where_it_is_exact(tmp_path: Path) -> None:
    """Powers of two change no digit; other factors need float32."""
    for alpha, kind in ((32.0, torch.bfloat16), (24.0, torch.float32)):
        folder = tmp_path / str(alpha)
        model = support.llama()
        config = ls.LoRAConfig(r=4, alpha=16.0, alpha_pattern={"v_proj": alpha})
        support.attached(model, config)
        weights = ls.AdapterWeights.from_model(model)
        narrow = {m: {"A": f.A.bfloat16(), "B": f.B.bfloat16()} for m, f in weights.factors.items()}
        path = ls.AdapterWeights.from_tensors(config, narrow, like=weights).save(folder / "adapter")
        check(path, folder / "out", "vllm", tolerance=1e-7)
        values = load_file(folder / "out" / "adapter_model.safetensors")
        assert {v.dtype for v in values.values()} == {kind}


@pytest.mark.parametrize(
    ("rank", "limit"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (33, 64), (257, 320), (321, 512), (512, 512)],
)
def test_vllm_takes_certain_limits(tmp_path: Path, rank: int, limit: int) -> None:
    path = support.saved(tmp_path / "adapter", ls.LoRAConfig(r=1, targets=["q_proj"]))
    made = check(path, tmp_path / "out", "vllm", rank=rank)
    assert made.max_lora_rank == limit
    assert f"--max-lora-rank {limit} " in made.commands[0]
    assert made.rank == rank


def test_a_rank_that_is_too_high(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "adapter", ls.LoRAConfig(r=513, targets=["q_proj", "v_proj"]))
    with pytest.raises(ConfigError) as caught:
        ls.export_adapter(path, tmp_path / "out", "vllm")
    assert caught.value.fix is not None
    assert "--rank 512" in caught.value.fix
    assert not (tmp_path / "out").exists()
    # No matrix of 32 × 32 needs more than 32.
    made = check(path, tmp_path / "out", "vllm", rank=512, tolerance=1e-5)
    assert made.error < 1e-6
    ls.export_adapter(path, tmp_path / "sglang", "sglang")  # which has no such list


def test_layers_that_tgi_would_miss(tmp_path: Path) -> None:
    model = support.llama()
    model.config.save_pretrained(tmp_path / "base")
    config = ls.LoRAConfig(r=4, targets=["q_proj"], layers=[0])
    path = support.saved(tmp_path / "adapter", config)
    check(path, tmp_path / "vllm-form", "vllm")
    assert not tgi(tmp_path / "vllm-form", 8)  # nothing of it would act
    made = check(path, tmp_path / "out", "tgi", base=tmp_path / "base")
    assert any("zeros" in note for note in made.notes)
    assert set(tgi(tmp_path / "out", 8)) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


@pytest.mark.parametrize(
    ("targets", "layers", "filled"),
    [
        (["q_proj"], None, {"v_proj"}),
        (["k_proj"], [1], {"q_proj", "v_proj"}),
        (["v_proj", "up_proj"], None, {"q_proj", "gate_proj"}),
        (["q_proj", "v_proj", "gate_proj", "o_proj"], None, set()),
    ],
)
def test_stacks_that_sglang_would_not_make(
    tmp_path: Path, targets: list[str], layers: list[int] | None, filled: set[str]
) -> None:
    model = support.llama()
    model.config.save_pretrained(tmp_path / "base")
    config = ls.LoRAConfig(r=4, targets=targets, layers=layers)
    path = support.saved(tmp_path / "adapter", config)
    made = check(path, tmp_path / "out", "sglang", base=tmp_path / "base")
    got = sglang(tmp_path / "out", 8)
    here = layers if layers is not None else [0, 1]
    new = {name for name, delta in got.items() if not delta.any()}
    assert {n.rpartition(".")[2] for n in new} == filled
    assert len(new) == len(filled) * len(here)
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in got}
    assert {n: tuple(d.shape) for n, d in got.items()} == shapes
    assert any("stacks" in note for note in made.notes) == bool(filled)
    if targets == ["q_proj"]:
        with pytest.raises(AdapterFileError, match="stacks") as caught:
            ls.export_adapter(path, tmp_path / "none", "sglang")
        assert caught.value.key == "model.layers.0.self_attn.v_proj"
        assert not (tmp_path / "none").exists()


def test_dora_becomes_plain_with_its_error(tmp_path: Path) -> None:
    model = support.llama()
    adapter = support.attached(model, ls.DoRAConfig(r=4, targets=["q_proj", "v_proj"]))
    wanted = {}
    for name, part in adapter.layers().items():
        W = model.get_submodule(name).weight.double()
        state = {n: part[n].double() for n in ("A", "B", "magnitude")}
        V = W + part.constants["scaling"] * (state["B"] @ state["A"])
        wanted[name] = state["magnitude"][:, None] * V / V.norm(dim=1, keepdim=True) - W
    with pytest.warns(UserWarning, match="far from the adapter"):
        made = ls.export_adapter(adapter, tmp_path / "out", "vllm", rank=6)
    got = vllm(tmp_path / "out", 8)
    lost = sum(float((got[n] - d.detach()).square().sum()) for n, d in wanted.items())
    change = sum(float(d.detach().square().sum()) for d in wanted.values())
    assert made.error == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    # No plain LoRA of that rank is nearer.
    for name, delta in wanted.items():
        least = torch.linalg.svdvals(delta.detach())[6:].norm()
        assert float((got[name] - delta.detach()).norm()) <= float(least) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["vera", "delora", "lora_xs"])
def test_variants_of_exact_factors_lose_nothing(tmp_path: Path, name: str) -> None:
    model = support.llama()
    config = type(ls.variants()[name].config_class())(targets=["q_proj", "v_proj"])
    adapter = support.attached(model, config)
    before = support.logits(model)
    made = ls.export_adapter(adapter, tmp_path / "out", "sglang")
    assert made.error < 1e-5
    ls.detach(model, adapter.name)
    ls.load(model, tmp_path / "out")
    torch.testing.assert_close(support.logits(model), before, rtol=0, atol=1e-4)


def test_peft_loads_what_the_servers_get(tmp_path: Path) -> None:
    """PEFT itself gives the same logits with the patterns and the scaling, and without them."""
    from peft import PeftModel

    config = ls.LoRAConfig(targets="all-linear", **CASES["all of it"])
    path = support.saved(tmp_path / "adapter", config)
    ls.export_adapter(path, tmp_path / "out", "vllm")
    before, after = (
        support.logits(PeftModel.from_pretrained(support.llama(), str(p)))
        for p in (path, tmp_path / "out")
    )
    plain = support.logits(support.llama())
    assert (before - plain).abs().max() > 1e-2
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("server", SERVERS)
def test_what_servers_do_not_take(tmp_path: Path, server: str) -> None:
    model = support.llama()
    adapter = ls.attach(model, ls.LoRAConfig(targets=["q_proj"], modules_to_save=["lm_head"]))
    ls.save(model, tmp_path / "saved")
    ls.detach(model, adapter.name)
    with pytest.raises(AdapterFileError, match="modules_to_save") as caught:
        ls.export_adapter(tmp_path / "saved", tmp_path / "out", server)
    assert caught.value.fix is not None
    assert "lorasmith fuse" in caught.value.fix
    for key, value in (("bias", "all"), ("lora_bias", True), ("layer_replication", [[0, 2]])):
        path = support.saved(tmp_path / key)
        fields = json.loads((path / "adapter_config.json").read_text())
        fields[key] = value
        (path / "adapter_config.json").write_text(json.dumps(fields))
        (path / "lorasmith.json").unlink()
        with pytest.raises(AdapterFileError, match=key):
            ls.export_adapter(path, tmp_path / "out", server)
    assert not (tmp_path / "out").exists()


# -- PEFT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hra", "road", "vera", "oft", "lokr"])
def test_what_peft_has_goes_as_it_is(tmp_path: Path, name: str) -> None:
    more = {"group_size": 16} if name == "road" else {}
    config = ls.variants()[name].config_class(targets=["q_proj", "v_proj"], **more)
    path = support.saved(tmp_path / "adapter", config)
    made = ls.export_adapter(path, tmp_path / "out", "peft")
    assert made.variant == name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (path / file).read_bytes()


def test_what_peft_has_not_becomes_plain(tmp_path: Path) -> None:
    from peft import PeftModel

    model = support.llama()
    config = ls.variants()["antipasto"].config_class(targets=["q_proj", "v_proj"])
    adapter = support.attached(model, config)
    before = support.logits(model)
    made = ls.export_adapter(adapter, tmp_path / "out", "peft", rank=32)
    assert (made.source, made.variant) == ("antipasto", "lora")
    assert made.error < 1e-5
    theirs = support.logits(PeftModel.from_pretrained(support.llama(), str(tmp_path / "out")))
    torch.testing.assert_close(theirs, before, rtol=0, atol=1e-3)


def test_names_in_commands_are_quoted(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "adapter", ls.LoRAConfig(r=4, targets=["q_proj"]))
    made = ls.export_adapter(path, tmp_path / "a folder; rm", "vllm", name="mine")
    assert re.search(r"--lora-modules '[^']*a folder; rm'", made.commands[0])


def test_real_adapters(zoo: Path, tmp_path: Path) -> None:
    for name in ("mrpc-rankpattern", "numbers-en-rslora-r16", "dates-en-r4"):
        for server in ("vllm", "sglang"):
            made = check(zoo / name, tmp_path / f"{name}-{server}", server)
            assert made.layers == 60
