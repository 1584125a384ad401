"""What acts on a model: one adapter, a mix, another one for each row; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.adapter import state_of
from lorasmith.core.mixing import LayerRows, Mix, Rows, _runs
from lorasmith.errors import AttachError, ConfigError, FuseError, UnknownNameError
from tests.models import FAMILIES, distilbert_classifier, llama, mlp, randomise, run

X = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "a": ls.LoRAConfig(r=2),
    "b": ls.DoRAConfig(r=3, targets="0"),
    "c": ls.IA3Config(targets="2", modules_to_save=("0",)),
    "d": ls.IA3FFConfig(),
    "e": ls.LoRAConfig(r=4, alpha=2.0, scaling="rslora", init="pissa"),
}
ROWS = ["e", "a", None, "b"]


def several() -> tuple[nn.Module, dict[str | None, Tensor]]:
    model = mlp()
    outputs: dict[str | None, Tensor] = {None: model(X).detach()}
    for i, (name, config) in enumerate(CONFIGS.items()):
        randomise(ls.attach(model, config, name=name).parameters(), seed=i)
        outputs[name] = model(X).detach()
    return model, outputs


def by_rows(outputs: dict[str | None, Tensor], rows: list[str | None]) -> Tensor:
    return torch.stack([outputs[name][i] for i, name in enumerate(rows)])


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ["a", "b", "c", "d"],
        ["a", "a", "a", "a"],
        ["a", "a", "e", "e"],
        ["e", "a", "a", "a"],
        [None, None, "a", None],
        [None] * 4,
        ["d", "d", None, "d"],
        ["c", None, "c", "e"],
    ],
    ids=str,
)
@torch.no_grad()
def test_rows_of_different_variants(rows: list[str | None]) -> None:
    model, outputs = several()
    ls.use(model, rows)
    for _ in range(2):
        torch.testing.assert_close(model(X), by_rows(outputs, rows), atol=1e-5, rtol=1e-5)
    doubled = X.repeat_interleave(2, dim=0)
    got = model(doubled)[1::2]
    torch.testing.assert_close(got, by_rows(outputs, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_many_rows_share_few_adapters(tokens: int) -> None:
    """Sorted rows for a few tokens, fetched factors for many; ranks 2, 3 and 64."""
    model = mlp()
    for i, r in enumerate((2, 3, 64)):
        made = ls.attach(model, ls.LoRAConfig(r=r), name=str(i))
        randomise(made.parameters(), seed=i)
    x = torch.randn(9, tokens, 6)
    for rows in (list("010110011"), ["0", "1", None] * 3, list("012012012"), list("211222002")):
        expected = []
        for name, row in zip(rows, x, strict=True):
            with ls.use(model, name), torch.no_grad():
                expected.append(model(row))
        with ls.use(model, rows), torch.no_grad():
            torch.testing.assert_close(model(x), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_nested_blocks_restore_what_acted() -> None:
    model, outputs = several()
    rows, mix = by_rows(outputs, list(ROWS)), {"a": 0.5, "e": -1.0}
    ls.use(model, ROWS)
    with ls.use(model, mix):
        mixed = model(X)
        with ls.use(model, "a"):
            assert torch.equal(model(X), outputs["a"])
            with pytest.raises(ZeroDivisionError), ls.use(model, ["a"] * 4):
                raise ZeroDivisionError
            assert torch.equal(model(X), outputs["a"])
        assert torch.equal(model(X), mixed)
    torch.testing.assert_close(model(X), rows, atol=1e-5, rtol=1e-5)
    with pytest.raises(UnknownNameError, match="zz"):
        ls.use(model, {"a": 1.0, "zz": 1.0})
    torch.testing.assert_close(model(X), rows, atol=1e-5, rtol=1e-5)


def test_a_mix_of_one_is_that_adapter_bit_for_bit() -> None:
    model, outputs = several()
    for name in CONFIGS:
        ls.use(model, {name: 1.0})
        assert torch.equal(model(X), outputs[name])
    ls.use(model, {})
    assert torch.equal(model(X), outputs[None])
    ls.use(model, {"a": 0.0, "e": 0.0})
    assert torch.equal(model(X), outputs[None])


def test_what_is_no_choice() -> None:
    model, _ = several()
    for wrong in (
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": "1"},
        {"a": True},
        {1: 1.0},
        [],
        [1],
        3,
    ):
        with pytest.raises(ConfigError):
            ls.use(model, wrong)  # type: ignore[arg-type]
    for unknown in ("zz", ["a", "zz"], {"zz": 1.0}):
        with pytest.raises(UnknownNameError):
            ls.use(model, unknown)


def test_a_batch_without_these_rows_is_refused() -> None:
    model, _ = several()
    ls.use(model, ROWS)
    for wrong in (X[:3], X[:1], X.flatten(0, 1)[:5], X[0, 0]):
        with pytest.raises(AttachError, match="rows") as caught:
            model(wrong)
        assert caught.value.expected is not None
        assert "4" in caught.value.expected
        assert str(tuple(wrong.shape)) in str(caught.value.got)
    model(X)


def test_which_adapter_is_meant() -> None:
    model, _ = several()
    ls.use(model, {"a": 0.5, "e": 1.0})
    with pytest.raises(UnknownNameError, match=r"0\.5 a \+ 1 e"):
        ls.factors(model)
    ls.use(model, ["a", None, "e", "a"])
    with pytest.raises(UnknownNameError, match="by rows"):
        ls.factors(model)
    ls.use(model, ["a", None])
    assert set(ls.factors(model)) == {"0", "2"}


def test_adapters_come_and_go_while_others_act() -> None:
    model, outputs = several()
    ls.use(model, ROWS)
    ls.detach(model, "d")
    torch.testing.assert_close(model(X), by_rows(outputs, list(ROWS)), atol=1e-5, rtol=1e-5)
    ls.detach(model, "a")
    assert state_of(model).active == Rows(("e", None, None, "b"))  # type: ignore[union-attr]
    rows = ["e", None, None, "b"]
    torch.testing.assert_close(model(X), by_rows(outputs, list(rows)), atol=1e-5, rtol=1e-5)
    # Replaced: the new one acts where it is named.
    made = ls.attach(model, ls.LoRAConfig(r=1), name="a")
    randomise(made.parameters(), seed=9)
    new = model(X).detach()
    ls.use(model, ROWS)
    expected = by_rows({**outputs, "a": new}, list(ROWS))
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    ls.use(model, {"a": 1.0, "e": 2.0, "b": 1.0})
    ls.detach(model, "b")
    assert state_of(model).active == Mix((("a", 1.0), ("e", 2.0)))  # type: ignore[union-attr]
    ls.detach(model, "e")
    torch.testing.assert_close(model(X), new)
    with ls.use(model, "c"):
        ls.detach(model, "a")
    torch.testing.assert_close(model(X), outputs["c"])
    ls.detach(model)
    assert torch.equal(model(X), outputs[None])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_block_restores_what_is_left() -> None:
    model, outputs = several()
    ls.use(model, ROWS)
    with ls.use(model, None):
        ls.detach(model, "a")
    rows = ["e", None, None, "b"]
    torch.testing.assert_close(model(X), by_rows(outputs, list(rows)), atol=1e-5, rtol=1e-5)


def test_a_block_restores_rows_of_nobody() -> None:
    model, outputs = several()
    ls.use(model, [None] * 4)
    with ls.use(model, "a"):
        pass
    assert torch.equal(model(X), outputs[None])


class Wide(nn.Linear):
    """Computes in float32 under autocast, as 4-bit layers of bitsandbytes do for such inputs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.float(), self.weight, self.bias)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("choice", ["a", {"a": 0.5, "b": 0.5}, ["a", "b", None, "a"]], ids=str)
def test_autocast_leaves_the_dtype_of_the_layers_output(choice: Any, tokens: int) -> None:
    model = nn.Sequential(Wide(6, 8))
    for name in ("a", "b"):
        randomise(ls.attach(model, ls.LoRAConfig(r=2), name=name).parameters())
    x = torch.randn(4, tokens, 6)
    ls.use(model, choice)
    wanted = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(x)
        with torch.no_grad():
            evaluated = model(x)
    for output in (trained, evaluated):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, wanted, atol=0.02, rtol=0.02)


def test_each_is_trainable_on_its_own() -> None:
    model, _ = several()
    adapters = ls.attached(model)
    adapters["a"].requires_grad_(False)
    made = ls.attach(model, ls.LoRAConfig(r=2), name="new")
    assert not any(p.requires_grad for p in adapters["a"].parameters())
    assert all(p.requires_grad for p in adapters["e"].parameters())
    randomise(made.parameters())
    ls.use(model, ["a", "new", "a", "e"])
    model(X).pow(2).sum().backward()
    assert all(p.grad is None for n in "abcd" for p in adapters[n].parameters())
    assert all(p.grad is not None for n in ("new", "e") for p in ls.attached(model)[n].parameters())


def test_loading_leaves_the_others_as_they_were(tmp_path: Any) -> None:
    model, outputs = several()
    ls.save(model, tmp_path / "a", name="a")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    ls.use(model, ROWS)
    loaded = ls.load(model, tmp_path / "a", name="again")
    assert not any(p.requires_grad for p in loaded.parameters())
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n] for n in before} == before
    ls.use(model, ["again", "a", "e", None])
    expected = by_rows(outputs, ["a", "a", "e", None])
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


def test_fusing_a_mix() -> None:
    model, _ = several()
    weights, mix = dict(model.named_parameters()), {"a": 0.5, "b": 2.0, "e": -1.0}
    before = {n: p.detach().clone() for n, p in weights.items()}
    with ls.use(model, mix):
        expected = model(X)
    report = ls.fuse(model, mix)
    assert report.adapter == "0.5 a + 2 b + -1 e"
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    ls.use(model, mix)
    for wrong in ("a", None, ROWS, {"a": 0.5}):
        with pytest.raises(AttachError, match="fused"):
            ls.use(model, wrong)
    with pytest.raises(FuseError, match="already"):
        ls.fuse(model, "c")
    ls.detach(model, "d")  # has no part in it
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    ls.detach(model, "a")  # has: the mix is taken out first
    assert all(torch.equal(weights[n], before[n]) for n in before if "lorasmith" not in n)
    with ls.use(model, {"b": 2.0, "e": -1.0}):
        rest = model(X)
    assert torch.equal(model(X), rest)
    ls.fuse(model)
    torch.testing.assert_close(model(X), rest, atol=1e-5, rtol=1e-5)
    with pytest.raises(FuseError, match="stay"):
        ls.detach(model, "b", keep_fused=True)
    ls.detach(model, keep_fused=True)
    torch.testing.assert_close(model(X), rest, atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def test_rows_cannot_be_fused() -> None:
    model, _ = several()
    ls.use(model, ROWS)
    with pytest.raises(FuseError, match="row"):
        ls.fuse(model)
    with pytest.raises(FuseError, match="row"):
        ls.fuse(model, ROWS)  # type: ignore[arg-type]
    with pytest.raises(FuseError):
        ls.fuse(model, {})
    with pytest.raises(UnknownNameError):
        ls.fuse(model, {"a": 1.0, "zz": 1.0})
    model(X)


def test_keeping_one_fused_leaves_the_others_usable() -> None:
    model, outputs = several()
    ls.fuse(model, "a")
    ls.detach(model, "a", keep_fused=True)
    torch.testing.assert_close(model(X), outputs["a"], atol=1e-5, rtol=1e-5)
    ls.use(model, "e")
    assert not torch.allclose(model(X), outputs["a"])


def test_whole_modules_in_mixes_and_rows() -> None:
    model = distilbert_classifier()
    batch = FAMILIES["classifier"].batch()
    outputs: dict[str | None, Tensor] = {None: run(model, batch).detach()}
    for i, name in enumerate("ab"):
        config = ls.LoRAConfig(r=2, targets="pre_classifier", modules_to_save=("classifier",))
        randomise(ls.attach(model, config, name=name).parameters(), seed=i)
        outputs[name] = run(model, batch).detach()
    for rows in (["a", "b"], ["b", None], ["a", "a"]):
        ls.use(model, rows)
        expected = torch.stack([outputs[n][i] for i, n in enumerate(rows)])
        torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=1e-5)
    # Linear in the classifier alone, so the other adapter sits before a ReLU that both share.
    for adapter in ls.attached(model).values():
        for part in adapter.layers().values():
            torch.nn.init.zeros_(part["B"])
    singles: dict[str | None, Tensor] = {}
    for single in (None, "a", "b"):
        with ls.use(model, single):
            singles[single] = run(model, batch)
    ls.use(model, {"a": 0.25, "b": -2.0})
    base = singles[None]
    expected = base + 0.25 * (singles["a"] - base) - 2.0 * (singles["b"] - base)
    torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=1e-5)
    run(model, batch).sum().backward()
    ls.fuse(model)
    torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(FuseError, match="whole modules"):
        ls.detach(model, keep_fused=True)
    ls.use(model, {"a": 0.25, "b": -2.0})
    ls.unfuse(model)
    ls.use(model, ["a", "b", "a"])
    with pytest.raises(AttachError, match="rows"):
        run(model, batch)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_by_rows(beams: int) -> None:
    """Left-padded prompts, each with its own adapter: the same tokens as one at a time."""
    model = llama(layers=2)
    for i, name in enumerate("ab"):
        config = ls.LoRAConfig(r=4, alpha=8) if name == "a" else ls.IA3Config()
        randomise(ls.attach(model, config, name=name).parameters(), scale=0.4, seed=i)
    tokens = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 2, 1, 3)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    rows, alone = ["a", None, "b", "a"], []
    for i, name in enumerate(rows):
        with ls.use(model, name):
            batch = {"input_ids": tokens[i : i + 1], "attention_mask": mask[i : i + 1]}
            alone.append(model.generate(**batch, **settings))  # type: ignore[operator]
    assert len({tuple(t[0, 5:].tolist()) for t in alone}) > 1, "the test is void"
    with ls.use(model, rows):
        got = model.generate(input_ids=tokens, attention_mask=mask, **settings)  # type: ignore[operator]
    assert torch.equal(got, torch.cat(alone))


def test_nothing_resident_is_built_while_training() -> None:
    model, _ = several()
    ls.use(model, ["a", "e"])
    plan = model[0].lorasmith.plan  # type: ignore[index, union-attr]
    assert isinstance(plan, LayerRows)
    model(X).sum().backward()
    assert not plan._kept
    with torch.no_grad():
        model(X)
        kept = plan._kept
        model(X)
        assert plan._kept is kept
        assert isinstance(kept, tuple)


def test_resident_factors_serve_inputs_with_gradients() -> None:
    """What was built in inference mode must not break a later backward pass."""
    model, outputs = several()
    for adapter in ls.attached(model).values():
        adapter.requires_grad_(False)
    ls.use(model, ROWS)
    with torch.inference_mode():
        model(X)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(model(X), by_rows(outputs, list(ROWS)), atol=1e-5, rtol=1e-5)


def test_runs() -> None:
    assert _runs([2, 2, 0, 0]) == (2, 0)
    assert _runs([2, 2, 2]) == (2,)
    assert _runs([0, 0, 1, 1, 1, 1]) == (0, 1, 1)
    assert _runs([0, 1, 1]) == (0, 1, 1)


def test_switching_between_rows_after_compiling() -> None:
    torch._dynamo.reset()
    model, outputs = several()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (["a", "e", None, "a"], ["e", "e", "a", "a"], ["a", "e", None, "a"]):
        ls.use(compiled, rows)
        torch.testing.assert_close(compiled(X), by_rows(outputs, rows), atol=1e-5, rtol=1e-5)
    ls.use(compiled, "a")
    torch.testing.assert_close(compiled(X), outputs["a"], atol=1e-5, rtol=1e-5)
