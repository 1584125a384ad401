"""A new task inside a fleet's basis: what trains and what does not, and what the fleet keeps."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.errors import BaseMismatchError, ConfigError, LorasmithError
from lorasmith.fleet.subspace import SharedSubspace
from lorasmith.fleet.trainable import SubspaceTrainer
from tests.models import FAMILIES, gpt2, llama, randomise, run

# Fleets of random adapters share little: that they lose much is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.*lose.* more than:UserWarning")

F64 = torch.float64
TARGETS = ["q_proj", "v_proj", "down_proj"]
BASES = ("joint", "share")
FORMS = [("joint", "full"), ("joint", "diagonal"), ("share", "loadings")]
each_basis = pytest.mark.parametrize("basis", BASES)
each_form = pytest.mark.parametrize(("basis", "form"), FORMS)
each_extra = pytest.mark.parametrize("extra", [0, 2], ids=["basis", "extra"])


def member(seed: int, build: Any = llama, **options: Any) -> ls.AdapterWeights:
    model = build()
    options = {"r": 2, "targets": TARGETS, **options}
    adapter = ls.attach(model, ls.LoRAConfig(**options))
    randomise(adapter.parameters(), seed=seed)
    return ls.AdapterWeights.from_model(model)


@pytest.fixture(scope="module")
def members() -> dict[str, ls.AdapterWeights]:
    """Mixed ranks and layers; one of them on the layer of another block alone."""
    made = {f"t{n}": member(n) for n in range(3)}
    made["wide"] = member(7, r=3, alpha=5.0, targets=["q_proj", "layers.1.mlp.down_proj"])
    return made


@pytest.fixture
def fleet(members: dict[str, ls.AdapterWeights]) -> Any:
    def make(basis: str, components: int = 3) -> SharedSubspace:
        return SharedSubspace.from_adapters(members, basis=basis, components=components)  # type: ignore[arg-type]

    return make


def deltas(fleet: SharedSubspace) -> dict[tuple[str, str], Tensor]:
    """(task, layer) → ΔW by the formula U C V + B A, of all that is held."""
    found = {}
    for task, module in itertools.product(fleet.ids, fleet.modules):
        made = fleet.up(module).to(F64) @ fleet.core(task, module).to(F64)
        made = made @ fleet.down(module).to(F64)
        rest = fleet.residual(task, module)
        found[task, module] = made if rest is None else made + rest.delta(F64)
    return found


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    ids = FAMILIES["llama"].batch(seed)["input_ids"]
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def train(model: nn.Module, parameters: Any, steps: int = 6, lr: float = 0.05) -> float:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss(model)
        found.backward()
        optimizer.step()
    return float(loss(model).detach())


# -- the four defects --------------------------------------------------------------------------


@each_form
@each_extra
def test_it_starts_at_zero_exactly_and_moves(fleet: Any, basis: str, form: Any, extra: int) -> None:
    """An orthogonal start that is not zero, and a trainer that moves no parameter."""
    model, batch = llama(), FAMILIES["llama"].batch()
    expected = run(model, batch)
    task = SubspaceTrainer(model, fleet(basis), "new", form=form, extra=extra)
    assert torch.equal(run(model, batch), expected)
    for part in task.adapter.layers().values():
        factors = part.variant.factors(part)
        assert factors is not None
        assert not factors.delta().any()
    first = {n: p.detach().clone() for n, p in task.named_parameters()}
    loss(model).backward()
    zero_start = ("core", "left")
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith(zero_start), name
    train(model, task.parameters())
    assert all(not torch.equal(p, first[n]) for n, p in task.named_parameters())
    assert not torch.equal(run(model, batch), expected)


@each_form
@each_extra
def test_base_and_basis_are_frozen(fleet: Any, basis: str, form: Any, extra: int) -> None:
    """A callback that trains the base: whatever of the model wants a gradient is the task's."""
    model, held = llama(), fleet(basis)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = deltas(held)
    task = SubspaceTrainer(model, held, "new", form=form, extra=extra)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in task.parameters()}
    train(model, trained)
    for module, part in task.adapter.layers().items():
        size = part["V"].shape[0], part["U"].shape[1]
        assert torch.equal(part["V"], held.down(module)[: size[0]])
        assert torch.equal(part["U"], held.up(module)[:, : size[1]])
    after = deltas(held)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    ls.detach(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


@each_form
@each_extra
def test_the_fleet_gets_the_task_and_nobody_else_changes(
    fleet: Any, basis: str, form: Any, extra: int, tmp_path: Path
) -> None:
    """New directions that break the other tasks: they are zero in the others' cores."""
    model, held = llama(), fleet(basis)
    before = deltas(held)
    originals = {m: (held.up(m), held.down(m)) for m in held.modules}
    task = SubspaceTrainer(model, held, "new", form=form, extra=extra)
    train(model, task.parameters())
    wanted = run(model, FAMILIES["llama"].batch()).detach()
    assert task.finish() is held
    assert held.ids[-1] == "new"
    assert held.validate() == []
    after = deltas(held)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-12, rtol=1e-12)
    for module, (up, down) in originals.items():
        assert torch.equal(held.up(module)[:, : up.shape[1]], up)
        assert torch.equal(held.down(module)[: down.shape[0]], down)
        more = extra * held.width
        assert held.up(module).shape[1] == up.shape[1] + more
        assert held.down(module).shape[0] == down.shape[0] + more
    for module, part in task.adapter.layers().items():
        factors = part.variant.factors(part)
        assert factors is not None
        torch.testing.assert_close(after["new", module], factors.delta(F64), atol=1e-5, rtol=1e-4)
    assert held.errors["new"] < 1e-9
    # From its files, and rebuilt as a plain LoRA.
    held.save(tmp_path / "fleet")
    again = SharedSubspace.load(tmp_path / "fleet")
    fresh = llama()
    ls.load(fresh, again.reconstruct("new").save(tmp_path / "new"))
    got = run(fresh, FAMILIES["llama"].batch())
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - run(llama(), FAMILIES["llama"].batch())).abs().max() > 1e-2


@each_form
def test_a_core_finds_its_place_after_others_have_extended_the_basis(
    fleet: Any, basis: str, form: Any
) -> None:
    held = fleet(basis)
    tasks = []
    for n in range(2):
        model = llama()
        tasks.append(SubspaceTrainer(model, held, f"new{n}", form=form, extra=1))
        train(model, tasks[-1].parameters(), steps=3 + n)
    for task in tasks:
        task.finish()
    after = deltas(held)
    for task in tasks:
        for module, part in task.adapter.layers().items():
            factors = part.variant.factors(part)
            assert factors is not None
            wanted = factors.delta(F64)
            torch.testing.assert_close(after[task.task, module], wanted, atol=1e-5, rtol=1e-4)


def test_a_basis_that_has_moved_is_noticed(
    fleet: Any, members: dict[str, ls.AdapterWeights]
) -> None:
    for change in (lambda f: f.absorb(members["t1"], ids=["more"]), lambda f: f.quantize(4)):
        held, model = fleet("joint"), llama()
        task = SubspaceTrainer(model, held, "new")
        train(model, task.parameters(), steps=2)
        try:
            change(held)
        except TypeError:
            held.absorb(members["t1"])
        ids, ranks = held.ids, held.stats().ranks
        with pytest.raises(ConfigError, match="no longer the one"):
            task.finish()
        assert (held.ids, held.stats().ranks) == (ids, ranks)


def test_in_a_quantised_fleet_what_rounding_loses_is_told(fleet: Any) -> None:
    held, model = fleet("joint"), llama()
    held.quantize(8)
    task = SubspaceTrainer(model, held, "new", extra=1)
    train(model, task.parameters())
    task.finish()
    after, gone, whole = deltas(held), 0.0, 0.0
    for module, part in task.adapter.layers().items():
        factors = part.variant.factors(part)
        assert factors is not None
        wanted = factors.delta(F64)
        gone += float((after["new", module] - wanted).square().sum())
        whole += float(wanted.square().sum())
    assert 0 < gone / whole < 1e-2
    assert held.errors["new"] == pytest.approx(gone / whole, rel=0.02)


# -- it learns ---------------------------------------------------------------------------------


@each_basis
def test_it_learns_what_lies_in_the_basis(basis: str) -> None:
    """Teacher: the mean of two members of the fleet. The loadings alone find it."""
    made = {f"t{n}": member(n) for n in range(3)}
    held = SharedSubspace.from_adapters(made, basis=basis, components=8 if basis == "joint" else 2)  # type: ignore[arg-type]
    teacher, model = llama(), llama()
    for name in ("t0", "t1"):
        weights = held.reconstruct(name, "exact")
        with torch.no_grad():
            for module in weights.modules:
                teacher.get_submodule(module).weight += 0.5 * weights.delta(module)
    batches = [FAMILIES["llama"].batch(n) for n in range(4)]
    targets = [run(teacher, b).detach() for b in batches]

    def gap() -> Tensor:
        return sum(
            ((run(model, b) - t).pow(2).mean() for b, t in zip(batches, targets, strict=True)),
            torch.zeros(()),
        )

    start = float(gap().detach())
    task = SubspaceTrainer(model, held, "new")
    optimizer = torch.optim.Adam(task.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        found = gap()
        found.backward()
        optimizer.step()
    assert float(gap().detach()) < (0.02 if basis == "joint" else 0.5) * start


@each_form
@each_extra
def test_the_loss_falls_well_under_that_of_the_base(
    fleet: Any, basis: str, form: Any, extra: int
) -> None:
    model = llama()
    base = float(loss(model).detach())
    task = SubspaceTrainer(model, fleet(basis, 4), "new", form=form, extra=extra)
    assert train(model, task.parameters(), steps=60, lr=0.1) < 0.85 * base


# -- going on, files, PEFT ---------------------------------------------------------------------


@each_form
@each_extra
def test_resuming_is_exact_to_the_bit(
    fleet: Any, basis: str, form: Any, extra: int, tmp_path: Path
) -> None:
    held = fleet(basis)

    def state(model: nn.Module, task: Any, optimizer: Any) -> Any:
        return copy.deepcopy((task.adapter.state_dict(), optimizer.state_dict()))

    def steps(model: nn.Module, optimizer: Any, count: int, first: int) -> None:
        for n in range(first, first + count):
            optimizer.zero_grad()
            loss(model, n).backward()
            optimizer.step()

    model = llama()
    task = SubspaceTrainer(model, held, "new", form=form, extra=extra)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.03)
    steps(model, optimizer, 3, 0)
    tensors, moments = state(model, task, optimizer)
    folder = ls.save(model, tmp_path / "half")
    steps(model, optimizer, 3, 3)
    wanted = {n: p.detach().clone() for n, p in task.named_parameters()}
    # Anew in the fleet and the state put in; and from the saved adapter, without the fleet.
    for source in ("fleet", "files"):
        other = llama()
        if source == "fleet":
            again = SubspaceTrainer(other, held, "new", form=form, extra=extra).adapter
            again.load_state_dict(copy.deepcopy(tensors))
        else:
            again = ls.load(other, folder, trainable=True)
        resumed = torch.optim.AdamW(again.parameters(), lr=0.03)
        resumed.load_state_dict(copy.deepcopy(moments))
        steps(other, resumed, 3, 3)
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, wanted[name]), (source, name)


@each_form
@each_extra
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_files_give_the_same_logits_here_and_in_peft(
    build: Any, basis: str, form: Any, extra: int, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    targets = TARGETS if build is llama else ["c_attn", "c_fc"]
    made = {f"t{n}": member(n, build, targets=targets, r=2 + n) for n in range(3)}
    held = SharedSubspace.from_adapters(made, basis=basis, error=0.3)  # type: ignore[arg-type]
    model, batch = build(), FAMILIES["llama"].batch()
    task = SubspaceTrainer(model, held, "new", form=form, extra=extra)
    randomise(task.parameters(), scale=0.5)
    wanted = run(model, batch).detach()
    folder = ls.save(model, tmp_path / "a")
    fresh = build()
    loaded = ls.load(fresh, folder)
    assert loaded.config == task.adapter.config
    assert torch.equal(run(fresh, batch), wanted)
    assert (wanted - run(build(), batch)).abs().max() > 1e-2
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(build(), folder).eval()
    assert not [w for w in seen if issubclass(w.category, UserWarning)]
    torch.testing.assert_close(run(theirs, batch), wanted, atol=1e-5, rtol=1e-5)


def test_modules_to_save_are_carried(fleet: Any, tmp_path: Path) -> None:
    model, held = llama(tie_word_embeddings=False), None
    made = {}
    for n in range(2):
        other = llama(tie_word_embeddings=False)
        randomise(ls.attach(other, ls.LoRAConfig(r=2, targets="q_proj")).parameters(), seed=n)
        made[f"t{n}"] = ls.AdapterWeights.from_model(other)
    held = SharedSubspace.from_adapters(made, components=2)
    task = SubspaceTrainer(model, held, "new", modules_to_save=["lm_head"])
    train(model, task.parameters(), steps=2)
    wanted = run(model, FAMILIES["llama"].batch()).detach()
    task.finish()
    fresh = llama(tie_word_embeddings=False)
    ls.load(fresh, held.reconstruct("new").save(tmp_path / "new"))
    got = run(fresh, FAMILIES["llama"].batch())
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_hf_trainer_and_a_dynamic(fleet: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, held = llama(), fleet("share")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    task = SubspaceTrainer(model, held, "new", extra=1)
    first = {n: p.detach().clone() for n, p in task.named_parameters()}
    ids = FAMILIES["llama"].batch()["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert all(not torch.equal(p, first[n]) for n, p in task.named_parameters())
    task.finish()
    ls.detach(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


# -- what it says and what it refuses ----------------------------------------------------------


def test_counts(fleet: Any) -> None:
    for basis, form, extra in (*((b, f, 0) for b, f in FORMS), ("joint", "full", 2)):
        held, model = fleet(basis), llama()
        task = SubspaceTrainer(model, held, "new", form=form, extra=extra)
        wanted = 0
        for module in held.modules:
            (d_out, outer), (inner, d_in) = held.up(module).shape, held.down(module).shape
            if form == "full":
                wanted += (outer + extra) * (inner + extra) + extra * (d_in + d_out)
            elif form == "diagonal":
                wanted += min(outer, inner)
            else:
                wanted += outer // held.width + inner // held.width
        count = task.parameter_count(lora_rank=4)
        assert count.trained == wanted == sum(p.numel() for p in task.parameters())
        sizes = [held.up(m).shape[0] + held.down(m).shape[1] for m in held.modules]
        assert (count.lora, count.layers) == (4 * sum(sizes), len(sizes))
        assert count.to_dict()["ratio"] == pytest.approx(count.lora / wanted)
        assert f"{wanted:,} parameters" in repr(task)
        ls.detach(model)
        assert "detached" in repr(task)


def test_some_layers(fleet: Any) -> None:
    model = llama()
    task = SubspaceTrainer(model, fleet("joint"), "a", modules=["v_proj"], layers=[1])
    assert task.adapter.targets == ("model.layers.1.self_attn.v_proj",)
    ls.detach(model)
    with pytest.raises(ConfigError) as caught:
        SubspaceTrainer(model, fleet("joint"), "a", modules=["up_proj"])
    assert caught.value.key == "modules"


def _refused() -> Iterator[Any]:
    wrong = dict
    yield wrong(task="t0"), ConfigError, "task"
    yield wrong(task=""), LorasmithError, None
    yield wrong(form="loadings"), ConfigError, "form"
    yield wrong(extra=16), ConfigError, "extra"
    yield wrong(extra=-1), ConfigError, "extra"
    yield wrong(name="a b"), ConfigError, "name"


@pytest.mark.parametrize(("options", "kind", "key"), list(_refused()))
def test_refusals_leave_the_model(fleet: Any, options: Any, kind: Any, key: Any) -> None:
    model, held = llama(), fleet("joint")
    with pytest.raises(kind) as caught:
        SubspaceTrainer(model, held, **{"task": "new", **options})
    assert key is None or caught.value.key == key
    assert not ls.attached(model)
    assert all(p.requires_grad for p in model.parameters())
    assert held.ids == ("t0", "t1", "t2", "wide")


def test_other_base_models_are_refused(fleet: Any) -> None:
    for other in (llama(seed=1), llama(layers=1), llama(hidden_size=32)):
        with pytest.raises(BaseMismatchError):
            SubspaceTrainer(other, fleet("joint"), "new")
    for other in (llama(layers=1), llama(hidden_size=32)):
        with pytest.raises(BaseMismatchError):
            SubspaceTrainer(other, fleet("joint"), "new", allow_base_mismatch=True)
    SubspaceTrainer(llama(seed=1), fleet("joint"), "new", allow_base_mismatch=True)


def test_a_task_is_finished_once(fleet: Any) -> None:
    model, held = llama(), fleet("joint")
    task = SubspaceTrainer(model, held, "new", extra=1)
    task.finish()
    ranks = held.stats().ranks
    with pytest.raises(ConfigError, match="already"):
        task.finish()
    assert held.stats().ranks == ranks


# -- real adapters -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_held_out_task_on_real_adapters(zoo: Path) -> None:
    """Numbers in Spanish, in the basis of the zoo without that task: some steps, some gain."""
    models = pytest.importorskip("lorasmith.training.models")
    builtin = pytest.importorskip("lorasmith.training.builtin")
    names = ("numbers-en-s0", "numbers-en-s1", "dates-en-s0", "e2e-s0", "gsm8k-s0", "mrpc-s0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = SharedSubspace.from_adapters([zoo / n for n in names], basis="share", components=5)
    model, tokenizer = models.load_model("smollm2", dtype="float32", device="cpu")
    rows = list(builtin.load_builtin("numbers-es", "train", 16))

    def measure(some: list[Any]) -> Tensor:
        total = torch.zeros(())
        for row in some:
            text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([whole])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            total = total + model(input_ids=ids, labels=labels).loss
        return total / len(some)

    with torch.no_grad():
        before = float(measure(rows[12:]))
    task = SubspaceTrainer(model, held, "numbers-es")
    assert task.parameter_count().ratio > 100
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(6):
        optimizer.zero_grad()
        measure(rows[2 * step : 2 * step + 2]).backward()
        optimizer.step()
    with torch.no_grad():
        # Measured: 0.78; on three other sets of rows 0.69, 0.75 and 0.78.
        assert float(measure(rows[12:])) < 0.9 * before
    assert task.finish().ids[-1] == "numbers-es"


# -- several processes -------------------------------------------------------------------------


def _steps(rank: int, world: int, held: SharedSubspace, form: Any) -> dict[str, Tensor]:
    """What three steps on this process's share of the rows train."""
    model: Any = llama().train()
    task = SubspaceTrainer(model, held, "new", form=form, extra=1)
    outer = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(task.parameters(), lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(0, 32, (8, 7), generator=generator)
        mine = ids[rank * 8 // world : (rank + 1) * 8 // world]
        outer(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {n: p.detach().clone() for n, p in task.named_parameters()}
    for (name, module), value in deltas(task.finish()).items():
        found[f"finished {name} {module}"] = value
    return found


def _process(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {
        form: _steps(rank, 2, SharedSubspace.load(f"{folder}/{basis}"), form)
        for basis, form in FORMS
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_train_what_one_does(fleet: Any, tmp_path: Path) -> None:
    """DDP over gloo: halves of every batch make the run with the whole one, on both ranks."""
    import socket

    for basis in BASES:
        fleet(basis).save(tmp_path / basis)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for basis, form in FORMS:
        one = _steps(0, 1, SharedSubspace.load(tmp_path / basis), form)
        assert first[form].keys() == second[form].keys() == one.keys()
        for name, value in one.items():
            assert torch.equal(first[form][name], second[form][name]), name
            whole = float(value.norm())
            assert whole or name.startswith("finished "), name  # a task has not every layer
            assert float((first[form][name] - value).norm()) <= 1e-4 * whole, name
