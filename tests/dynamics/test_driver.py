"""The driver: rules see every step once, in any loop, and their state is in every checkpoint."""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.dynamics import Dynamic, Site, Step, find_sites
from lorasmith.errors import ConfigError, LorasmithError, TrainingError, UnknownNameError
from tests.models import distilbert_classifier, gpt2, llama, mlp


class Watch(Dynamic):
    """Notes what it is told."""

    name = "watch"

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.seen: list[Step] = []
        self.rates: list[float] = []
        self.after = 0
        self.evaluations: list[Mapping[str, float]] = []
        self.sites: Sequence[Site] = ()
        self.selected: list[Sequence[str]] = []
        self.counter = torch.zeros(2)
        self.closed = False
        self.needs = frozenset(options.get("needs", ()))

    def on_sites(self, sites: Sequence[Site]) -> None:
        self.sites = sites

    def select(self, tasks: Sequence[str]) -> None:
        self.selected.append(tasks)

    def before_step(self, step: Step) -> None:
        self.seen.append(step)
        if "factor" in self.options:
            step.scale_learning_rate(self.options["factor"])
        if self.options.get("skip"):
            step.skip()
        if "gradient" in self.options:
            for site in self.sites:
                step.add_gradient(site.B, torch.full_like(site.B, self.options["gradient"]))

    def after_step(self, step: Step) -> None:
        self.after += 1
        self.counter += 1.0

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        self.evaluations.append(metrics)

    def metrics(self) -> dict[str, float]:
        return {"count": float(self.counter[0])}

    def state_dict(self) -> dict[str, Any]:
        return {"counter": self.counter.clone(), "nested": {"list": [1, None, "x"]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counter = state["counter"].clone()
        assert state["nested"] == {"list": [1, None, "x"]}

    def close(self) -> None:
        self.closed = True


def _setup(lr: float = 0.1, **options: Any) -> tuple[nn.Module, Any, torch.optim.Optimizer, Watch]:
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    return model, adapter, torch.optim.SGD(adapter.parameters(), lr=lr), Watch(**options)


def _batch(seed: int = 0, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (rows, 7), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def _dense(logits: Tensor, labels: Tensor) -> tuple[float, float, int]:
    """Mean loss, mean entropy and count over supervised tokens, in float64."""
    z, y = logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    log_p = z.log_softmax(-1)[y != -100]
    loss = -log_p.gather(1, y[y != -100][:, None]).mean()
    return float(loss), float(-(log_p.exp() * log_p).sum(-1).mean()), int((y != -100).sum())


def test_a_step_sees_all_its_batches_and_no_evaluation() -> None:
    model, _, optimizer, watch = _setup(needs=("entropy",))
    with ls.Dynamics(model, watch, optimizer):
        losses, entropies, counts = [], [], []
        for seed in range(3):
            batch = _batch(seed)
            out = model(**batch)
            out.loss.backward()
            loss, entropy, count = _dense(out.logits.detach(), batch["labels"])
            losses.append(loss * count)
            entropies.append(entropy * count)
            counts.append(count)
        model.eval()
        model(**_batch(9))
        with torch.no_grad():
            model.train()
            model(**_batch(10))
        optimizer.step()
    statistics = watch.seen[0].statistics
    assert statistics.tokens is not None
    assert statistics.loss is not None
    assert statistics.entropy is not None
    assert int(statistics.tokens) == sum(counts)
    assert float(statistics.loss) == pytest.approx(sum(losses) / sum(counts), rel=1e-6)
    assert float(statistics.entropy) == pytest.approx(sum(entropies) / sum(counts), rel=1e-6)
    assert watch.after == 1


def test_each_step_starts_anew_and_is_numbered() -> None:
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer) as driver:
        for seed in range(3):
            model(**_batch(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert driver.steps == 3
    assert [s.number for s in watch.seen] == [0, 1, 2]
    counts = [int(s.statistics.tokens) for s in watch.seen if s.statistics.tokens is not None]
    assert counts == [12] * 3  # 3 rows: 2 to 4 of 5 supervised, less the first


def test_hooks_are_gone_after_close() -> None:
    model, _, optimizer, watch = _setup()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with ls.Dynamics(model, watch, optimizer):
        pass
    assert watch.closed
    model(**_batch()).loss.backward()
    optimizer.step()
    assert not watch.seen
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert before == after
    assert "lorasmith_dynamics" not in optimizer.state_dict()["param_groups"][0]


def test_learning_rates_are_scaled_for_the_step_alone_and_group_by_group() -> None:
    model, adapter, _, watch = _setup(factor=0.25)
    parameters = list(adapter.parameters())
    groups = [{"params": parameters[::2], "lr": 0.1}, {"params": parameters[1::2], "lr": 0.4}]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    old = [p.detach().clone() for p in parameters]
    with ls.Dynamics(model, watch, optimizer):
        for n in range(2):
            model(**_batch(n)).loss.backward()
            gradients = [p.grad.clone() for p in parameters if p.grad is not None]
            optimizer.step()
            for i, (p, o, g) in enumerate(zip(parameters, old, gradients, strict=True)):
                rate = (0.1 if i % 2 == 0 else 0.4) * 0.5**n * 0.25
                torch.testing.assert_close(p.detach(), o - rate * g)
                old[i] = p.detach().clone()
            rates = [g["lr"] for g in optimizer.param_groups]
            assert rates == pytest.approx([0.1 * 0.5**n, 0.4 * 0.5**n])
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_skipped_step_moves_nothing(kind: Any) -> None:
    model, adapter, _, watch = _setup(skip=True)
    optimizer = kind(adapter.parameters(), lr=0.1, weight_decay=0.1)
    with ls.Dynamics(model, Watch(), optimizer):  # gather momentum first
        model(**_batch()).loss.backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    with ls.Dynamics(model, watch, optimizer):
        model(**_batch(1)).loss.backward()
        optimizer.step()
    assert watch.seen[0].skipped
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in before.items())
    for key, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key][name])), name


def test_gradients_are_added_once_a_step_and_not_where_there_are_none() -> None:
    model, _, optimizer, watch = _setup(gradient=3.0)
    with ls.Dynamics(model, watch, optimizer):
        first = watch.sites[0]
        for seed in range(2):
            model(**_batch(seed)).loss.backward()
        expected = first.B.grad.clone() + 3.0  # type: ignore[union-attr]
        watch.sites[1].B.grad = None
        before = watch.sites[1].B.detach().clone()
        optimizer.step()
    torch.testing.assert_close(first.B.grad, expected)
    assert torch.equal(watch.sites[1].B, before)


def test_batches_whose_gradients_were_thrown_away_belong_to_no_step() -> None:
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer, observe="manual") as driver:

        def batch(seed: int, loss: float) -> None:
            driver.observe(loss=torch.tensor(loss), tokens=4)
            model(**_batch(seed)).loss.backward()

        batch(0, math.inf)
        optimizer.zero_grad()  # the loop has looked at it, and goes on
        batch(1, 2.0)
        batch(2, 4.0)  # accumulated
        optimizer.step()
    loss, tokens = watch.seen[0].statistics.loss, watch.seen[0].statistics.tokens
    assert loss is not None
    assert tokens is not None
    assert (float(loss), int(tokens)) == (3.0, 8)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_before_the_rules_and_skips_overflows(fused: bool) -> None:
    def run(scaled: bool) -> tuple[list[Tensor], Watch]:
        model, adapter, _, watch = _setup(gradient=0.5)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with ls.Dynamics(model, watch, optimizer):
            for seed in range(2):
                scaler.scale(model(**_batch(seed)).loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            if scaled and not fused:
                steps = watch.after
                scaler.scale(model(**_batch(7)).loss * math.inf).backward()
                scaler.step(optimizer)
                assert watch.after == steps
        return [p.detach() for p in adapter.parameters()], watch

    plain, scaled = run(False)[0], run(True)[0]
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tasks_of_rows_are_told_apart_and_never_reach_the_model() -> None:
    model, _, optimizer, watch = _setup()
    batch = _batch()
    with ls.Dynamics(model, watch, optimizer, tasks=("dates", "numbers")):
        out = model(**batch, task=torch.tensor([1, 0, 1]))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model(**_batch(1), task="numbers").loss.backward()
        optimizer.step()
        with pytest.raises(ConfigError, match="no task of that number"):
            model(**batch, task=[2, 0, 0])
        with pytest.raises(ConfigError, match="another number of tasks"):
            model(**batch, task=["dates", "numbers"])
        with pytest.raises(ConfigError, match="not declared"):
            model(**batch, task="datse")
    assert watch.selected[:2] == [("numbers", "dates", "numbers"), ("numbers",)]
    tasks = watch.seen[0].statistics.tasks
    for name, rows in (("dates", [1]), ("numbers", [0, 2])):
        loss, _, count = _dense(out.logits.detach()[rows], batch["labels"][rows])
        assert float(tasks[name][0]) == pytest.approx(loss, rel=1e-5)
        assert int(tasks[name][1]) == count
    assert list(watch.seen[1].statistics.tasks) == ["numbers"]


def test_a_classifier_is_observed_without_shift() -> None:
    model = distilbert_classifier().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    watch = Watch(needs=("entropy",))
    with ls.Dynamics(model, watch, optimizer):
        ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
        out = model(input_ids=ids, labels=torch.tensor([0, 1, 1, 0]))
        out.loss.backward()
        optimizer.step()
    statistics = watch.seen[0].statistics
    assert statistics.loss is not None
    assert statistics.entropy is not None
    assert float(statistics.loss) == pytest.approx(out.loss.item(), rel=1e-5)
    p = out.logits.detach().double().softmax(-1)
    assert float(statistics.entropy) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), 1e-5)


def test_a_model_of_ones_own_is_observed_by_hand() -> None:
    model = mlp().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2, targets="all-linear"))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    watch = Watch(needs=("entropy",))
    with ls.Dynamics(model, watch, optimizer, observe="manual") as driver:
        logits = model(torch.randn(4, 6))
        labels = torch.tensor([0, 1, 2, 3])
        nn.functional.cross_entropy(logits, labels).backward()
        driver.observe(logits=logits, labels=labels, task="one")
        driver.observe(loss=torch.tensor(2.0), entropy=torch.tensor(1.0), tokens=4, task="two")
        optimizer.step()
        with pytest.raises(ConfigError, match="several tasks"):
            driver.observe(loss=torch.tensor(1.0), task=["a", "b"])
        with pytest.raises(ConfigError, match="Nothing to observe"):
            driver.observe()
    own = float(nn.functional.cross_entropy(logits.detach(), labels))
    statistics = watch.seen[0].statistics
    assert statistics.loss is not None
    assert float(statistics.loss) == pytest.approx((own + 2.0) / 2, rel=1e-6)


def test_entropy_that_was_not_observed_is_an_error() -> None:
    model, _, optimizer, watch = _setup(needs=("entropy",))
    with ls.Dynamics(model, watch, optimizer):
        batch = _batch()
        logits = model(input_ids=batch["input_ids"]).logits
        logits.sum().backward()
        with pytest.raises(TrainingError, match="none was observed"):
            optimizer.step()
    model, _, optimizer, watch = _setup(needs=("entropy",))
    with ls.Dynamics(model, watch, optimizer, observe="manual") as driver:
        model(**_batch()).loss.backward()
        driver.observe(loss=torch.tensor(1.0))
        with pytest.raises(TrainingError, match="its loss alone"):
            optimizer.step()


# -- state -------------------------------------------------------------------------------


def test_the_state_travels_in_the_optimizer_s_checkpoint(tmp_path: Path) -> None:
    model, adapter, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer):
        for seed in range(2):
            model(**_batch(seed)).loss.backward()
            optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)

    before = torch.optim.SGD(adapter.parameters(), lr=1.0)  # loaded first, bound later
    before.load_state_dict(saved)
    late = Watch()
    driver = ls.Dynamics(model, late, before)
    assert driver.resumed
    assert driver.steps == 2
    assert late.counter.tolist() == [2.0, 2.0]
    assert "lorasmith_dynamics" not in before.param_groups[0]
    driver.close()

    after = torch.optim.SGD(adapter.parameters(), lr=1.0)  # bound first, loaded later
    early = Watch()
    driver = ls.Dynamics(model, early, after)
    assert not driver.resumed
    after.load_state_dict(saved)
    assert driver.steps == 2
    assert early.counter.tolist() == [2.0, 2.0]
    assert after.param_groups[0]["lr"] == 0.1


def test_the_state_of_other_rules_is_refused() -> None:
    model, _, optimizer, watch = _setup()

    class Other(Watch):
        name = "other"

    with ls.Dynamics(model, watch, optimizer):
        saved = optimizer.state_dict()
    with ls.Dynamics(model, Other(), optimizer), pytest.raises(TrainingError, match="other dyn"):
        optimizer.load_state_dict(saved)


def test_added_parameters_train_and_survive_a_checkpoint(tmp_path: Path) -> None:
    class Adds(Watch):
        name = "adds"
        extra: nn.Parameter

        def bind(self, context: Any) -> None:
            super().bind(context)

        def before_step(self, step: Step) -> None:
            if step.number == 1:
                self.add()
            if step.number >= 1:
                self.extra.grad = torch.ones_like(self.extra)

        def add(self) -> None:
            like = self.sites[0].B
            self.extra = nn.Parameter(like.detach().clone())
            self.context.add_parameter("extra", self.extra, like)

        def state_dict(self) -> dict[str, Any]:
            extra = getattr(self, "extra", None)
            return {"extra": None if extra is None else extra.detach().clone()}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            if state["extra"] is not None:
                self.add()
                with torch.no_grad():
                    self.extra.copy_(state["extra"])

    def run(steps: range, model: nn.Module, optimizer: Any, rule: Adds) -> None:
        for seed in steps:
            model(**_batch(seed)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    parameters = list(adapter.parameters())
    groups = [{"params": parameters[::2], "lr": 0.01}, {"params": parameters[1::2], "lr": 0.02}]
    optimizer = torch.optim.AdamW([dict(g) for g in groups])
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    rule = Adds()
    driver = ls.Dynamics(model, rule, optimizer)
    run(range(3), model, optimizer, rule)
    weights = {k: v.clone() for k, v in adapter.state_dict().items()}
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    run(range(3, 5), model, optimizer, rule)
    assert not torch.equal(rule.extra, rule.sites[0].B)
    expected = {**{k: v.clone() for k, v in adapter.state_dict().items()}, "": rule.extra.clone()}
    driver.close()

    saved, plan = torch.load(tmp_path / "state.pt", weights_only=True)
    adapter.load_state_dict(weights)
    # The loop that resumes does not know the added parameter when it loads.
    fresh = torch.optim.AdamW([dict(g) for g in groups])
    scheduler = torch.optim.lr_scheduler.LambdaLR(fresh, lambda n: 0.9**n)
    fresh.load_state_dict(copy.deepcopy(saved))  # else it trains on in the tensors of ``saved``
    scheduler.load_state_dict(plan)
    again = Adds()
    driver = ls.Dynamics(model, again, fresh)
    assert driver.resumed
    run(range(3, 5), model, fresh, again)
    assert torch.equal(again.extra, expected.pop(""))
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in expected.items())
    # Loading once more, with the parameter in place, works as well.
    fresh.load_state_dict(saved)
    assert sum(len(g["params"]) for g in fresh.param_groups) == len(parameters) + 1
    driver.context.remove_parameter(again.extra)
    assert sum(len(g["params"]) for g in fresh.param_groups) == len(parameters)
    assert again.extra not in fresh.state


# -- what is found -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_sites_of_ours_peft_and_plain_modules_are_the_live_parameters() -> None:
    import peft

    model = gpt2()
    adapter = ls.attach(model, ls.DoRAConfig(r=2))
    sites = find_sites(model)
    assert {id(s.A) for s in sites} <= {id(p) for p in adapter.parameters()}
    assert all(s.magnitude is not None and not s.factors.exact for s in sites)
    assert len(sites) == len(adapter.targets)

    base: Any = llama()
    wrapped: Any = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], use_rslora=True)
    )
    sites = find_sites(wrapped)
    assert len(sites) == 2
    assert sites[0].adapter == "default"
    assert sites[0].scaling == pytest.approx(6 / math.sqrt(3))
    assert any(p is sites[0].A for p in wrapped.parameters())
    assert find_sites(wrapped, "default")[0].key.startswith("default/")

    class Small(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.lora_A = nn.Parameter(torch.randn(2, 6))
            self.lora_B = nn.Parameter(torch.randn(5, 2))
            self.scaling = 0.5

    plain = nn.Sequential(Small(), nn.ReLU())
    (site,) = find_sites(plain)
    assert site.A is plain[0].lora_A
    assert site.scaling == 0.5
    assert site.adapter == ""
    assert site.factors.base is not None
    torch.testing.assert_close(site.factors.base.weight, plain[0].weight.detach())


def test_nothing_found_says_what_was_looked_for() -> None:
    with pytest.raises(UnknownNameError, match="lora_A and lora_B"):
        find_sites(mlp())
    model = mlp()
    ls.attach(model, ls.IA3Config(targets="all-linear", feedforward=()))
    with pytest.raises(UnknownNameError, match="low-rank"):
        find_sites(model)
    model = mlp()
    ls.attach(model, ls.LoRAConfig(r=2, targets="all-linear", train_A=False))
    with pytest.raises(ConfigError, match="A not a parameter, B trained"):
        find_sites(model)


def test_misuse_is_told() -> None:
    model, _, optimizer, watch = _setup()
    elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="trains none of the adapter's factors"):
        ls.Dynamics(model, watch, elsewhere)
    with pytest.raises(ConfigError, match="not a dynamic"):
        ls.Dynamics(model, [Watch], optimizer)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="there twice"):
        ls.Dynamics(model, [Watch(), Watch()], optimizer)
    with pytest.raises(ConfigError, match="There is no dynamic"):
        ls.Dynamics(model, [], optimizer)
    with pytest.raises(ConfigError, match="optimiser of PyTorch"):
        ls.Dynamics(model, watch, object())  # type: ignore[arg-type]


def test_a_rule_that_fails_to_bind_leaves_nothing_behind() -> None:
    model, _, optimizer, watch = _setup()

    class Fails(Watch):
        name = "fails"

        def bind(self, context: Any) -> None:
            raise ConfigError("no")

    with pytest.raises(LorasmithError):
        ls.Dynamics(model, [watch, Fails()], optimizer)
    assert watch.closed
    model(**_batch()).loss.backward()
    optimizer.step()
    assert not watch.seen


def test_metrics_are_named_after_their_rule() -> None:
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer) as driver:
        driver.on_evaluate({"eval_loss": 1.0})
        assert driver.metrics() == {"watch/count": 0.0}
    assert watch.evaluations == [{"eval_loss": 1.0}]


class _Factor(Watch):
    """Scales the rate, adds to the gradient, or both."""

    name = "factor"


def _trained_by(closure: bool, kind: Any, **options: Any) -> tuple[Tensor, Watch, float]:
    model, adapter, _, watch = _setup(**options)
    optimizer = kind(adapter.parameters(), lr=0.1)
    with ls.Dynamics(model, watch, optimizer) as driver:
        for seed in range(3):

            def evaluate(seed: int = seed) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(**_batch(seed)).loss
                loss.backward()
                return loss

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        assert driver.steps == 3
    rate = optimizer.param_groups[0]["lr"]
    return torch.cat([p.detach().flatten() for p in adapter.parameters()]), watch, rate


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_closure_is_the_same_as_a_backward_pass_before_the_step(kind: Any) -> None:
    """Lightning hands a closure to every optimiser: the rules must see its gradients."""
    options = {"gradient": 0.3, "factor": 0.5, "needs": ("entropy",)}
    plain, seen, _ = _trained_by(False, kind, **options)
    closed, also, rate = _trained_by(True, kind, **options)
    assert torch.equal(plain, closed)
    assert rate == 0.1
    for one, two in zip(seen.seen, also.seen, strict=True):
        assert float(one.statistics.loss) == float(two.statistics.loss)  # type: ignore[arg-type]


def test_a_penalty_and_a_closure_that_is_evaluated_often_do_not_go_together() -> None:
    assert _trained_by(True, torch.optim.LBFGS)[1].after == 3
    with pytest.raises(TrainingError, match="more than once a step"):
        _trained_by(True, torch.optim.LBFGS, gradient=0.3)


def test_a_step_that_fails_gives_the_learning_rate_back() -> None:
    model, adapter, _, watch = _setup(factor=0.5)

    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    optimizer = Fails(adapter.parameters(), lr=0.1)
    with ls.Dynamics(model, watch, optimizer):
        for fails in (True, False, True):
            model(**_batch()).loss.backward()
            optimizer.fails = fails
            if fails:
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
            else:
                optimizer.step()
                assert optimizer.param_groups[0]["lr"] == 0.1
        assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_two_dynamics_on_one_optimizer_are_refused() -> None:
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer):
        with pytest.raises(ConfigError, match="has dynamics already"):
            ls.Dynamics(model, _Factor(), optimizer)
        model(**_batch()).loss.backward()
        optimizer.step()
    ls.Dynamics(model, _Factor(), optimizer).close()
    assert len(watch.seen) == 1


def test_after_the_wrong_rules_the_right_ones_still_resume() -> None:
    model, adapter, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer):
        model(**_batch()).loss.backward()
        optimizer.step()
        saved = optimizer.state_dict()
    fresh = torch.optim.SGD(adapter.parameters(), lr=0.1)
    fresh.load_state_dict(saved)
    with pytest.raises(TrainingError, match="other dynamics"):
        ls.Dynamics(model, _Factor(), fresh)
    with ls.Dynamics(model, Watch(), fresh) as driver:
        assert driver.resumed
        assert driver.steps == 1


def test_a_batch_without_a_task_has_none() -> None:
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer) as driver:
        model(**_batch(0), task="a").loss.backward()
        model(**_batch(1)).loss.backward()
        optimizer.step()
        driver.select("b")  # said by hand, it holds until something else is said
        model(**_batch(0)).loss.backward()
        model(**_batch(1)).loss.backward()
        optimizer.step()
    one, two = (step.statistics for step in watch.seen)
    assert list(one.tasks) == ["a"]
    assert float(one.tasks["a"][1]) == float(one.tokens) / 2  # type: ignore[arg-type]
    assert float(two.tasks["b"][1]) == float(two.tokens)  # type: ignore[arg-type]


def test_a_mean_over_no_tokens_says_nothing() -> None:
    model, _, optimizer, watch = _setup(needs=("entropy",))
    nan = torch.tensor(math.nan)
    with ls.Dynamics(model, watch, optimizer, observe="manual") as driver:
        model(**_batch()).loss.backward()
        driver.observe(loss=nan, entropy=nan, tokens=0)
        driver.observe(loss=torch.tensor(2.0), entropy=torch.tensor(1.0), tokens=5)
        optimizer.step()
    (step,) = watch.seen
    assert float(step.statistics.loss) == 2.0  # type: ignore[arg-type]
    assert float(step.statistics.entropy) == 1.0  # type: ignore[arg-type]


def test_loaded_state_of_an_added_parameter_goes_where_the_parameter_is() -> None:
    """Trainer loads ``optimizer.pt`` onto the CPU, wherever the model is."""
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer) as driver:
        driver.context.stash["new"] = {"exp_avg": torch.zeros(2), "step": torch.zeros(())}
        parameter = nn.Parameter(torch.empty(2, device="meta"))
        driver.context.add_parameter("new", parameter)
        state = optimizer.state[parameter]
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == "cpu"


def test_loaded_state_of_another_shape_than_the_added_parameter() -> None:
    """A fused optimiser would write beyond its end."""
    model, _, optimizer, watch = _setup()
    with ls.Dynamics(model, watch, optimizer) as driver:
        driver.context.stash["new"] = {"exp_avg": torch.zeros(1), "step": torch.zeros(())}
        parameter = nn.Parameter(torch.zeros(2))
        with pytest.raises(TrainingError) as caught:
            driver.context.add_parameter("new", parameter)
        assert caught.value.key == "new exp_avg"
        assert parameter not in optimizer.state
        assert "new" not in driver.context.added
        assert not any(p is parameter for g in optimizer.param_groups for p in g["params"])


@pytest.mark.parametrize("rules", ["gauge", ls.GaugeProjection, torch.optim.SGD, 3])
def test_what_is_no_rule_is_shown_as_given(rules: Any) -> None:
    model = llama()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="not a dynamic") as caught:
        ls.Dynamics(model, rules, optimizer)
    assert repr(rules) in str(caught.value)


def test_an_adapter_without_factors_is_named() -> None:
    model = llama()
    adapter = ls.attach(model, ls.IA3Config())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with pytest.raises(UnknownNameError, match="the ia3 adapter 'default'"):
        ls.Dynamics(model, ls.GaugeProjection(), optimizer)


# -- what is compared when a run resumes ---------------------------------------------------


def _saved(rules: list[Dynamic], optimizer: Any = torch.optim.AdamW) -> tuple[Any, dict[str, Any]]:
    """A model trained for two steps with rules, and the optimiser's state of then, from a file."""
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    trained = optimizer(adapter.parameters(), lr=0.01)
    with ls.Dynamics(model, rules, trained):
        _steps(model, trained, 2)
        buffer = io.BytesIO()
        torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    return model, torch.load(buffer, weights_only=True)


def _steps(model: nn.Module, optimizer: Any, count: int) -> None:
    for seed in range(count):
        optimizer.zero_grad()
        model(**_batch(seed)).loss.backward()
        optimizer.step()


def _rules(**changes: Any) -> list[Dynamic]:
    settings: dict[str, Any] = {"mu": 2.0, "kind": "spectral", "alpha": 1.5, **changes}
    return [
        ls.GaugeProjection(mu=settings["mu"]),
        ls.EntropyGovernor(
            ls.OrthogonalityPenalty(settings["kind"], refresh_every=1), alpha=settings["alpha"]
        ),
        ls.RotationBudget(4),
    ]


@pytest.mark.parametrize("late", [False, True], ids=["bound-first", "loaded-first"])
@pytest.mark.parametrize(
    ("rules", "differs"),
    [
        (lambda: _rules(mu=1.0), ["gauge.mu 2.0", "gauge.mu 1.0"]),
        (lambda: _rules(mu="auto"), ["gauge.mu 2.0", "gauge.mu 'auto'"]),
        (lambda: _rules(alpha=1), ["entropy.alpha 1.5", "entropy.alpha 1"]),
        (lambda: _rules(kind="shadow"), ["'kind': 'spectral'", "'kind': 'shadow'"]),
        (
            lambda: _rules()[::-1],
            ["order gauge, entropy, budget", "order budget, entropy, gauge"],
        ),
    ],
)
def test_changed_options_and_order_are_an_error(rules: Any, differs: list[str], late: bool) -> None:
    model, saved = _saved(_rules())
    adapter = ls.attached(model)["default"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    if late:
        optimizer.load_state_dict(saved)
        with pytest.raises(TrainingError, match="not as they are now") as caught:
            ls.Dynamics(model, rules(), optimizer)
    else:
        with (
            ls.Dynamics(model, rules(), optimizer),
            pytest.raises(TrainingError, match="not as they are now") as caught,
        ):
            optimizer.load_state_dict(saved)
    text = str(caught.value)
    assert all(part in text for part in differs)
    assert 'changed="accept"' in text


def test_equal_options_however_said_go_on() -> None:
    model, saved = _saved(_rules())
    optimizer = torch.optim.AdamW(ls.attached(model)["default"].parameters(), lr=0.01)
    optimizer.load_state_dict(saved)
    rules = [
        ls.GaugeProjection(2, every=1),  # the default, said
        ls.EntropyGovernor(alpha=np.float64(1.5), penalty=ls.OrthogonalityPenalty(refresh_every=1)),
        ls.RotationBudget(max_deg=4.0, per="head"),
    ]
    with ls.Dynamics(model, rules, optimizer) as driver:
        assert driver.resumed


def test_changed_options_can_be_accepted(caplog: pytest.LogCaptureFixture) -> None:
    model, saved = _saved(_rules())
    adapter = ls.attached(model)["default"]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    optimizer.load_state_dict(saved)
    rules = _rules(mu=0.5)
    with (
        caplog.at_level("WARNING", "lorasmith"),
        ls.Dynamics(model, [rules[1], rules[0], rules[2]], optimizer, changed="accept") as driver,
    ):
        assert driver.resumed
        assert driver.steps == 2
        _steps(model, optimizer, 1)
        for part in adapter.layers().values():  # the present option acts
            A, B = part["A"].detach().double(), part["B"].detach().double()
            left, right = A @ A.mT, 0.5 * B.mT @ B
            assert float((left - right).norm() / left.norm()) < 1e-5
        again = optimizer.state_dict()
    assert "gauge.mu 2.0" in caplog.text
    assert "gauge.mu 0.5" in caplog.text
    assert "order gauge, entropy, budget" in caplog.text
    fresh = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    fresh.load_state_dict(again)  # what was accepted is what is saved
    rules = _rules(mu=0.5)
    ls.Dynamics(model, [rules[1], rules[0], rules[2]], fresh).close()
    with pytest.raises(ConfigError, match="refuse or accept"):
        ls.Dynamics(model, _rules(), optimizer, changed="ignore")  # type: ignore[arg-type]


def test_a_rule_of_ones_own_is_compared_without_a_line_for_it() -> None:
    class Shrink(Dynamic):
        name = "shrink"

        def __init__(self, factor: float = 0.9, **more: Any) -> None:
            self.factor = factor

    class Slow(Shrink):
        def __init__(self, patience: int) -> None:
            super().__init__(0.99)

    assert Shrink().made_with() == {"factor": 0.9}
    assert Shrink(0.5, other=(1, "x")).made_with() == {"factor": 0.5, "other": [1, "x"]}
    assert Slow(3).made_with() == {"patience": 3}
    assert copy.deepcopy(Slow(3)).made_with() == {"patience": 3}
    with pytest.raises(TypeError, match="patience"):
        Slow()  # type: ignore[call-arg]
    model, saved = _saved([Shrink(0.5)], torch.optim.SGD)
    optimizer = torch.optim.SGD(ls.attached(model)["default"].parameters(), lr=0.01)
    with (
        ls.Dynamics(model, Shrink(0.6), optimizer),
        pytest.raises(TrainingError, match=r"shrink\.f"),
    ):
        optimizer.load_state_dict(saved)


def test_state_that_a_loop_without_dynamics_has_carried_along_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, saved = _saved(_rules())
    adapter = ls.attached(model)["default"]
    without = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    without.load_state_dict(saved)
    _steps(model, without, 3)
    carried = without.state_dict()
    assert "lorasmith_dynamics" in carried["param_groups"][0]  # nothing of ours ran there

    def fresh() -> torch.optim.Optimizer:
        made = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        made.load_state_dict(carried)
        return made

    with pytest.raises(TrainingError, match="made steps since") as caught:
        ls.Dynamics(model, _rules(), fresh())
    assert "optimiser steps 2" in str(caught.value)
    assert "optimiser steps 5" in str(caught.value)
    with (
        caplog.at_level("WARNING", "lorasmith"),
        ls.Dynamics(model, _rules(), fresh(), changed="accept") as driver,
    ):
        assert driver.steps == 2
    assert "made steps since" in caplog.text
    # The way out that the message names: they start anew.
    optimizer = fresh()
    optimizer.param_groups[0].pop("lorasmith_dynamics")
    with ls.Dynamics(model, _rules(), optimizer) as driver:
        assert not driver.resumed


# -- copies of the model -------------------------------------------------------------------


def _by_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied: nn.Module = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize("how", [copy.deepcopy, _by_pickle])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_copy_of_the_model_leaves_the_driver_behind(how: Any, peft: bool) -> None:
    model: Any = llama().train()
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        ls.attach(model, ls.LoRAConfig(r=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    watch = Watch(needs=("entropy",))

    def drivers() -> set[int]:
        return {id(one) for one in gc.get_objects() if type(one) is ls.Dynamics}

    with ls.Dynamics(model, [watch, ls.GaugeProjection()], optimizer) as driver:
        known = drivers()
        model(**_batch(), task="a").loss.backward()
        if how is copy.deepcopy:
            twin = how(model)
        else:
            for p in trained:  # a gradient hook on a leaf is not pickled either
                p.grad = None
            twin = how(model)
        assert drivers() - known == set()
        # It computes the same, takes the same batches, and nobody watches it.
        theirs = twin(**_batch(5), task="b")
        assert len(watch.selected) == 1
        with torch.no_grad():
            mine = type(model).forward(model, **_batch(5))
        assert torch.equal(theirs.logits, mine.logits)
        theirs.loss.backward()
        own = [p for p in twin.parameters() if p.requires_grad]
        assert not {id(p) for p in own} & {id(p) for p in trained}
        before = [p.detach().clone() for p in trained]
        torch.optim.SGD(own, lr=0.1).step()
        assert (watch.seen, driver.steps) == ([], 0)
        assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        # The original goes on, with its own batches alone.
        if how is _by_pickle:
            model(**_batch(), task="a").loss.backward()
        optimizer.step()
        assert list(watch.seen[0].statistics.tasks) == ["a"]
        # And the copy can have dynamics of its own, at the same time.
        optimizer_2, second = torch.optim.SGD(own, lr=0.1), Watch()
        with ls.Dynamics(twin, second, optimizer_2):
            twin(**_batch(), task="c").loss.backward()
            optimizer_2.step()
        assert list(second.seen[0].statistics.tasks) == ["c"]
        assert (len(watch.seen), len(second.seen)) == (1, 1)


def test_two_penalties_at_once_are_told() -> None:
    def bound(*rules: Dynamic) -> None:
        model = llama()
        adapter = ls.attach(model, ls.LoRAConfig(r=2))
        ls.Dynamics(model, rules, torch.optim.SGD(adapter.parameters(), lr=0.1)).close()

    with pytest.warns(UserWarning, match="'entropy' and 'orthogonality' add two penalties"):
        bound(ls.EntropyGovernor(), ls.OrthogonalityPenalty())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound(ls.EntropyGovernor(), ls.RotationBudget())
        penalty = ls.RotationBudget(kind="penalty")
        bound(ls.EntropyGovernor(penalty), ls.OrthogonalityPenalty())


def test_two_penalties_add_up() -> None:
    """What the warning says happens: the gradient of both, each with its own weight."""

    def gradients(*rules: Dynamic) -> list[Tensor]:
        model = llama().train()
        adapter = ls.attach(model, ls.LoRAConfig(r=2))
        with torch.no_grad():
            for part in adapter.layers().values():
                part["B"].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        model(**_batch()).loss.backward()
        if rules:
            with ls.Dynamics(model, rules, optimizer) as driver:
                out = model(**_batch())
                driver.optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
        return [p.grad for p in adapter.parameters() if p.grad is not None]

    def penalty() -> ls.OrthogonalityPenalty:
        return ls.OrthogonalityPenalty(weight=0.5, max_ratio=None)

    governed = ls.EntropyGovernor(penalty())
    none, one, other = gradients(), gradients(governed), gradients(penalty())
    with pytest.warns(UserWarning, match="two penalties"):
        both = gradients(ls.EntropyGovernor(penalty()), penalty())
    weight = governed.metrics()["lambda"]
    for a, b, c, d in zip(none, one, other, both, strict=True):
        torch.testing.assert_close(b - a, weight * (c - a), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(d - a, (1 + weight) * (c - a), rtol=1e-3, atol=1e-6)
