"""Serving a fleet from its shared basis: every row as if its task were alone in PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith import errors
from lorasmith.fleet.multitask import MultiTaskModel
from lorasmith.fleet.resident import Resident
from lorasmith.fleet.subspace import SharedSubspace
from tests.models import gpt2, llama, randomise

# PEFT 0.21.2 asks Transformers 5 for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BUILD: Mapping[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}
#: Task → what PEFT is told.
TASKS: Mapping[str, dict[str, Any]] = {
    "team/a": {"r": 4, "lora_alpha": 8},
    "team_a": {"r": 2, "lora_alpha": 2},
    "c": {"r": 4, "lora_alpha": 4, "use_rslora": True},
}
TOLERANCE = 1e-5


def _write(
    folder: Path, family: str, tasks: Mapping[str, dict[str, Any]] = TASKS
) -> dict[str, Path]:
    build, targets = BUILD[family]
    written = {}
    for number, (task, options) in enumerate(tasks.items()):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=options.get("target_modules", targets),
            fan_in_fan_out=family == "gpt2",
            **{k: v for k, v in options.items() if k != "target_modules"},
        )
        model = peft.get_peft_model(build(), config)
        randomise((p for n, p in model.named_parameters() if "lora_" in n), 0.3, seed=number + 1)
        written[task] = folder / f"adapter{number}"
        model.save_pretrained(written[task])
    return written


def _fleet(folder: Path, family: str, **options: Any) -> SharedSubspace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the budget: these fleets are meant to lose
        return SharedSubspace.from_adapters(_write(folder, family), **options)


def _batch(rows: int, seed: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the left."""
    tokens = torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row in range(1, rows, 2):
        mask[row, : row % 3 + 1] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def _alone(fleet: SharedSubspace, family: str, task: str | None, folder: Path) -> Any:
    """The model with one task, as PEFT loads what the fleet gives back."""
    build, _ = BUILD[family]
    if task is None:
        return build()
    target = folder / f"again{fleet.ids.index(task)}"
    if not target.exists():
        fleet.reconstruct(task, "exact", dtype=torch.float32).save(target)
    return peft.PeftModel.from_pretrained(build(), target).eval()


def _close(got: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all()
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, error


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"components": 3},
        {"components": 2, "core": "diagonal"},
        {"error": 1e-9},
        {"basis": "share", "components": 1},
    ],
    ids=["joint", "diagonal", "exact", "share"],
)
@pytest.mark.parametrize("bits", [None, 8, "nf4"])
def test_each_row_is_its_task_alone_in_peft(
    tmp_path: Path, family: str, options: dict[str, Any], bits: Any
) -> None:
    fleet = _fleet(tmp_path, family, **options)
    if bits is not None:
        fleet.quantize(bits)
    model = BUILD[family][0]()
    tasks = ["team/a", None, "c", "team_a", "c", "team/a"]
    batch = _batch(len(tasks))
    bare = model(**batch).logits
    served = MultiTaskModel(model, fleet)
    with torch.no_grad():
        mixed = served(**batch, tasks=tasks).logits
        again = served(**batch).logits
        alone = {t: _alone(fleet, family, t, tmp_path)(**batch).logits for t in set(tasks)}
        for row, task in enumerate(tasks):
            real = batch["attention_mask"][row].bool()
            _close(mixed[row][real], alone[task][row][real])
        for task in ("team/a", "team_a", "c"):
            _close(served(**batch, tasks=task).logits, alone[task])
            assert (alone[task] - bare).abs().max() > 0.05  # it does act
    assert torch.equal(again, bare)  # what acted before, acts again


@pytest.mark.parametrize(
    "options",
    [{"components": 3}, {"components": 2, "core": "diagonal"}, {"error": 1e-9}],
    ids=["joint", "diagonal", "exact"],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_short_and_long_way_agree(
    tmp_path: Path, options: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients a bare core is added in place; with them, by the general formula."""
    from lorasmith.fleet import serving

    calls: list[tuple[int, ...]] = []

    def added(acting: Any, x: Tensor, *rest: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return short(acting, x, *rest)

    short = serving._added
    monkeypatch.setattr(serving, "_added", added)
    fleet = _fleet(tmp_path, "llama", **options)
    served = MultiTaskModel(llama(), fleet)
    batch = _batch(4, length=tokens) if tokens > 4 else {"input_ids": torch.arange(4)[:, None]}
    rows: Any
    for rows in (["c", None, "team/a", "c"], ["c", "team/a"], "team_a", {"c": 0.5, "team/a": -1.0}):
        calls.clear()
        long = served(**batch, tasks=rows).logits.detach()
        assert not calls
        with torch.no_grad():
            _close(served(**batch, tasks=rows).logits, long)
            assert calls
            calls.clear()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                served(**batch, tasks=rows)
            assert not calls  # there is something to cast
        with torch.inference_mode():
            _close(served(**batch, tasks=rows).logits, long)
    residual = _write(tmp_path / "more", "llama", {"d": {"r": 4, "lora_alpha": 4}})["d"]
    fleet.add(residual, "d", error=0.01)
    with torch.no_grad():
        calls.clear()
        served(**batch, tasks="d")
    # Residuals take the long way.
    assert len(calls) == sum(not len(fleet.code("d", m).residual_up) for m in fleet.modules)


@pytest.mark.parametrize("quantised", [False, True])
def test_residuals_beside_the_cores(tmp_path: Path, quantised: bool) -> None:
    paths = _write(tmp_path, "llama")
    fleet = SharedSubspace.from_adapters({"c": paths["c"]}, error=1e-6)
    for task in ("team/a", "team_a"):
        assert any(fleet.add(paths[task], task, error=1e-6).residual_rank.values())
    if quantised:
        fleet.quantize(8)
    served = MultiTaskModel(llama(), fleet)
    tasks = ["team_a", "c", "team/a", None, "team/a"]
    batch = _batch(len(tasks))
    alone = {t: _alone(fleet, "llama", t, tmp_path) for t in set(tasks)}
    with torch.no_grad():
        for wide in (64, 0):  # as one product, and on each rank's own rows
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("lorasmith.fleet.serving._WIDE", wide)
                mixed = served(**batch, tasks=tasks).logits
            for row, task in enumerate(tasks):
                real = batch["attention_mask"][row].bool()
                _close(mixed[row][real], alone[task](**batch).logits[row][real])
    if not quantised:  # and within the budget it is the original
        with torch.no_grad():
            original = peft.PeftModel.from_pretrained(llama(), paths["team/a"]).eval()(**batch)
            got = served(**batch, tasks="team/a").logits
        assert (got - original.logits).norm() < 1e-2 * original.logits.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("basis", ["joint", "share"])
def test_generation_by_row_with_padding_and_beams(tmp_path: Path, family: str, basis: Any) -> None:
    fleet = _fleet(tmp_path, family, basis=basis, components=2)
    served = MultiTaskModel(BUILD[family][0](), fleet)
    tasks = ["c", None, "team/a", "team_a"]
    batch = _batch(len(tasks))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        written = served.generate(batch, tasks=tasks, num_beams=beams, **settings)
        for row, task in enumerate(tasks):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            model = _alone(fleet, family, task, tmp_path)
            expected = model.generate(**one, num_beams=beams, **settings)
            assert torch.equal(written[row], expected[0]), (beams, task)
    alone = served.generate(batch, tasks="c", **settings)
    assert not torch.equal(alone[1], served.generate(batch, tasks=tasks, **settings)[1])


@pytest.mark.parametrize("basis", ["joint", "share"])
def test_blends_are_linear_in_the_deltas(tmp_path: Path, basis: Any) -> None:
    fleet = _fleet(tmp_path, "llama", basis=basis, components=2)
    paths = _write(tmp_path / "more", "llama", {"d": {"r": 4, "lora_alpha": 4}})
    fleet.add(paths["d"], "d", error=0.01)  # with a residual
    blends = [{"team/a": 0.5, "d": -0.75}, {"c": 1.0, "d": 2.0}, None, "d"]
    batch = _batch(len(blends))
    served = MultiTaskModel(llama(), fleet)

    def dense(blend: Any, row: int) -> Tensor:
        model = llama()
        with torch.no_grad():
            for task, weight in (blend if isinstance(blend, dict) else {blend: 1.0}).items():
                if task is None:
                    continue
                for module, factors in fleet.factors(task).items():
                    layer = model.get_submodule(module)
                    layer.weight += weight * factors.delta(torch.float64).float()
            logits: Tensor = model(**batch).logits
        return logits[row][batch["attention_mask"][row].bool()]

    with torch.no_grad():
        mixed = served(**batch, tasks=blends).logits
        for row, blend in enumerate(blends):
            real = batch["attention_mask"][row].bool()
            _close(mixed[row][real], dense(blend, row))
            _close(served(**batch, tasks=blend).logits[row][real], dense(blend, row))


def test_dora_and_its_blends(tmp_path: Path) -> None:
    tasks = {
        "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
        "plain": {"r": 2, "lora_alpha": 4},
    }
    for family in ("llama", "gpt2"):
        folder = tmp_path / family
        paths = _write(folder, family, tasks)
        fleet = SharedSubspace.from_adapters(paths, error=0.2)
        model = BUILD[family][0]()
        served = MultiTaskModel(model, fleet)
        rows = ["plain", "dora", None, "dora"]
        batch = _batch(len(rows))
        with torch.no_grad():
            mixed = served(**batch, tasks=rows).logits
            for row, task in enumerate(rows):
                real = batch["attention_mask"][row].bool()
                alone = _alone(fleet, family, task, folder)(**batch).logits
                _close(mixed[row][real], alone[row][real])
            _close(
                served(**batch, tasks="dora").logits,
                _alone(fleet, family, "dora", folder)(**batch).logits,
            )
        # Σ w (W_i − W), W_i as PEFT merges them.
        blend = {"dora": 0.5, "plain": 0.75}
        expected = BUILD[family][0]()
        with torch.no_grad():
            for task, weight in blend.items():
                merged = _alone(fleet, family, task, folder).merge_and_unload()
                for module in fleet.modules:
                    start = BUILD[family][0]().get_submodule(module).weight
                    change = merged.get_submodule(module).weight - start
                    expected.get_submodule(module).weight += weight * change
                for module, delta in served.delta_state_dict(task).items():
                    start = BUILD[family][0]().get_submodule(module).weight
                    change = merged.get_submodule(module).weight - start
                    torch.testing.assert_close(
                        delta, change.T if family == "gpt2" else change, atol=1e-5, rtol=1e-4
                    )
            logits = expected(**batch).logits
            got = served(**batch, tasks=blend).logits
            _close(got, logits)
            by_row = served(**batch, tasks=[blend, None, blend, "dora"]).logits
            _close(by_row[0], logits[0])
            _close(by_row[2], logits[2])


def test_dora_norms_follow_the_base_weights(tmp_path: Path) -> None:
    paths = _write(tmp_path, "llama", {"dora": {"r": 4, "use_dora": True}})
    fleet = SharedSubspace.from_adapters(paths, error=0.1)
    model = llama()
    served = MultiTaskModel(model, fleet)
    batch = _batch(2)
    with torch.no_grad():
        served(**batch, tasks="dora")
        for module in fleet.modules:
            model.get_submodule(module).weight.mul_(1.5)
        got = served(**batch, tasks="dora").logits
        other = llama()
        for module in fleet.modules:
            other.get_submodule(module).weight.mul_(1.5)
        expected = peft.PeftModel.from_pretrained(other, _saved(fleet, "dora", tmp_path)).eval()
        expected = expected(**batch).logits
    _close(got, expected)


def test_modules_to_save_by_row(tmp_path: Path) -> None:
    build = lambda: llama(tie_word_embeddings=False)  # noqa: E731
    paths = {}
    for number, options in enumerate([{"modules_to_save": ["lm_head"]}, {}]):
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(build(), config)
        randomise((p for p in model.parameters() if p.requires_grad), 0.3, seed=number)
        paths[f"t.{number}"] = tmp_path / str(number)
        model.save_pretrained(paths[f"t.{number}"])
    fleet = SharedSubspace.from_adapters(paths, error=0.1)
    paths = {task: _saved(fleet, task, tmp_path) for task in paths}
    model = build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    served = MultiTaskModel(model, fleet)
    rows = ["t.0", None, "t.1", "t.0"]
    batch = _batch(len(rows))
    with torch.no_grad():
        mixed = served(**batch, tasks=rows).logits
        bare = build()(**batch).logits
        for row, task in enumerate(rows):
            real = batch["attention_mask"][row].bool()
            alone = (
                bare
                if task is None
                else peft.PeftModel.from_pretrained(build(), paths[task]).eval()(**batch).logits
            )
            _close(mixed[row][real], alone[row][real])
        with pytest.raises(errors.ConfigError, match="whole modules"):
            served.use([{"t.0": 0.5}] * 4)
        half = served(**batch, tasks={"t.0": 0.0, "t.1": 1.0}).logits
        _close(half, peft.PeftModel.from_pretrained(build(), paths["t.1"]).eval()(**batch).logits)
        served.detach()
        assert torch.equal(model(**batch).logits, bare)
    assert {n for n, _ in model.named_parameters()} == set(before)


def test_nothing_matched_is_an_error(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, "gpt2", components=2)
    with pytest.raises(errors.TargetError, match="0 of them"):
        MultiTaskModel(llama(), fleet)
    inner: Any = gpt2()
    with pytest.raises(errors.TargetError):  # another prefix: vLoRA would do nothing, in silence
        MultiTaskModel(inner.transformer, fleet)
    wide = _fleet(tmp_path / "l", "llama", components=2)
    with pytest.raises(errors.BaseMismatchError):
        MultiTaskModel(llama(hidden_size=32, head_dim=4), wide)


def test_unknown_tasks_rows_and_choices(tmp_path: Path) -> None:
    served = MultiTaskModel(llama(), _fleet(tmp_path, "llama", components=2))
    batch = _batch(2)
    with pytest.raises(errors.UnknownNameError, match="nope"):
        served.use("nope")
    with pytest.raises(errors.ConfigError, match="not as many tasks"):
        served.generate(batch, tasks=["c"], max_new_tokens=2)
    with pytest.raises(errors.AttachError, match="rows"):
        served(**batch, tasks=["c", "c", None])
    for bad in ([], [3], {"c": float("nan")}, 7):
        with pytest.raises(errors.ConfigError):
            served.use(bad)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match="tokenizer"):
        served.generate(["text"], tasks=["c"], tokenizer=None)
    with pytest.raises(errors.ConfigError):
        MultiTaskModel(llama(), served.fleet, budget_bytes=0)
    assert served.active is None
    with pytest.raises(errors.UnknownNameError, match="fleet"):
        ls.save(served.model, tmp_path / "out", name="fleet")


def test_use_is_a_context_and_detaching_leaves_no_trace(tmp_path: Path) -> None:
    model = llama()
    batch = _batch(2)
    bare = model(**batch).logits
    modules = [n for n, _ in model.named_modules()]
    state = set(model.state_dict())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    served = MultiTaskModel(model, _fleet(tmp_path, "llama", components=2))
    assert set(model.state_dict()) == state
    served.use("c")

    def active() -> object:
        return served.active

    def fail() -> None:
        with served.use(["team/a", None]):
            assert active() == ["team/a", None]
            model(**_batch(3))  # not two rows

    with served.use({"c": 0.5}):
        assert active() == {"c": 0.5}
        with pytest.raises(errors.AttachError):
            fail()
        assert active() == {"c": 0.5}
    assert active() == "c"
    served.clear()
    assert torch.equal(model(**batch).logits, bare)
    served.use("c")
    served.detach()
    served.detach()
    assert not served.attached
    assert torch.equal(model(**batch).logits, bare)
    assert [n for n, _ in model.named_modules()] == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(errors.AttachError, match="detached"):
        served.use("c")


def test_fuse_and_unfuse(tmp_path: Path) -> None:
    tasks = {**TASKS, "dora": {"r": 2, "use_dora": True}}
    for family in ("llama", "gpt2"):
        folder = tmp_path / family
        fleet = SharedSubspace.from_adapters(_write(folder, family, tasks), error=0.05)
        model = BUILD[family][0]()
        before = {n: p.clone() for n, p in model.named_parameters()}
        served = MultiTaskModel(model, fleet)
        batch = _batch(3)

        def fused(served: MultiTaskModel = served) -> object:
            return served.fused

        for choice in ("c", "dora", {"c": 0.5, "dora": 0.5}):
            with torch.no_grad():
                expected = served(**batch, tasks=choice).logits
                report = served.fuse(choice)
                assert report.layers
                assert fused() is not None
                _close(model(**batch).logits, expected)
                _close(served(**batch, tasks=choice).logits, expected)
                with pytest.raises(errors.AttachError):
                    served.use("team/a")
                served.unfuse()
                assert fused() is None
                _close(served(**batch).logits, expected)
        for name, value in before.items():
            assert torch.equal(model.get_parameter(name), value)
        served.use(["c", None, "dora"])
        with pytest.raises(errors.FuseError):
            served.fuse()
        assert served.active == ["c", None, "dora"]
        served.fuse("c")
        served.detach()
        for name, value in before.items():
            assert torch.equal(model.get_parameter(name), value)


def test_switching_makes_nothing_of_a_weights_size(tmp_path: Path) -> None:
    """O(k): counted over every operation that PyTorch runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    build = lambda: llama(hidden_size=128, intermediate_size=192)  # noqa: E731
    for number in range(4):
        model = peft.get_peft_model(
            build(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
        )
        randomise((p for n, p in model.named_parameters() if "lora_" in n), seed=number)
        model.save_pretrained(tmp_path / str(number))
    fleet = SharedSubspace.from_adapters([tmp_path / str(n) for n in range(4)], error=0.01)
    fleet.quantize(8)
    served = MultiTaskModel(build(), fleet)
    largest = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in [*args, *(out if isinstance(out, tuple) else (out,))]:
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    with Count():
        for choice in ("0", {"1": 0.5, "2": 0.5}, ["0", "3", None, "2"]):
            served.use(choice)
    assert 0 < largest <= 4 * 4 * 8 * 8 < 128 * 128, largest


def test_the_resident_set_keeps_to_its_budget(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, "llama", components=3)
    one = MultiTaskModel(llama(), fleet)
    one.use("c")
    size = one.stats().resident.nbytes
    assert size > 0
    served = MultiTaskModel(llama(), fleet, budget_bytes=2 * size)
    batch = _batch(3)
    for task in ("c", "team/a", "c", "team_a", "team/a"):
        served.use(task)
        assert served.stats().resident.nbytes <= 2 * size
    stats = served.stats().resident
    # c, a: new; c: there; team_a: new, a goes; a: new again, c goes.
    assert (stats.hits, stats.misses, stats.evictions) == (1, 4, 2)
    assert stats.tasks == ("team_a", "team/a")
    assert stats.hit_rate == 0.2
    # More at once than fit still act, and right.
    tight = MultiTaskModel(llama(), fleet, budget_bytes=1)
    rows = ["c", "team/a", "team_a"]
    with torch.no_grad():
        torch.testing.assert_close(
            tight(**batch, tasks=rows).logits, served(**batch, tasks=rows).logits
        )
    assert tight.stats().resident.nbytes == 0
    assert tight.stats().to_dict()["resident"]["evictions"] == 3


def test_resident_forgets_what_no_longer_holds() -> None:
    resident = Resident(lambda task: {})
    resident.get("a")
    resident.get("a", fresh=lambda pieces: False)
    assert (resident.stats.hits, resident.stats.misses) == (0, 2)


def test_torch_compile_makes_one_graph_and_does_not_recompile(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, "llama", components=2)
    model = llama()
    served = MultiTaskModel(model, fleet)
    batch = _batch(3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()  # type: ignore[attr-defined]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    choices: list[list[str | None]] = [["c", "team/a", None], ["team_a", "c", None]]
    with torch.no_grad():
        for rows in choices:
            expected = served(**batch, tasks=rows).logits
            with served.use(rows):
                got = compiled(**batch, use_cache=False).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def test_gradients_pass_to_the_input(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, "llama", components=2)
    model = llama()
    served = MultiTaskModel(model, fleet)
    alone = _alone(fleet, "llama", "c", tmp_path)
    for threshold in (10**9, 1):  # plain operations, and the engine's own functions
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorasmith.core.lowrank.SMALL", threshold)
            embedded = torch.randn(2, 8, 16, requires_grad=True)
            with served.use(["c", None]):
                model(inputs_embeds=embedded).logits[0].square().sum().backward()
            mine, embedded.grad = embedded.grad, None
            alone(inputs_embeds=embedded).logits[0].square().sum().backward()
            assert mine is not None
            torch.testing.assert_close(mine, embedded.grad, atol=1e-4, rtol=1e-3)


def test_copies_dtypes_and_devices_follow_the_model(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, "llama", components=2)
    model = llama().to(torch.bfloat16)
    served = MultiTaskModel(model, fleet)
    assert served.stats().basis == sum(
        2 * (fleet.up(m).numel() + fleet.down(m).numel()) for m in fleet.modules
    )
    batch = _batch(2)
    with torch.no_grad(), served.use(["c", None]):
        logits = model(**batch).logits
        assert logits.dtype == torch.bfloat16
        reference = MultiTaskModel(llama(), fleet)(**batch, tasks=["c", None]).logits
        error = (logits.float() - reference).norm() / reference.norm()
        assert error < 0.03
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch).logits, logits)


def test_from_a_directory_and_from_adapters(tmp_path: Path) -> None:
    paths = _write(tmp_path, "llama")
    fleet = SharedSubspace.from_adapters(paths, error=0.01)
    fleet.save(tmp_path / "fleet")
    batch = _batch(2)
    with torch.no_grad():
        loaded = MultiTaskModel(llama(), tmp_path / "fleet")(**batch, tasks=["c", None]).logits
        expected = MultiTaskModel(llama(), fleet)(**batch, tasks=["c", None]).logits
        assert torch.equal(loaded, expected)
        exact = MultiTaskModel(llama(), paths)
        for task, path in paths.items():
            alone = peft.PeftModel.from_pretrained(llama(), path).eval()
            _close(exact(**batch, tasks=task).logits, alone(**batch).logits)
    exact.adapter("c").save(tmp_path / "c")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "c").eval()
        _close(again(**batch).logits, exact(**batch, tasks="c").logits)
    with pytest.raises(errors.ConfigError):
        MultiTaskModel(llama(), 3)  # type: ignore[arg-type]


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = llama()
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters())
    ls.save(model, tmp_path / "own")  # with a fingerprint
    fleet = SharedSubspace.from_adapters([tmp_path / "own"])
    MultiTaskModel(llama(), fleet)
    with pytest.raises(errors.BaseMismatchError):
        MultiTaskModel(llama(seed=1), fleet)
    MultiTaskModel(llama(seed=1), fleet, allow_base_mismatch=True)


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
def test_embedding_adapters_are_refused_with_the_reason(tmp_path: Path) -> None:
    paths = _write(tmp_path, "llama", {"e": {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}})
    fleet = SharedSubspace.from_adapters(paths)
    with pytest.raises(errors.UnsupportedFeatureError, match="embedding"):
        MultiTaskModel(llama(), fleet)


def test_a_quantised_base(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def quantised() -> nn.Module:
        model = llama()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4"
                )
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, new.to("cpu"))
        return model

    tasks = {"dora": {"r": 2, "use_dora": True}, "plain": {"r": 2}}
    fleet = SharedSubspace.from_adapters(_write(tmp_path, "llama", tasks), error=0.1)
    batch = _batch(3)
    model = quantised()
    served = MultiTaskModel(model, fleet)
    with torch.no_grad():
        mixed = served(**batch, tasks=["plain", None, "dora"]).logits
        bare = quantised()(**batch).logits
        for task, row in (("plain", 0), ("dora", 2)):
            fresh = quantised()
            ls.load(fresh, _saved(fleet, task, tmp_path), dequantize=True)
            _close(mixed[row], fresh(**batch).logits[row])
        real = batch["attention_mask"][1].bool()
        _close(mixed[1][real], bare[1][real])


def _saved(fleet: SharedSubspace, task: str, folder: Path) -> Path:
    fleet.reconstruct(task, "exact", dtype=torch.float32).save(folder / f"{task}-saved")
    return folder / f"{task}-saved"


@pytest.mark.filterwarnings("ignore:The fleet names", "ignore:The adapter names")
def test_the_zoo_on_its_model(zoo: Path, tmp_path: Path) -> None:
    """Real adapters of mixed ranks, scalings and dtypes, a DoRA among them, one of them added."""
    from lorasmith.training.models import load_model

    try:
        model, _ = load_model("smollm2", dtype="float32", device="cpu")
    except errors.ModelError as error:
        pytest.skip(str(error))
    names = ["e2e-dora", "mrpc-rankpattern", "dates-en-r4"]
    fleet = SharedSubspace.from_adapters([zoo / n for n in names], error=0.05)
    fleet.add(zoo / "numbers-en-rslora-r16", error=0.05)
    fleet.quantize(8)
    rows = ["mrpc-rankpattern", None, "numbers-en-rslora-r16", "e2e-dora", "dates-en-r4"]
    tokens = torch.randint(100, 40000, (len(rows), 6), generator=torch.Generator().manual_seed(0))
    served = MultiTaskModel(model, fleet)
    with torch.no_grad():
        mixed = served(tokens, tasks=rows).logits
        served.detach()
        expected = {1: model(tokens[1:2]).logits}
        theirs: Any = None
        for row, task in enumerate(rows):
            if task is None:
                continue
            path = _saved(fleet, task, tmp_path)
            if theirs is None:
                theirs = peft.PeftModel.from_pretrained(model, path, adapter_name=str(row))
            else:
                theirs.load_adapter(path, adapter_name=str(row))
            theirs.eval().set_adapter(str(row))
            expected[row] = theirs(tokens[row : row + 1]).logits
    for row, logits in expected.items():
        _close(mixed[row], logits[0])
        if row != 1:
            assert (logits[0] - mixed[1]).abs().max() > 0.1
