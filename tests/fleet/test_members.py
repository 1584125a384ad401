"""Members of a fleet: opening, ids, bases, what is refused, and rebuilding with proof by PEFT."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    MissingDependencyError,
    UnknownNameError,
    UnsupportedFeatureError,
)
from lorasmith.fleet import LayerFactors, MemberRecord, expand, open_members, rebuild
from tests.io import support
from tests.io.support import attached, edit_json, edit_tensors, foreign, llama, logits, saved

hf_peft = pytest.importorskip("peft")

Q0 = "model.layers.0.self_attn.q_proj"


def _by_peft(path: Path, model: Any = None) -> Tensor:
    """Logits of the directory as PEFT runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf_peft.PeftModel.from_pretrained(llama() if model is None else model, path)
    return logits(theirs.eval())


def _all(member: Any) -> dict[str, LayerFactors]:
    return {m: member.factors(m) for m in member.modules}


def _made_by_peft(path: Path, *, stir: float = 0.1, model: Any = None, **options: Any) -> Path:
    """An adapter that PEFT made and wrote."""
    given: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = hf_peft.LoraConfig(task_type="CAUSAL_LM", **given)
        theirs = hf_peft.get_peft_model(llama() if model is None else model, config)
        support.stir((p for p in theirs.parameters() if p.requires_grad), stir)
        theirs.save_pretrained(path)
    return path


# -- factors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ls.LoRAConfig(r=3, alpha=5),
        ls.LoRAConfig(r=4, alpha=3, scaling="rslora"),
        ls.LoRAConfig(r=3, init="pissa"),
        ls.LoRAConfig(r=3, init="pissa", train_A=False),
        ls.LoRAConfig(r=2, rank_pattern={"up_proj": 5}, alpha_pattern={"layers.0.*": 1.5}),
        ls.LoRAXSConfig(r=3),
    ],
    ids=["lora", "rslora", "pissa", "fa", "patterns", "lora_xs"],
)
def test_the_factors_are_the_whole_change(config: Any, tmp_path: Path) -> None:
    """Against the fused weights of the model, in float64."""
    model = llama()
    before = {n: t.double().clone() for n, t in model.state_dict().items()}
    attached(model, config)
    ls.save(model, tmp_path / "a")
    ls.fuse(model)
    (member,) = open_members(tmp_path / "a")
    assert member.id == "a"
    for module in member.modules:
        found = member.factors(module)
        fused = model.get_submodule(module).weight.double() - before[f"{module}.weight"]
        torch.testing.assert_close(found.delta(torch.float64), fused, atol=2e-6, rtol=1e-5)
        assert found.A.dtype == found.B.dtype == torch.float32
        assert found.rank == member.rank(module)
    with pytest.raises(UnknownNameError, match="does not adapt"):
        member.factors("model.norm")


# -- rebuilding ----------------------------------------------------------------------------------


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 alpha": {"lora_alpha": 7, "lora_dropout": 0.1},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("through", ["weights", "record"])
def test_rebuilt_it_is_the_same_to_peft(case: str, through: str, tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a", **CASES[case])
    if case == "bf16 alpha":
        edit_tensors(
            source / "adapter_model.safetensors",
            lambda t: t.update({k: v.bfloat16() for k, v in t.items()}),
        )
    (member,) = open_members([source])
    like: Any = member.weights
    if through == "record":
        like = MemberRecord.from_dict(json.loads(json.dumps(member.record.to_dict())))
        assert like == member.record
    made = rebuild(like, _all(member), rest=member.rest)
    assert made.config == member.weights.config
    assert made.dtype == member.weights.dtype
    assert {k: v for k, v in made.peft.items() if k != "init_lora_weights"} == {
        k: v for k, v in member.weights.peft.items() if k != "init_lora_weights"
    }
    assert set(made.tensors) == set(member.weights.tensors)
    for key in member.rest:  # bit for bit
        mine = made.tensors[f"base_model.model.{key}"]
        assert mine.dtype == member.rest[key].dtype
        assert torch.equal(mine, member.rest[key])
    made.save(tmp_path / "b")
    want = _by_peft(source)
    assert not torch.allclose(want, logits(llama()), atol=1e-3)
    torch.testing.assert_close(_by_peft(tmp_path / "b"), want, atol=1e-6, rtol=1e-6)
    if case != "embedding":
        again = llama()
        ls.load(again, tmp_path / "b")
        torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["plain", "rslora", "dora", "patterns", "embedding", "head"])
@pytest.mark.parametrize("ranks", ["one more", "mixed"])
def test_other_ranks_keep_the_scaling(case: str, ranks: str, tmp_path: Path) -> None:
    """The same ΔW in factors of other ranks: zeros, or a repeated direction split in two."""
    source = _made_by_peft(tmp_path / "a", **CASES[case])
    (member,) = open_members([source])
    factors = {}
    for place, (module, found) in enumerate(_all(member).items()):
        A, B = found.A, found.B
        for _ in range(1 if ranks == "one more" else place % 3):
            A, B = torch.cat((A, A[:1])), torch.cat((B / 2, B[:, :1]), dim=1)
            B[:, 1:-1] *= 2
            B[:, -1] /= 2
        factors[module] = LayerFactors(A, B)
        torch.testing.assert_close(factors[module].delta(), found.delta())
    made = rebuild(member, factors, dtype=torch.float32)
    for module in member.modules:
        assert made.factors[module].rank == factors[module].rank
        before = member.weights.factors[module].scaling
        assert made.factors[module].scaling == pytest.approx(before, rel=1e-12)
    made.save(tmp_path / "b")
    torch.testing.assert_close(_by_peft(tmp_path / "b"), _by_peft(source), atol=1e-5, rtol=1e-5)
    assert ls.read_adapter(tmp_path / "b").config == made.config


def test_ranks_can_be_filled_up_but_not_cut(tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a", lora_alpha=6)
    (member,) = open_members([source])
    short = {
        m: LayerFactors(f.A[:2], f.B[:, :2]) if i % 2 else f
        for i, (m, f) in enumerate(_all(member).items())
    }
    same = rebuild(member, short, rank="original")
    assert same.config == member.weights.config
    wide = rebuild(member, short, rank=9)
    assert {f.rank for f in wide.factors.values()} == {9}
    assert wide.config.rank_pattern == {}
    for module, found in short.items():
        torch.testing.assert_close(same.factors[module].delta(), found.delta())
        torch.testing.assert_close(wide.factors[module].delta(), found.delta())
    with pytest.raises(ConfigError, match="higher rank"):
        rebuild(member, short, rank=3)
    with pytest.raises(ConfigError, match="not usable"):
        rebuild(member, short, rank=0)
    with pytest.raises(ConfigError, match="do not fit"):
        rebuild(member, {Q0: LayerFactors(torch.ones(2, 5), torch.ones(32, 2))})
    with pytest.raises(ConfigError, match="no factors"):
        rebuild(member, {})


def test_another_set_of_layers(tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a", target_modules="all-linear", exclude_modules=["o_proj"])
    (member,) = open_members([source])
    factors = {Q0: member.factors(Q0)}
    made = rebuild(member, factors)
    assert made.modules == (Q0,)
    made.save(tmp_path / "b")
    model = llama()
    handle = ls.load(model, tmp_path / "b")
    assert set(handle.targets) == {Q0}
    torch.testing.assert_close(_by_peft(tmp_path / "b"), logits(model), atol=1e-5, rtol=1e-5)


def test_nothing_beside_the_factors_is_lost_in_silence(tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a", use_dora=True, modules_to_save=["lm_head"])
    (member,) = open_members([source])
    record, factors, rest = member.record, _all(member), dict(member.rest)
    assert member.dora
    assert record.dora
    assert set(rest) == {
        *(f"{m}.lora_magnitude_vector" for m in member.modules),
        "lm_head.weight",
    }
    with pytest.raises(AdapterFileError, match="would be lost") as caught:
        rebuild(record, factors)
    assert caught.value.key in rest
    with pytest.raises(AdapterFileError, match="would be lost"):
        rebuild(member, factors, rest={k: v for k, v in rest.items() if k != "lm_head.weight"})
    with pytest.raises(AdapterFileError, match="not one that the adapter has"):
        rebuild(member, factors, rest={**rest, "more.weight": torch.ones(1)})
    with pytest.raises(AdapterFileError, match="another shape"):
        rebuild(member, factors, rest={**rest, "lm_head.weight": torch.ones(2, 2)})


def test_what_an_initialisation_took_over_comes_back_as_plain_lora(tmp_path: Path) -> None:
    model = llama()
    attached(model, ls.LoRAConfig(r=3, init="pissa", modules_to_save=["lm_head"]))
    want = logits(model)
    ls.save(model, tmp_path / "a")
    (member,) = open_members([tmp_path / "a"])
    made = rebuild(member, _all(member))
    assert made.config.r == 6
    assert made.config.init == "kaiming"
    assert made.frozen == ()
    made.save(tmp_path / "b")
    torch.testing.assert_close(_by_peft(tmp_path / "b"), want, atol=1e-5, rtol=1e-5)
    again = llama()
    ls.load(again, tmp_path / "b")
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [ls.LoRAXSConfig(r=3), ls.VeRAConfig(r=4)], ids=["xs", "vera"])
def test_families_with_exact_factors_come_back_as_lora(config: Any, tmp_path: Path) -> None:
    model = llama()
    attached(model, replace(config, targets=["q_proj"], modules_to_save=["lm_head"]))
    want = logits(model)
    ls.save(model, tmp_path / "a")
    (member,) = open_members([tmp_path / "a"])
    assert set(member.rest) == {"lm_head.weight"}
    made = rebuild(member, _all(member))
    assert made.variant.name == "lora"
    made.save(tmp_path / "b")
    torch.testing.assert_close(_by_peft(tmp_path / "b"), want, atol=1e-5, rtol=1e-5)


def test_the_zoo_comes_back_bit_for_bit(zoo: Path) -> None:
    members = open_members(zoo)
    assert len(members) == 16
    assert [m.id for m in members] == sorted(e.name for e in zoo.iterdir() if e.is_dir())
    for member in members:
        made = rebuild(member, _all(member))
        weights = member.weights
        assert made.peft == weights.peft
        assert made.config == weights.config
        assert set(made.tensors) == set(weights.tensors)
        for key in weights.tensors:
            assert made.tensors.dtype(key) == weights.tensors.dtype(key)
            assert torch.equal(made.tensors[key], weights.tensors[key]), (member.id, key)
        assert member.nbytes == sum(
            t.numel() * t.element_size() for t in (weights.tensors[k] for k in weights.tensors)
        )


# -- what is refused -----------------------------------------------------------------------------


REFUSED: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_that_cannot_be_carried(case: str, tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a", **REFUSED[case])
    with pytest.raises(UnsupportedFeatureError, match="'a' cannot be part of a fleet"):
        open_members([source])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_files_whose_change_peft_makes_up_with_the_base(start: str, tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a")
    edit_json(source / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(UnsupportedFeatureError, match="takes a part out of the base") as caught:
        open_members([source])
    assert caught.value.key == "init_lora_weights"


def test_unexplained_tensors(tmp_path: Path) -> None:
    source = _made_by_peft(tmp_path / "a")
    edit_tensors(
        source / "adapter_model.safetensors",
        lambda t: t.update({f"base_model.model.{Q0}.lora_C": torch.ones(2)}),
    )
    with pytest.raises(UnsupportedFeatureError, match="cannot be carried"):
        open_members([source])


@pytest.mark.parametrize("config", [ls.IA3Config(), ls.LoHaConfig(r=2), ls.OFTConfig(block_size=8)])
def test_families_without_factors(config: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "a", config)
    with pytest.raises(UnsupportedFeatureError, match="low-rank factors") as caught:
        open_members([path])
    assert caught.value.fix is not None
    assert "lorasmith convert" in caught.value.fix
    (member,) = open_members([path], needs="delta")
    with pytest.raises(UnsupportedFeatureError, match="low-rank factors"):
        member.factors(member.modules[0])
    weight = llama().get_submodule(member.modules[0]).weight
    assert member.delta(member.modules[0], weight).shape == weight.shape


# -- bases ---------------------------------------------------------------------------------------


def test_adapters_of_other_bases_are_refused(tmp_path: Path) -> None:
    first = saved(tmp_path / "one")
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    second = saved(tmp_path / "two", model=other)
    with pytest.raises(BaseMismatchError, match=r"'one' and 'two'") as caught:
        open_members([first, second])
    assert "allow_base_mismatch" in str(caught.value)
    assert len(open_members([first, second], allow_base_mismatch=True)) == 2


def test_names_count_where_there_is_no_fingerprint(tmp_path: Path) -> None:
    paths = [foreign(saved(tmp_path / n)) for n in ("one", "two")]
    edit_json(paths[0] / "adapter_config.json", base_model_name_or_path="owner/base")
    edit_json(paths[1] / "adapter_config.json", base_model_name_or_path="owner/other")
    with pytest.raises(BaseMismatchError, match=r"'one' and 'two'.*by their names") as caught:
        open_members(paths)
    assert caught.value.expected == "owner/base"
    assert caught.value.got == "owner/other"
    edit_json(paths[1] / "adapter_config.json", base_model_name_or_path=None)
    assert len(open_members(paths)) == 2


def test_sizes_count_always(tmp_path: Path) -> None:
    from tests.models import llama as smaller

    first = foreign(saved(tmp_path / "one"))
    second = foreign(saved(tmp_path / "two", model=smaller()))
    for allow in (False, True):
        with pytest.raises(BaseMismatchError, match="other sizes"):
            open_members([first, second], allow_base_mismatch=allow)


# -- ids and directories ---------------------------------------------------------------------------


def test_ids(tmp_path: Path) -> None:
    source = saved(tmp_path / "a" / "adapter")
    shutil.copytree(source, tmp_path / "b" / "adapter")
    shutil.copytree(source, tmp_path / "c")
    paths = [tmp_path / "a" / "adapter", tmp_path / "b" / "adapter", tmp_path / "c"]
    assert [m.id for m in open_members(paths)] == ["a/adapter", "b/adapter", "c"]
    assert [m.id for m in open_members([source, source])] == ["adapter", "adapter#2"]
    twice = [paths[0], paths[0], paths[1]]
    assert [m.id for m in open_members(twice)] == ["a/adapter", "a/adapter#2", "b/adapter"]
    assert [m.id for m in open_members([f"{source}/", source / "."])] == ["adapter", "adapter#2"]
    ids = ["team/a", "team_a", "Ünïcode ☂ ../x"]
    assert [m.id for m in open_members(paths, ids)] == ids
    assert [m.id for m in open_members(dict(zip(ids, paths, strict=True)))] == ids
    weights = ls.read_adapter(source)
    assert [m.id for m in open_members([weights, paths[2]])] == ["adapter", "c"]
    members = open_members(paths, ids)
    assert [m.id for m in open_members(members[1:])] == ids[1:]


@pytest.mark.parametrize("bad", ["", "a\nb", "a\0", "x" * 256, "\ud800", None, 3])
def test_ids_that_are_none(bad: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="id of an adapter") as caught:
        open_members([source], [bad])
    assert caught.value.key == "ids"


def test_ids_must_fit(tmp_path: Path) -> None:
    source = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="same id"):
        open_members([source, source], ["x", "x"])
    with pytest.raises(ConfigError, match="as many ids"):
        open_members([source], ["x", "y"])
    with pytest.raises(ConfigError, match="its own ids"):
        open_members({"x": source}, ["x"])
    with pytest.raises(AdapterFileError, match="no adapter"):
        open_members([])


def test_a_directory_of_adapters(tmp_path: Path) -> None:
    for name in ("two", "one"):
        saved(tmp_path / "fleet" / name)
    (tmp_path / "fleet" / "notes").mkdir()
    (tmp_path / "fleet" / "README.md").write_text("")
    fleet = tmp_path / "fleet"
    assert expand([fleet, fleet / "one", "owner/name"]) == [
        str(fleet / "one"),
        str(fleet / "two"),
        fleet / "one",
        "owner/name",
    ]
    assert [m.id for m in open_members(fleet)] == ["one", "two"]
    with pytest.raises(AdapterFileError, match="no adapter"):
        open_members([tmp_path / "fleet" / "notes"])


# -- URLs ------------------------------------------------------------------------------------------


def test_adapters_at_urls(memory: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        memory.put(str(saved(tmp_path / name)), f"/team/{name}", recursive=True)
    want = ls.read_adapter(tmp_path / "one")
    weights = ls.read_adapter("memory://team/one")
    assert weights.config == want.config
    assert weights.base.fingerprint == want.base.fingerprint
    for key in want.tensors:
        assert torch.equal(weights.tensors[key], want.tensors[key])
    assert [m.id for m in open_members("memory://team")] == ["one", "two"]
    assert [m.id for m in open_members(["memory://team/two/"])] == ["two"]
    model = llama()
    assert ls.load(model, "memory://team/one").name == "default"
    assert ls.load(model, "memory://team/two").name == "two"
    again = ls.read_adapter(f"file://{tmp_path}/one")
    assert again.path == tmp_path / "one"


def test_a_url_is_read_anew_when_its_files_change(memory: Any, tmp_path: Path) -> None:
    memory.put(str(saved(tmp_path / "a")), "/a", recursive=True)
    first = ls.read_adapter("memory://a")
    same = ls.read_adapter("memory://a")
    assert same.path == first.path  # copied once
    old = {k: first.tensors[k] for k in first.tensors}
    memory.rm("/a", recursive=True)
    memory.put(str(saved(tmp_path / "b", ls.LoRAConfig(r=7))), "/a", recursive=True)
    second = ls.read_adapter("memory://a")
    assert second.config.r == 7
    assert all(torch.equal(first.tensors[k], v) for k, v in old.items())


def test_urls_that_lead_nowhere(memory: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        memory.put(str(saved(tmp_path / name)), f"/team/{name}", recursive=True)
    with pytest.raises(AdapterFileError, match="several adapters") as caught:
        ls.read_adapter("memory://team")
    assert "memory:///team/one" in str(caught.value) or "memory://team/one" in str(caught.value)
    with pytest.raises(AdapterFileError, match="no such adapter"):
        ls.read_adapter("memory://nothing/here")
    with pytest.raises(AdapterFileError, match="no such adapter"):
        open_members(["memory://nothing/here"])
    with pytest.raises(AdapterFileError, match="cannot be read"):
        ls.read_adapter("nonsense://a/b")
    memory.rm("/team/one/adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="no weights"):
        ls.read_adapter("memory://team/one")


def test_a_protocol_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec import core

    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(core, "url_to_fs", missing)
    with pytest.raises(MissingDependencyError, match="s3fs"):
        ls.read_adapter("s3://bucket/adapter")


def test_the_hub_by_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    saved(tmp_path / "snapshot" / "runs" / "best")
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options.get("revision"), sorted(options["allow_patterns"])[0]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    weights = ls.read_adapter("hf://owner/name@v1/runs/best")
    assert weights.path == tmp_path / "snapshot" / "runs" / "best"
    assert asked == [("owner/name", "v1", "runs/best/*/adapter_config.json")]
