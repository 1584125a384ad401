"""Entropy of predictions and the governor: against dense formulas, and EgoRA's defects."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.dynamics import Dynamic, Dynamics, Statistics, Step, find_sites
from lorasmith.dynamics.entropy import EntropyGovernor, _statistics, token_statistics
from lorasmith.dynamics.orthogonality import OrthogonalityPenalty
from lorasmith.dynamics.rotation_budget import RotationBudget
from lorasmith.errors import ConfigError, DataError, LorasmithError, TrainingError
from tests.models import distilbert_classifier, llama, randomise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dense(
    logits: Tensor, labels: Tensor, shift: bool = True, ignore: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy and mask, each position on its own in float64."""
    if shift:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore)], dim=1)
    loss, entropy = (torch.zeros(labels.shape, dtype=torch.float64) for _ in range(2))
    for index in (labels != ignore).nonzero().tolist():
        at = tuple(index)
        p = torch.softmax(logits[at].detach().double(), dim=-1)
        entropy[at] = torch.special.entr(p).sum()
        loss[at] = -torch.log_softmax(logits[at].detach().double(), dim=-1)[labels[at]]
    return loss, entropy, labels != ignore


def _batch(
    batch: int = 3, length: int = 7, vocabulary: int = 301, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    logits = (5 * torch.randn(batch, length, vocabulary)).to(dtype)
    labels = torch.randint(0, vocabulary, (batch, length))
    labels[:, :2] = -100
    labels[0, 5:] = -100
    return logits, labels


def _check(logits: Tensor, labels: Tensor, **options: Any) -> None:
    found = token_statistics(logits, labels, **options)
    shift = options.get("shift", True)
    loss, entropy, mask = dense(logits, labels, shift, options.get("ignore_index", -100))
    assert torch.equal(found.supervised, mask)
    assert found.entropy is not None
    assert found.loss.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-6, atol=1e-6)
    assert int(found.tokens) == int(mask.sum())
    assert found.mean_entropy is not None
    assert float(found.mean_loss) == pytest.approx(
        float(loss.sum() / mask.sum()), rel=1e-6, abs=1e-6
    )
    assert float(found.mean_entropy) == pytest.approx(
        float(entropy.sum() / mask.sum()), rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 301, 50_000])
def test_loss_and_entropy_are_the_dense_ones(dtype: torch.dtype, vocabulary: int) -> None:
    _check(*_batch(vocabulary=vocabulary, dtype=dtype))


@given(
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0, 60),
    st.integers(0, 2**16),
)
def test_any_shape_scale_and_chunk(
    batch: int, length: int, vocabulary: int, chunk: int, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, length, vocabulary, generator=g)
    labels = torch.randint(-1, vocabulary, (batch, length), generator=g)
    labels[0, 1] = 0
    _check(logits, labels, ignore_index=-1, chunk=chunk)


def test_loss_is_the_models_own() -> None:
    model = llama()
    ids = torch.randint(0, 32, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(input_ids=ids, labels=labels)
    found = token_statistics(out.logits, labels)
    assert float(found.mean_loss) == pytest.approx(out.loss.item(), rel=1e-6)
    assert not found.loss.requires_grad


def test_a_classifier_has_no_shift() -> None:
    model = distilbert_classifier()
    ids, labels = torch.randint(0, 30, (4, 6)), torch.tensor([0, 1, 1, 0])
    out = model(input_ids=ids, labels=labels)
    _check(out.logits.detach(), labels, shift=False)
    found = token_statistics(out.logits, labels, shift=False)
    assert float(found.mean_loss) == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabularies_and_extreme_logits(dtype: torch.dtype) -> None:
    logits, labels = _batch(dtype=dtype)
    logits[..., 100:] = -math.inf
    logits[0, 1, :100] = -math.inf
    logits[0, 1, 7] = 3.0  # the only one left: certain
    logits[1, 2] *= 1000
    labels = torch.where(labels < 0, labels, labels % 100)
    labels[0, 2] = 7
    _check(logits, labels)
    found = token_statistics(logits, labels)
    assert found.entropy is not None
    assert float(found.entropy[0, 1]) == 0.0
    assert bool((found.entropy >= 0).all())


def test_padding_is_not_counted() -> None:
    logits, labels = _batch()
    short = token_statistics(logits, labels)
    padded_logits = torch.cat([logits, torch.full((3, 20, 301), math.nan)], dim=1)
    padded_labels = torch.cat([labels, torch.full((3, 20), -100)], dim=1)
    long = token_statistics(padded_logits, padded_labels)
    torch.testing.assert_close(long.mean_loss, short.mean_loss, rtol=1e-6, atol=0)
    assert short.mean_entropy is not None
    assert long.mean_entropy is not None
    torch.testing.assert_close(long.mean_entropy, short.mean_entropy, rtol=1e-6, atol=0)
    assert torch.equal(long.tokens, short.tokens)


def test_labels_where_nothing_is_supervised_do_not_matter() -> None:
    logits, labels = _batch()
    wanted = token_statistics(logits, labels)
    other = labels.clone()
    other[other == -100] = 10**9
    got = token_statistics(logits, other, ignore_index=10**9)
    assert torch.equal(got.loss, wanted.loss)
    nothing = token_statistics(logits, torch.full_like(labels, -100))
    assert int(nothing.tokens) == 0
    assert float(nothing.loss.abs().sum()) == 0
    assert math.isnan(float(nothing.mean_loss))


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int16])
def test_slices_and_narrow_labels(labels_dtype: torch.dtype) -> None:
    logits, labels = _batch(length=9)
    _check(logits[:, 1:8], labels[:, 1:8].to(labels_dtype))
    _check(logits.transpose(0, 1).contiguous().transpose(0, 1), labels)


def _peak(function: Any) -> int:
    """Highest sum of live bytes, from the allocator's own events."""
    function()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64, 8192), (1, 4, 65_536)])
def test_extra_memory_is_below_a_tenth_of_the_logits(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    logits = torch.randn(shape).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1])
    peak = _peak(lambda: token_statistics(logits, labels))
    assert 0 < peak < 0.1 * logits.nbytes
    naive = _peak(lambda: torch.special.entr(logits.float().softmax(-1)).sum(-1))
    assert naive >= logits.nbytes  # the measure sees what it must


def test_an_accelerators_path_reads_nothing_back() -> None:
    # Tensors without data: whatever asked for a value, or for a shape that depends on one,
    # would raise.
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.empty(3, 7, 301, dtype=dtype, device="meta")
        found = token_statistics(logits, torch.empty(3, 7, dtype=torch.long, device="meta"))
        assert found.loss.shape == found.supervised.shape == (3, 7)
        assert found.mean_entropy is not None
        assert found.mean_entropy.shape == found.tokens.shape == ()


def test_the_accelerators_path_gives_the_same() -> None:
    logits, labels = _batch()
    labels[2, 3] = -100
    logits[:, 2] = torch.where(labels[:, 3:4] == -100, math.nan, logits[:, 2])
    wanted = token_statistics(logits, labels)
    assert wanted.entropy is not None
    for chunk in (None, 100, 700, 10**6):
        got = _statistics(logits, labels, True, -100, chunk, True, pick=False)
        assert got.entropy is not None
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.entropy, wanted.entropy, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = _batch()
    with pytest.raises(DataError, match="do not belong together"):
        token_statistics(logits, labels[:, 1:])
    with pytest.raises(DataError, match="do not belong together"):
        token_statistics(logits, labels[0])
    with pytest.raises(DataError, match="classes"):
        token_statistics(logits, labels.float())
    with pytest.raises(ConfigError):
        token_statistics(logits, labels, chunk=0)
    labels[1, 3] = 301
    with pytest.raises(DataError, match="outside the vocabulary"):
        token_statistics(logits, labels)


# -- the governor --------------------------------------------------------------------------


class Recorder(Dynamic):
    """A penalty of another kind, that notes how it is driven."""

    name = "recorder"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.weights: list[Tensor] = []
        self.moments: list[str] = []

    def apply(self, step: Step, weight: float | Tensor) -> None:
        assert isinstance(weight, Tensor)
        assert weight.dim() == 0
        self.weights.append(weight)

    def value(self) -> Tensor:
        return torch.tensor(7.0)

    def before_step(self, step: Step) -> None:
        raise AssertionError("the governor applies it")

    def on_sites(self, sites: Sequence[Any]) -> None:
        self.moments.append("sites")

    def after_step(self, step: Step) -> None:
        self.moments.append("after")

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        self.moments.append("evaluate")

    def metrics(self) -> dict[str, float]:
        return {"recorded": 1.0}


def _step(entropy: float | None, loss: float = 1.0, tokens: float = 10.0, number: int = 0) -> Step:
    value = None if entropy is None else torch.tensor(entropy)
    statistics = Statistics(torch.tensor(tokens), torch.tensor(loss), value)
    return Step(number, statistics, torch.optim.SGD([torch.zeros(1)], lr=1.0))


@pytest.mark.parametrize("entropy", [0.0, 0.3, math.log(2) / (math.e / 2), 1.0, 2.5, 10.0])
def test_lambda(entropy: float) -> None:
    penalty = Recorder(weight=0.25)
    governor = EntropyGovernor(penalty)
    governor.before_step(_step(entropy))
    wanted = max(math.e / 2 * entropy, math.log(2))
    assert float(penalty.weights[0]) == pytest.approx(0.25 * wanted, rel=1e-6)
    found = governor.metrics()
    assert found["lambda"] == pytest.approx(wanted, rel=1e-6)  # λ, not α
    assert found["alpha"] == pytest.approx(math.e / 2)
    assert found["entropy"] == pytest.approx(entropy, rel=1e-6)
    assert found["recorded"] == 1.0
    assert float(governor.value()) == 7.0


def test_a_nan_does_not_spread() -> None:
    penalty = Recorder()
    governor = EntropyGovernor(penalty)
    for entropy in (math.nan, math.inf):
        governor.before_step(_step(entropy, loss=math.nan))
        assert float(penalty.weights[-1]) == pytest.approx(math.log(2))
    governor.before_step(_step(1.0, loss=2.0))
    governor.on_evaluate({"eval_loss": 2.5})
    assert governor.history[0]["gap"] == pytest.approx(0.5)


def test_no_entropy_is_an_error() -> None:
    with pytest.raises(TrainingError, match="needs the entropy"):
        EntropyGovernor(Recorder()).before_step(_step(None))
    assert EntropyGovernor().needs == {"entropy"}


def _reference(gaps: list[float], alpha: float, cooldown: bool) -> list[float]:
    """α after each evaluation, by the formulas of SEEDS.md."""
    ema = calm = None
    out = []
    for k, gap in enumerate(gaps, start=1):
        if ema is None:
            ema, calm = gap, 0
        else:
            new = 0.7 * ema + 0.3 * gap
            t = max(-1.0, min(1.0, (new - ema) / abs(ema)))
            ema = new
            if k > 2:
                alpha = alpha * 1.45 if t > 0.5 else alpha * (1 + 0.15 * t)
                calm = calm + 1 if t <= 0 else 0
                if cooldown and calm == 3:
                    alpha, calm = 0.95 * alpha, 0
                alpha = min(3.0, max(0.05, alpha))
        out.append(alpha)
    return out


@pytest.mark.parametrize("cooldown", [False, True])
@pytest.mark.parametrize(
    "gaps",
    [
        [0.1, 0.1, 0.2, 0.9, 3.0, 0.1],  # alarms
        [1.0] + [1.0 - 0.2 * i for i in range(12)],  # falling, through zero
        [0.5] * 8,
        [0.1 * 3**i for i in range(8)],  # up to the upper bound
        [-1.0 * 3**i for i in range(60)],  # down to the lower bound
    ],
)
def test_alpha_follows_the_generalisation_gap(gaps: list[float], cooldown: bool) -> None:
    governor = EntropyGovernor(Recorder(), cooldown=cooldown)
    wanted = _reference(gaps, math.e / 2, cooldown)
    for gap, alpha in zip(gaps, wanted, strict=True):
        # The mean over tokens, not over steps.
        governor.before_step(_step(1.0, loss=1.0, tokens=10.0))
        governor.before_step(_step(1.0, loss=4.0, tokens=5.0))
        governor.on_evaluate({"eval_loss": 2.0 + gap})
        assert governor.alpha == pytest.approx(alpha, rel=1e-5)
    assert governor.alpha != math.e / 2 or gaps == [0.5] * 8
    assert len(governor.history) == len(gaps)


def test_evaluations_that_say_nothing_change_nothing() -> None:
    governor = EntropyGovernor(Recorder())
    governor.on_evaluate({"eval_loss": 5.0})  # nothing trained yet
    assert governor.history == []
    governor.before_step(_step(1.0))
    with pytest.warns(UserWarning, match="no finite 'eval_loss'"):
        governor.on_evaluate({"eval_accuracy": 0.5})
    with pytest.warns(UserWarning, match="no finite 'eval_loss'"):
        governor.on_evaluate({"eval_loss": math.nan})
    assert governor.history == []
    assert governor.alpha == math.e / 2
    fixed = EntropyGovernor(Recorder(), adaptive=False)
    for gap in (0.1, 1.0, 5.0, 9.0):
        fixed.before_step(_step(1.0))
        fixed.on_evaluate({"eval_loss": 1 + gap})
    assert fixed.alpha == math.e / 2


def _run(rule: Any, steps: int, model: nn.Module | None = None) -> tuple[nn.Module, Any, Any]:
    if model is None:
        model = llama().train()
        ls.attach(model, ls.LoRAConfig(r=2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    driver = Dynamics(model, rule, optimizer)
    _train(model, optimizer, driver, 0, steps)
    return model, optimizer, driver


def _data(number: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 32, (3, 8), generator=g)
    labels = ids.clone()
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def _train(model: nn.Module, optimizer: Any, driver: Any, start: int, end: int) -> None:
    for number in range(start, end):
        for part in (0, 1):  # gradient accumulation
            (model(**_data(2 * number + part)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 2 == 1:
            model.eval()
            with torch.no_grad():
                loss = model(**_data(10_000)).loss
            model.train()
            driver.on_evaluate({"eval_loss": float(loss)})


def test_lambda_is_of_the_whole_step_and_evaluation_does_not_count() -> None:
    penalty = Recorder()
    governor = EntropyGovernor(penalty, adaptive=False)
    model, _, driver = _run(governor, 0)
    optimizer = driver.optimizer
    entropies, tokens = [], []
    with torch.no_grad():
        for part in (0, 1):
            batch = _data(part)
            _, entropy, mask = dense(model(**batch).logits, batch["labels"])
            entropies.append(entropy.sum())
            tokens.append(mask.sum())
    _train(model, optimizer, driver, 0, 1)
    wanted = math.e / 2 * float(sum(entropies) / sum(tokens))
    assert wanted > math.log(2)
    assert float(penalty.weights[0]) == pytest.approx(wanted, rel=1e-5)
    _train(model, optimizer, driver, 1, 4)  # with evaluations in between
    assert driver.steps == 4
    assert len(penalty.weights) == 4
    assert penalty.moments == ["sites"] + ["after", "after", "evaluate"] * 2


@pytest.mark.parametrize("kind", ["spectral", "shadow"])
def test_resume_is_bit_exact(kind: Any) -> None:
    def rule() -> EntropyGovernor:
        return EntropyGovernor(
            OrthogonalityPenalty(kind, weight=0.1, refresh_every=3), cooldown=True
        )

    whole, _, whole_driver = _run(rule(), 12)
    first, optimizer, _ = _run(rule(), 7)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model = llama().train()
    ls.attach(model, ls.LoRAConfig(r=2))
    model.load_state_dict(saved["model"])
    resumed, optimizer, driver = _run(rule(), 0, model)
    optimizer.load_state_dict(saved["optimizer"])
    assert driver.steps == 7
    _train(resumed, optimizer, driver, 7, 12)
    for a, b in zip(find_sites(whole), find_sites(resumed), strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
    assert driver.metrics() == whole_driver.metrics()
    assert driver.rules[0].history == whole_driver.rules[0].history
    assert len(driver.rules[0].history) == 6
    assert driver.rules[0].alpha != math.e / 2
    assert [r["step"] for r in driver.rules[0].history] == [2, 4, 6, 8, 10, 12]


def test_the_reported_loss_never_contains_the_penalty() -> None:
    plain = llama().train()
    ls.attach(plain, ls.LoRAConfig(r=2))
    governed = copy.deepcopy(plain)
    optimizer = torch.optim.SGD([p for p in governed.parameters() if p.requires_grad], lr=0.1)
    rule = EntropyGovernor(OrthogonalityPenalty(weight=1e4, max_ratio=None, scale="sum"))
    with Dynamics(governed, rule, optimizer):
        for number in range(3):
            optimizer.zero_grad()
            loss = governed(**_data(number)).loss
            loss.backward()
            optimizer.step()
            reference = copy.deepcopy(plain)
            reference.load_state_dict(governed.state_dict())
            for mode in (True, False):
                governed.train(mode)
                wanted = reference.train(mode)(**_data(99)).loss
                assert torch.equal(governed(**_data(99)).loss, wanted)
            governed.train()
        assert float(rule.value()) > 0.1


def test_it_works_on_a_classifier() -> None:
    model = distilbert_classifier().train()
    ls.attach(model, ls.LoRAConfig(r=2, targets=["q_lin", "v_lin"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rule = EntropyGovernor()
    with Dynamics(model, rule, optimizer):
        out = model(input_ids=torch.randint(0, 30, (4, 6)), labels=torch.tensor([0, 1, 1, 0]))
        out.loss.backward()
        optimizer.step()
        p = out.logits.detach().double().softmax(-1)
        assert rule.metrics()["entropy"] == pytest.approx(
            float(torch.special.entr(p).sum(-1).mean()), rel=1e-5
        )


def test_it_drives_a_rotation_budget() -> None:
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    budget = RotationBudget(0.5, per="projection", kind="penalty", weight=0.1)
    governor = EntropyGovernor(budget)

    def gradients(act: Any) -> Tensor:
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        act()
        return torch.cat([p.grad.flatten() for p in adapter.parameters()])

    with Dynamics(model, governor, optimizer):
        driven = gradients(lambda: governor.before_step(_step(2.0)))
        alone = gradients(lambda: budget.apply(_step(2.0), 1.0))
    assert float(alone.norm()) > 0
    torch.testing.assert_close(driven, 0.1 * math.e * alone, rtol=1e-5, atol=0)


def test_the_penalty_cannot_be_listed_twice() -> None:
    penalty = OrthogonalityPenalty()
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with pytest.raises(LorasmithError, match="belongs to a training run"):
        Dynamics(model, [EntropyGovernor(penalty), penalty], optimizer)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"floor": math.inf}, "floor"),
        ({"patience": 0}, "patience"),
        ({"penalty": "spectral"}, "penalty"),
        ({"penalty": EntropyGovernor}, "penalty"),
    ],
)
def test_values_that_cannot_be_used(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EntropyGovernor(**options)
    assert caught.value.key == key
