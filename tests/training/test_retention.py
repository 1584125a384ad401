"""Retention: against dense float64 computation, for every way to say what is compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.diagnostics.records import Retention
from lorasmith.errors import (
    AttachError,
    ConfigError,
    DataError,
    ModelError,
    UnknownNameError,
)
from lorasmith.training import retention as module
from lorasmith.training.evaluate import perplexity
from lorasmith.training.retention import divergence, read_text, retention
from tests.models import gpt2, randomise
from tests.training.tiny import make_model, make_tokenizer, save_tiny

TEXT = "Count to 7. please please, assistant: " * 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def adapted(tokenizer: Any, **config: Any) -> Any:
    """A tiny model with an adapter that does something."""
    model = make_model(tokenizer)
    randomise(ls.attach(model, ls.LoRAConfig(r=2, **config)).parameters())
    return model


def dense(before: Any, after: Any, ids: list[int]) -> tuple[float, float, float, float]:
    """Perplexities, KL and agreement of one window, from all logits, in float64."""
    batch = torch.tensor([ids])
    with torch.no_grad():
        p, q = (f(batch)[0, :-1].double().log_softmax(-1) for f in (before, after))
    x = batch[0, 1:]
    n = torch.arange(len(x))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return (
        math.exp(-float(p[n, x].mean())),
        math.exp(-float(q[n, x].mean())),
        float(kl),
        float(same),
    )


def figures(found: Retention) -> tuple[float, float, float, float]:
    return found.perplexity_before, found.perplexity_after, found.kl, found.agreement


def logits_of(model: Any, choice: Any) -> Any:
    def run(batch: Tensor) -> Tensor:
        with ls.use(model, choice):
            return model(batch).logits

    return run


# -- the measure itself ------------------------------------------------------------------------


def test_divergence_is_that_of_the_definition() -> None:
    p, q = torch.randn(2, 7, 11, dtype=torch.float64)
    targets = torch.randint(0, 11, (7,))
    before, after, kl, agreed = divergence(p, q, targets)
    P, Q = p.softmax(-1), q.softmax(-1)
    assert before == pytest.approx(-sum(math.log(P[i, t]) for i, t in enumerate(targets)))
    assert after == pytest.approx(-sum(math.log(Q[i, t]) for i, t in enumerate(targets)))
    assert kl == pytest.approx(float(torch.nn.functional.kl_div(Q.log(), P, reduction="sum")))
    assert agreed == int((P.argmax(-1) == Q.argmax(-1)).sum())


def test_divergence_of_equals_is_zero() -> None:
    p = torch.randn(5, 9, dtype=torch.float64)
    p[:, 3] = -math.inf  # ruled out by both
    _, _, kl, agreed = divergence(p, p.clone(), torch.zeros(5, dtype=torch.long))
    assert (kl, agreed) == (0.0, 5)


def test_divergence_is_infinite_where_the_tuned_model_rules_out_what_the_base_says() -> None:
    p = torch.zeros(1, 3, dtype=torch.float64)
    q = p.clone()
    q[0, 1] = -math.inf
    assert divergence(p, q, torch.tensor([0]))[2] == math.inf


# -- against the dense computation -----------------------------------------------------------


@pytest.mark.parametrize("chunk", [16, 2**22])
def test_an_attached_adapter(tokenizer: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    model = adapted(tokenizer)
    found = retention(model, TEXT, tokenizer=tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert found.tokens == len(ids) - 1 > 64
    wanted = dense(logits_of(model, None), logits_of(model, "default"), ids)
    assert figures(found) == pytest.approx(wanted, rel=1e-6)
    assert found.kl > 1e-3
    assert found.text == "given text"


def test_perplexities_are_those_of_evaluate_over_several_windows(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    found = retention(model, TEXT, tokenizer=tokenizer, window=32, stride=12)
    sizes: dict[str, Any] = {"window": 32, "stride": 12}
    assert found.perplexity_after == pytest.approx(
        perplexity(model, tokenizer, TEXT, **sizes), rel=1e-6
    )
    with ls.use(model, None):
        assert found.perplexity_before == pytest.approx(
            perplexity(model, tokenizer, TEXT, **sizes), rel=1e-6
        )


def test_every_token_but_the_first_is_scored_once() -> None:
    for count in range(1, 40):
        for window, stride in ((2, 1), (8, 3), (8, 7), (64, 32)):
            scored = [t for _, a, b in module._windows(count, window, stride) for t in range(a, b)]
            assert scored == list(range(1, count))
            assert all(
                b - s <= window and a > s for s, a, b in module._windows(count, window, stride)
            )


def test_texts_do_not_see_each_other(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    one, two = TEXT[:200], TEXT[100:180]
    both = retention(model, [one, two], tokenizer=tokenizer)
    parts = [retention(model, t, tokenizer=tokenizer) for t in (one, two)]
    assert both.tokens == sum(p.tokens for p in parts)
    assert both.kl == pytest.approx(sum(p.kl * p.tokens for p in parts) / both.tokens)
    assert both.agreement == pytest.approx(sum(p.agreement * p.tokens for p in parts) / both.tokens)
    assert both.text == "2 given texts"


def test_the_head_and_the_embedding_may_be_adapted(tokenizer: Any) -> None:
    """Then the two sides differ in the head itself, not only in what enters it."""
    model = make_model(tokenizer, tie_word_embeddings=False)
    randomise(ls.attach(model, ls.LoRAConfig(r=2, targets=("lm_head", "q_proj"))).parameters())
    found = retention(model, TEXT, tokenizer=tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    wanted = dense(logits_of(model, None), logits_of(model, "default"), ids)
    assert figures(found) == pytest.approx(wanted, rel=1e-6)


def test_a_soft_cap_is_the_models_own(tokenizer: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=2.0,
            initializer_range=0.3,
        )
    ).eval()
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters())
    found = retention(model, TEXT, tokenizer=tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    wanted = dense(logits_of(model, None), logits_of(model, "default"), ids)
    assert figures(found) == pytest.approx(wanted, rel=1e-5)


def test_a_head_out_of_reach_uses_the_full_logits_and_says_so(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tokenizer)
    wanted = retention(model, TEXT, tokenizer=tokenizer)
    monkeypatch.setattr(module, "head_input", lambda *_: "it has none")
    with pytest.warns(UserWarning, match="because it has none"):
        found = retention(model, TEXT, tokenizer=tokenizer)
    assert figures(found) == pytest.approx(figures(wanted), rel=1e-6)


# -- what is compared --------------------------------------------------------------------------


def test_two_models(tokenizer: Any) -> None:
    base, tuned = make_model(tokenizer), make_model(tokenizer, seed=1)
    found = retention(base, TEXT, tuned=tuned, tokenizer=tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    wanted = dense(lambda b: base(b).logits, lambda b: tuned(b).logits, ids)
    assert figures(found) == pytest.approx(wanted, rel=1e-6)
    same = retention(base, TEXT, tuned=make_model(tokenizer), tokenizer=tokenizer)
    assert (same.kl, same.agreement, same.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_a_second_model_is_compared_with_the_first_without_its_adapters(tokenizer: Any) -> None:
    tuned = make_model(tokenizer, seed=1)
    plain = retention(make_model(tokenizer), TEXT, tuned=tuned, tokenizer=tokenizer)
    model = adapted(tokenizer)
    assert retention(model, TEXT, tuned=tuned, tokenizer=tokenizer) == plain


def test_a_directory_is_loaded_for_the_time(tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(tokenizer)
    wanted = retention(model, TEXT, tokenizer=tokenizer)
    ls.save(model, tmp_path / "a")
    plain = make_model(tokenizer)
    names = [n for n, _ in plain.named_parameters()]
    found = retention(plain, TEXT, adapter=tmp_path / "a", tokenizer=tokenizer)
    assert figures(found) == pytest.approx(figures(wanted), rel=1e-9)
    assert ls.attached(plain) == {}
    assert [n for n, p in plain.named_parameters() if p.requires_grad] == names
    # Beside one that acts, which acts again afterwards.
    other = adapted(tokenizer, targets=("q_proj",))
    batch = torch.tensor([[1, 2, 3]])
    before = other(batch).logits
    found = retention(other, TEXT, adapter=str(tmp_path / "a"), tokenizer=tokenizer)
    assert figures(found) == pytest.approx(figures(wanted), rel=1e-9)
    assert list(ls.attached(other)) == ["default"]
    assert torch.equal(other(batch).logits, before)


def test_mixes_names_and_another_adapter_as_the_base(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    randomise(ls.attach(model, ls.LoRAConfig(r=2), name="b").parameters(), seed=3)
    ids = tokenizer(TEXT)["input_ids"]
    for choice in ("b", {"default": 0.5, "b": -0.25}):
        found = retention(model, TEXT, adapter=choice, tokenizer=tokenizer)
        wanted = dense(logits_of(model, None), logits_of(model, choice), ids)
        assert figures(found) == pytest.approx(wanted, rel=1e-6)
    found = retention(model, TEXT, adapter="b", against="default", tokenizer=tokenizer)
    wanted = dense(logits_of(model, "default"), logits_of(model, "b"), ids)
    assert figures(found) == pytest.approx(wanted, rel=1e-6)
    # By default what acts, be it a mix.
    mix = {"default": 0.5, "b": 0.5}
    with ls.use(model, mix):
        found = retention(model, TEXT, tokenizer=tokenizer)
    assert found == retention(model, TEXT, adapter=mix, tokenizer=tokenizer)


def test_an_adapter_that_does_not_act_is_the_one_that_is_meant(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    wanted = retention(model, TEXT, tokenizer=tokenizer)
    ls.use(model, None)
    batch = torch.tensor([[1, 2, 3]])
    before = model(batch).logits
    assert retention(model, TEXT, tokenizer=tokenizer) == wanted
    assert torch.equal(model(batch).logits, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_pefts_adapters(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = make_model(tokenizer)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make_model(tokenizer), config)
    model.add_adapter("b", config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batch = torch.tensor([[1, 2, 3]])
    before = model(batch).logits
    ids = tokenizer(TEXT)["input_ids"]
    found = retention(model, TEXT, tokenizer=tokenizer)
    wanted = dense(lambda b: plain(b).logits, lambda b: model(b).logits, ids)
    assert figures(found) == pytest.approx(wanted, rel=1e-5)
    other = retention(model, TEXT, adapter="b", tokenizer=tokenizer)
    assert other.perplexity_before == found.perplexity_before
    assert other.kl != found.kl
    # Switching in PEFT turns gradients on; here they stay as they were.
    assert not any(p.requires_grad for p in model.parameters())
    assert model.active_adapters == ["default"]
    assert torch.equal(model(batch).logits, before)
    with pytest.raises(UnknownNameError, match="'c'"):
        retention(model, TEXT, adapter="c", tokenizer=tokenizer)


def test_a_path_instead_of_a_model(tokenizer: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    model = adapted(tokenizer)
    ls.save(model, tmp_path / "a")
    found = retention(str(tmp_path / "base"), TEXT, adapter=tmp_path / "a")
    wanted = retention(model, TEXT, tokenizer=tokenizer)
    assert figures(found) == pytest.approx(figures(wanted), rel=1e-6)
    # The tokenizer of a model that was loaded from a directory is found by its name.
    loaded = type(model).from_pretrained(tmp_path / "base")
    again = retention(loaded, TEXT, adapter=tmp_path / "a")
    assert figures(again) == pytest.approx(figures(wanted), rel=1e-6)


# -- nothing is changed ------------------------------------------------------------------------


def test_flags_weights_and_adapters_are_as_before(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    model.train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    values = {n: t.clone() for n, t in model.state_dict().items()}
    retention(model, TEXT, tokenizer=tokenizer)
    with pytest.raises(DataError):
        retention(model, "", tokenizer=tokenizer)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert list(ls.attached(model)) == ["default"]


def test_progress_counts_the_tokens(tokenizer: Any) -> None:
    said: list[tuple[str, int, int]] = []
    found = retention(
        adapted(tokenizer),
        TEXT,
        tokenizer=tokenizer,
        window=32,
        stride=16,
        progress=lambda *a: said.append(a),
    )
    assert len(said) > 2
    assert said[-1] == ("retention", found.tokens, found.tokens)


def test_a_window_is_no_longer_than_the_model_has_places(tokenizer: Any) -> None:
    model = gpt2()  # 32 positions
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters())

    class Tokens:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 32 for c in text]}

    found = retention(model, "any text at all " * 8, tokenizer=Tokens())
    assert found.tokens == 127


# -- texts -------------------------------------------------------------------------------------


def test_texts(tmp_path: Path) -> None:
    name, (prose,) = read_text(None)
    assert name == "builtin"
    assert 10_000 < len(prose) <= 12_000
    file = tmp_path / "text.txt"
    file.write_text("Grüße", encoding="utf-8")
    assert read_text(file) == (str(file), ["Grüße"])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_text(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "nowhere")
    for empty in ("", " \n", [], ["", " "]):
        with pytest.raises(DataError, match="empty"):
            read_text(empty)


# -- mistakes ----------------------------------------------------------------------------------


def test_mistakes(tokenizer: Any, tmp_path: Path) -> None:
    plain, model = make_model(tokenizer), adapted(tokenizer)
    with pytest.raises(UnknownNameError, match="no adapter"):
        retention(plain, TEXT, tokenizer=tokenizer)
    with pytest.raises(UnknownNameError, match="'other'"):
        retention(model, TEXT, adapter="other", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="two ways"):
        retention(model, TEXT, adapter="default", tuned=plain, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="window"):
        retention(model, TEXT, tokenizer=tokenizer, window=8, stride=8)
    with pytest.raises(ConfigError, match="tokenizer"):
        retention(model, TEXT)
    with pytest.raises(DataError, match="too short"):
        retention(model, "a", tokenizer=tokenizer)
    other = make_model(tokenizer, vocab_size=len(tokenizer) + 3)
    with pytest.raises(ModelError, match="vocabularies"):
        retention(plain, TEXT, tuned=other, tokenizer=tokenizer)


def test_a_fused_adapter_must_be_unfused_first(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    ls.fuse(model)
    with pytest.raises(AttachError, match="fused"):
        retention(model, TEXT, tokenizer=tokenizer)


def test_no_logits_of_a_whole_window_are_held(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)  # the least: 16 rows
    model = adapted(tokenizer)
    seen: list[int] = []
    head: nn.Module = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    retention(model, TEXT, tokenizer=tokenizer)
    assert max(seen) == 16
