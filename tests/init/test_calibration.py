"""Statistics against dense float64 sums over everything that the layers were fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import calibration
from lorasmith.core.calibration import collect
from lorasmith.core.layers import LayerInfo, describe
from lorasmith.errors import AttachError, ConfigError
from tests.contract.test_contract import assert_same, snapshot
from tests.models import distilbert_classifier, gpt2, llama, mlp


def infos_of(model: nn.Module) -> list[LayerInfo]:
    found = (describe(m, n) for n, m in model.named_modules())
    return [i for i in found if i is not None and i.name not in ("lm_head", "score")]


def token_batches(*, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (7, 5, 9):
        ids = torch.randint(0, 32, (3, length), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        if padded:
            mask = torch.ones_like(ids)
            mask[1, 3:] = 0
            mask[2, :2] = 0
            batch["attention_mask"] = mask
        made.append(batch)
    return made


def inputs_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Layer → all inputs at positions that are not masked, [tokens, d_in] in float64."""
    seen: dict[str, list[Tensor]] = {}
    mask: Tensor

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor]) -> None:
            seen.setdefault(name, []).append(args[0].double()[mask.bool()])

        return record

    handles = [
        model.get_submodule(i.name).register_forward_pre_hook(hook(i.name)) for i in infos_of(model)
    ]
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("padded", [False, True])
def test_covariance(build: Callable[[], nn.Module], padded: bool) -> None:
    model, batches = build(), token_batches(padded=padded)
    got = collect(model, infos_of(model), batches, {"covariance"})
    for name, x in inputs_of(model, batches).items():
        wanted = x.T @ x / len(x)
        assert got[name]["covariance"].dtype == torch.float32
        torch.testing.assert_close(
            got[name]["covariance"].double(), wanted, atol=1e-6, rtol=1e-6, msg=name
        )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_components(centered: bool, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(calibration, "_EXACT", 0)
    model, batches = llama(), token_batches(padded=True)
    name = f"{'' if centered else 'raw_'}inputs_svd:4"
    got = collect(model, infos_of(model), batches, {name})
    for layer, x in inputs_of(model, batches).items():
        matrix = x - x.mean(dim=0) if centered else x
        _, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        found = got[layer][name]
        assert found.count == len(x)
        torch.testing.assert_close(found.singular.double(), s[:4], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.total, float(s.square().sum()), atol=1e-4, rtol=1e-5)
        overlap = (found.vectors.double() * vt[:4]).sum(dim=1).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), atol=1e-4, rtol=0)


def test_components_where_there_are_many_features_and_a_large_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 40) @ torch.diag(0.8 ** torch.arange(40.0)) + 100
    info = LayerInfo("0", 40, 8, "linear", False, True)
    _, s, vt = torch.linalg.svd(x.double() - x.double().mean(dim=0), full_matrices=False)
    for kind in (calibration._ExactComponents, calibration._IncrementalComponents):
        sums = kind(info, torch.device("cpu"), 5, True)
        for part in x.split(137):
            sums.add(part)
        found = sums.value(1)
        torch.testing.assert_close(found.singular.double(), s[:5], atol=0, rtol=1e-3)
        overlap = (found.vectors.double() * vt[:5]).sum(dim=1).abs()
        assert float(overlap.min()) > 0.999, kind
        assert found.total == pytest.approx(float(s.square().sum()), rel=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2, distilbert_classifier])
def test_gradient(build: Callable[[], nn.Module]) -> None:
    model, batches = build(), token_batches(padded=True)
    if build is distilbert_classifier:
        batches = [{**b, "labels": b["labels"][:, 0] % 3} for b in batches]
    infos = infos_of(model)
    got = collect(model, infos, batches, {"gradient"})
    assert all(p.grad is None for p in model.parameters())
    reference = build().double()
    for batch in batches:
        (reference(**batch).loss / len(batches)).backward()
    for info in infos:
        weight = reference.get_submodule(info.name).weight
        wanted = weight.grad.T if info.kind == "conv1d" else weight.grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            got[info.name]["gradient"].double(), wanted, atol=1e-5 * scale, rtol=1e-4
        )


def test_gradient_sketch_is_exact_on_a_gradient_of_low_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50))
    batches = [(torch.randn(2, 60),) for _ in range(2)]  # four tokens: rank 4

    def loss(output: Tensor) -> Tensor:
        return output.pow(2).sum()

    infos = infos_of(model)
    names = {"gradient", "gradient_sketch:4"}
    got = collect(model, infos, batches, names, loss=loss)["0"]
    sketch = got["gradient_sketch:4"]
    again = sketch.U * sketch.S @ sketch.V.T
    torch.testing.assert_close(again, got["gradient"], atol=1e-4, rtol=1e-3)


def test_gradient_under_activations_in_place() -> None:
    x, gradients = torch.randn(2, 3, 6), []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(inplace), nn.Linear(8, 5, bias=False), nn.ReLU(inplace)
        )
        got = collect(
            model, infos_of(model), [x], {"gradient"}, loss=lambda output: output.pow(2).sum()
        )
        gradients.append([got[n]["gradient"] for n in "02"])
    assert all(float(g.abs().max()) > 0.01 for g in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_gradient_that_cannot_be_known_is_refused() -> None:
    """What full training would refuse, too: W's gradient needs the input as it was."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(x)
            hidden += self.a(hidden)
            return self.b(hidden)  # type: ignore[no-any-return]

    model, x = Overwrites(), torch.randn(4, 6)
    config = ls.LoRAConfig(r=2, init="lora_ga", targets="a")
    before = snapshot(model)
    with pytest.raises(AttachError, match="overwritten"):
        ls.attach(model, config, calibration=[x], calibration_loss=Tensor.sum)
    assert_same(model, before)


def test_a_layer_that_the_loss_does_not_depend_on_is_refused() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.b(x)
            return self.a(x)  # type: ignore[no-any-return]

    model, x = Beside(), torch.randn(4, 6)
    config = ls.LoRAConfig(r=2, init="lora_ga")
    before = snapshot(model)
    for loss, name in ((Tensor.sum, "b"), (lambda y: y.detach().sum(), "a")):
        with pytest.raises(AttachError, match=f"depend on {name}"):
            ls.attach(model, config, calibration=[x], calibration_loss=loss)
        assert_same(model, before)


def test_sums_keep_their_precision_under_autocast() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(50, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = collect(model, infos_of(model), [x], {"covariance", "inputs_svd:3"})["0"]
    torch.testing.assert_close(got["covariance"], x.T @ x / 50)
    wanted = torch.linalg.svdvals(x - x.mean(dim=0))[:3]
    torch.testing.assert_close(got["inputs_svd:3"].singular, wanted)


def test_layers_that_are_fed_the_same_share_one_matrix() -> None:
    model = llama()
    got = collect(model, infos_of(model), token_batches(), {"covariance"})
    block = "model.layers.1"
    q, k, v = (got[f"{block}.self_attn.{n}_proj"]["covariance"] for n in "qkv")
    assert q is k is v
    gate, up = (got[f"{block}.mlp.{n}_proj"]["covariance"] for n in ("gate", "up"))
    assert gate is up is not q


class _Fickle(nn.Module):
    """Two layers that share their input, but not always."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, shared: bool) -> Tensor:
        y = self.a(x)
        return y + self.b(x if shared else y)


def test_layers_that_share_their_input_only_sometimes() -> None:
    torch.manual_seed(0)
    model = _Fickle()
    x = torch.randn(2, 4, 6)
    batches = [(x[0], True), (x[1], False)]
    infos = infos_of(model)
    got = collect(model, infos, batches, {"covariance"})
    fed = torch.cat((x[0], model.a(x[1]))).detach()
    torch.testing.assert_close(got["b"]["covariance"], fed.T @ fed / 8)
    torch.testing.assert_close(got["a"]["covariance"], x.flatten(0, 1).T @ x.flatten(0, 1) / 8)
    before = snapshot(model)
    with pytest.raises(AttachError, match="read only once"):
        collect(model, infos, iter(batches), {"covariance"})
    assert_same(model, before)


def test_a_layer_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    model, x = Twice(), torch.randn(4, 6)
    got = collect(model, infos_of(model), [x, x], {"covariance"})["a"]["covariance"]
    fed = torch.cat((x, torch.tanh(model.a(x)))).detach()
    torch.testing.assert_close(got, fed.T @ fed / 8)


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_left_alone(raises: bool) -> None:
    model = llama()
    adapter = ls.attach(model, ls.LoRAConfig(r=2, targets="q_proj"), name="first")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = snapshot(model)
    random = torch.get_rng_state()

    def batches() -> Iterator[Any]:
        yield from token_batches()
        if raises:
            raise RuntimeError("the file is gone")

    infos = [i for i in infos_of(model) if "lorasmith" not in i.name]
    names = {"covariance", "gradient", "inputs_svd:3"}
    if raises:
        with pytest.raises(RuntimeError, match="gone"):
            collect(model, infos, batches(), names)
    else:
        found = collect(model, infos, batches(), names)
        assert torch.equal(torch.get_rng_state(), random)
        bare = collect(llama(), infos, token_batches(), names)
        for name in (i.name for i in infos):  # the other adapter had no say
            torch.testing.assert_close(found[name]["covariance"], bare[name]["covariance"])
            torch.testing.assert_close(found[name]["gradient"], bare[name]["gradient"])
    assert_same(model, before)
    assert ls.attached(model)["first"].name == "first"
    assert model.config.use_cache is True


def test_what_is_refused() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x = Partly(), torch.randn(3, 6)
    infos = infos_of(model)
    with pytest.raises(AttachError, match="No calibration batch reached unused"):
        collect(model, infos, [x], {"covariance"})
    with pytest.raises(ConfigError, match="no batch"):
        collect(model, infos, [], {"covariance"})
    with pytest.raises(AttachError, match="no loss"):
        collect(model, infos[:1], [x], {"gradient"})
    with pytest.raises(AttachError, match="not finite"):
        collect(model, infos[:1], [x * torch.inf], {"covariance"})
    with pytest.raises(ConfigError, match="tokenise the texts"):
        collect(model, infos[:1], ["a text"], {"covariance"})
    with pytest.raises(ConfigError, match="no statistic"):
        collect(model, infos[:1], [x], {"kurtosis"})
    with pytest.raises(ConfigError, match="takes no calibration"):
        ls.attach(model, ls.LoRAConfig(r=2), calibration=[x])
    with pytest.raises(ConfigError, match="none was given"):
        ls.attach(model, ls.LoRAConfig(r=2, init="eva"))
    assert not ls.attached(model)


def test_kinds_of_batches_and_progress() -> None:
    model, x = mlp(), torch.randn(4, 6)
    seen: list[int] = []
    batches = [x, (x,), [x], {"input": x}]
    got = collect(model, infos_of(model), batches, {"covariance"}, progress=seen.append)
    torch.testing.assert_close(got["0"]["covariance"], x.T @ x / 4)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("names", [{"covariance"}, {"inputs_svd:4"}, {"gradient"}])
def test_memory_does_not_grow_with_the_number_of_tokens(names: set[str]) -> None:
    """The tensors that exist from one batch to the next are the same, whatever has passed."""
    import gc

    model = llama()
    infos = infos_of(model)
    numbers: list[int] = []

    def count(_: int) -> None:
        gc.collect()
        tensors = {id(t): t for t in gc.get_objects() if type(t) is Tensor}
        numbers.append(sum(t.numel() for t in tensors.values()))

    batches = [token_batches()[2] for _ in range(8)]
    collect(model, infos, batches, names, progress=count)
    assert len(set(numbers[1:])) == 1, numbers


def test_on_the_meta_device_nothing_is_run() -> None:
    with torch.device("meta"):
        model = mlp()

    class Never:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("a batch was read")

    names = {"covariance", "gradient", "inputs_svd:3", "gradient_sketch:2"}
    got = collect(model, infos_of(model), Never(), names)
    assert got["0"]["covariance"].shape == (6, 6)
    assert got["2"]["gradient"].shape == (5, 8)


def test_attaching_tells_how_far_it_is() -> None:
    model, told = mlp(), []
    batches = [torch.randn(4, 6) for _ in range(3)]
    ls.attach(
        model,
        ls.LoRAConfig(r=2, init="eva"),
        calibration=batches,
        progress=lambda *step: told.append(step),
    )
    assert told == [("calibrating", i, 3) for i in (1, 2, 3)] + [("starting", i, 2) for i in (1, 2)]
