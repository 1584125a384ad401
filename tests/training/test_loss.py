"""The chunked cross-entropy against PyTorch's and the models' own losses over full logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from lorasmith.errors import ConfigError, DataError, TrainingError
from lorasmith.training.loss import (
    model_loss,
    model_loss_output,
    supervised_cross_entropy,
)

VOCAB = 97


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they gain from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _small(kind: Any, **more: Any) -> PreTrainedConfig:
    if kind is GPT2Config:
        return GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
            **more,
        )
    return kind(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "gpt2": (GPT2Config, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "mixtral": (
        MixtralConfig,
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    kind, more = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(_small(kind, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual initialisation (0.02) leaves logits so flat that a soft cap, or a wrong
            # position, would hardly show.
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.to(dtype)


def _batch(rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    labels[mask == 0] = -100
    labels[:, 0] = ids[:, 0]  # must be ignored: nothing predicts a first token
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _dense(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Losses and entropies at supervised positions through all the logits, one by one."""
    logits = F.linear(hidden, weight, bias) * scale
    logits = cap * torch.tanh(logits / cap)
    losses, entropies = [], []
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[b, t + 1] != -100:
                p = torch.softmax(logits[b, t], dim=-1)
                losses.append(-torch.log(p[labels[b, t + 1]]))
                entropies.append(-(p * torch.log(p)).sum())
    return torch.stack(losses), torch.stack(entropies)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("head_trains", [False, True])
def test_equals_the_dense_computation(reduction: Any, chunk: int | None, head_trains: bool) -> None:
    torch.manual_seed(0)
    labels = _batch()["labels"]
    shapes = {"hidden": (*labels.shape, 8), "weight": (VOCAB, 8), "bias": (VOCAB,)}
    leaves = {k: torch.randn(s, dtype=torch.float64) * 2 for k, s in shapes.items()}
    ours = {k: v.clone().requires_grad_(k == "hidden" or head_trains) for k, v in leaves.items()}
    theirs = {k: v.clone().requires_grad_(k == "hidden" or head_trains) for k, v in leaves.items()}

    got = supervised_cross_entropy(
        ours["hidden"],
        ours["weight"],
        labels,
        head_bias=ours["bias"],
        chunk=chunk,
        reduction=reduction,
        logit_scale=0.7,
        softcap=5.0,
        with_entropy=True,
    )
    losses, entropies = _dense(theirs["hidden"], theirs["weight"], theirs["bias"], labels, 0.7, 5.0)
    expected = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    assert got.count == len(losses)
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=1e-12)
    assert got.entropy is not None
    assert not got.entropy.requires_grad
    torch.testing.assert_close(got.entropy, entropies.detach(), rtol=1e-12, atol=1e-12)

    # A gradient that is not 1 and, for "none", differs from row to row.
    grad = torch.randn_like(expected)
    got.loss.backward(grad)
    expected.backward(grad)
    for name, leaf in ours.items():
        torch.testing.assert_close(leaf.grad, theirs[name].grad, rtol=1e-10, atol=1e-12)


def test_float32_agrees_to_1e_6_at_a_real_vocabulary() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 40, 64)
    weight = torch.randn(5000, 64) * 0.3
    labels = torch.randint(5000, (1, 40))
    leaf, reference = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = supervised_cross_entropy(leaf, weight, labels).loss
    logits = reference @ weight.double().t()
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    got.backward()
    expected.backward()
    assert abs(got.item() - expected.item()) < 1e-6 * expected.item()
    assert leaf.grad is not None
    assert reference.grad is not None
    assert (leaf.grad - reference.grad).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(12,), (1, 12)])
def test_one_sequence_may_come_without_a_batch_dimension(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 4), torch.randn(VOCAB, 4)
    labels = torch.arange(12)
    expected = F.cross_entropy(hidden[:-1] @ weight.t(), labels[1:])
    got = supervised_cross_entropy(hidden.reshape(*shape, 4), weight, labels.reshape(shape))
    torch.testing.assert_close(got.loss, expected)


def test_bfloat16_takes_its_softmax_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, 32, dtype=torch.bfloat16)
    labels = torch.randint(VOCAB, (2, 20))
    got = supervised_cross_entropy(hidden, weight, labels)
    logits = (hidden.detach() @ weight.t()).float()  # rounded to bfloat16 once, as a model does
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected, rtol=1e-3, atol=0)
    got.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad[:, -1].abs().max() == 0  # the last position predicts nothing


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_tensor_of_the_size_of_the_logits_is_made() -> None:
    hidden = torch.randn(4, 64, 16, requires_grad=True)
    weight = torch.randn(1000, 16)
    labels = torch.randint(1000, (4, 64))
    with _Largest() as seen:
        supervised_cross_entropy(hidden, weight, labels, chunk=8, with_entropy=True).loss.backward()
    assert seen.elements == weight.numel()  # > chunk · vocabulary; the logits have 256,000


def test_no_gradient_is_computed_without_grad_mode() -> None:
    hidden = torch.randn(1, 8, 4, requires_grad=True)
    weight = torch.randn(VOCAB, 4, requires_grad=True)
    labels = torch.randint(VOCAB, (1, 8))
    with torch.no_grad():
        out = supervised_cross_entropy(hidden, weight, labels)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, supervised_cross_entropy(hidden, weight, labels).loss)


def test_errors_name_what_is_wrong() -> None:
    hidden, weight = torch.randn(1, 4, 8), torch.randn(VOCAB, 8)
    with pytest.raises(DataError, match="No token of the batch is supervised"):
        supervised_cross_entropy(hidden, weight, torch.tensor([[5, -100, -100, -100]]))
    with pytest.raises(DataError, match="outside the vocabulary"):
        supervised_cross_entropy(hidden, weight, torch.tensor([[0, 1, VOCAB, 2]]))
    with pytest.raises(ConfigError, match="Hidden states and labels"):
        supervised_cross_entropy(hidden, weight, torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ConfigError, match="Hidden states and head"):
        supervised_cross_entropy(hidden, weight[:, :4], torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigError, match="chunk"):
        supervised_cross_entropy(hidden, weight, torch.zeros(1, 4, dtype=torch.long), chunk=0)
    with pytest.raises(ConfigError, match="soft cap"):
        supervised_cross_entropy(hidden, weight, torch.zeros(1, 4, dtype=torch.long), softcap=0.0)


# --- whole models ------------------------------------------------------------------------


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def _compare(model: Any, batch: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    """Loss and all gradients of model_loss against those of the model itself."""
    expected = model(**batch, **options).loss
    expected.backward()
    theirs = _gradients(model)
    got = model_loss(model, batch, chunk=5, **options)
    got.backward()
    ours = _gradients(model)
    assert abs(got.item() - expected.item()) <= tolerance * abs(expected.item())
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = max(1e-3, grad.abs().max().item())
        assert (ours[name] - grad).abs().max().item() <= 10 * tolerance * scale, name


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("trained", ["everything", "all but the embeddings"])
def test_equals_the_loss_of_the_model(name: str, trained: str) -> None:
    # float64 (models upcast logits only to float32, hence 1e-6 and not 1e-12), except where the
    # mixture of experts has no kernel for it.
    model = _model(name, torch.float32 if name == "mixtral" else torch.float64)
    if trained != "everything":
        for parameter in (*model.get_input_embeddings().parameters(), model.lm_head.weight):
            parameter.requires_grad_(False)
    _compare(model, _batch(), 1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equals_the_loss_of_the_model_in_float32(name: str) -> None:
    _compare(_model(name), _batch(), 1e-6)


def test_gradient_accumulation_adds_up_to_the_large_batch() -> None:
    model = _model("llama")
    batch = _batch(rows=4)
    items = (batch["labels"][:, 1:] != -100).sum()  # as Trainer counts them
    model_loss(model, batch).backward()
    whole = _gradients(model)
    for rows in (slice(0, 1), slice(1, 4)):
        micro = {k: v[rows] for k, v in batch.items()}
        ours = model_loss(model, micro, num_items_in_batch=items)
        torch.testing.assert_close(ours, model(**micro, num_items_in_batch=items).loss)
        ours.backward()
    for name, grad in _gradients(model).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-6)


def test_entropy_is_that_of_the_models_distribution() -> None:
    model, batch = _model("gemma2"), _batch()
    out = model_loss_output(model, batch, with_entropy=True, chunk=4)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    at = batch["labels"][:, 1:] != -100
    expected = torch.distributions.Categorical(logits=logits[:, :-1][at]).entropy()
    assert out.entropy is not None
    assert out.count == len(expected)
    torch.testing.assert_close(out.entropy, expected.detach(), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing() -> None:
    model, batch = _model("llama"), _batch()
    model.train()
    model_loss(model, batch).backward()
    plain = _gradients(model)
    model.activation_checkpointing_enable()
    model_loss(model, batch).backward()
    for name, grad in _gradients(model).items():
        torch.testing.assert_close(grad, plain[name])


def test_autocast_set_inside_the_forward_reaches_the_head() -> None:
    """Trainer has no autocast around the loss: accelerate puts it into ``model.forward``."""
    model, batch = _model("llama"), _batch()
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    model.forward = forward
    seen: list[torch.dtype] = []

    class Watch(_Largest):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and VOCAB in out.shape:
                seen.append(out.dtype)
            return out

    expected = model(**batch).loss
    with Watch():
        got = model_loss(model, batch)
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=0)
    got.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_hooks_are_gone_afterwards_even_after_a_failure() -> None:
    model, batch = _model("llama"), _batch()
    model_loss(model, batch)
    with pytest.raises(TypeError):
        model_loss(model, {**batch, "position_ids": "nonsense"})
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_only_supervised_positions_go_through_the_head() -> None:
    model, batch = _model("llama"), _batch(rows=4, length=30)
    batch["labels"][:, :-2] = -100
    model_loss(model, batch)  # the first call also compares the head's arithmetic
    with _Largest() as seen:
        model_loss(model, batch, chunk=4).backward()
    assert seen.elements < batch["input_ids"].numel() * VOCAB / 2


class _Doubled(nn.Module):
    """An adapter on the head: what the weight alone says is not what the module does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = linear.weight
        self.gain = nn.Parameter(torch.full((VOCAB,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain


def test_a_head_with_an_adapter_is_called_as_a_module() -> None:
    model = _model("untied")
    model.set_output_embeddings(_Doubled(model.lm_head))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compare(model, _batch(), 2e-6)


def test_a_hook_on_the_head_takes_part() -> None:
    model, batch = _model("llama"), _batch()
    model_loss(model, batch)
    factor = torch.linspace(0.5, 2.0, VOCAB)
    model.lm_head.register_forward_hook(lambda module, args, output: output * factor)
    _compare(model, batch, 2e-6)


def test_unknown_arithmetic_after_the_head_falls_back_loudly() -> None:
    model, batch = _model("llama"), _batch()
    inner = model.forward

    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits = out.logits + torch.linspace(-3, 3, VOCAB)
        if labels is not None:
            out.loss = model.loss_function(out.logits, labels, vocab_size=VOCAB)
        return out

    model.forward = forward
    expected = model(**batch).loss
    with pytest.warns(UserWarning, match="full logits.*after the head"):
        got = model_loss_output(model, batch, with_entropy=True)
    torch.testing.assert_close(got.loss, expected)
    assert got.entropy is not None
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        torch.testing.assert_close(model_loss(model, batch), expected)


def test_an_undeclared_soft_cap_is_noticed_on_the_first_call() -> None:
    """Logits of a fresh model are too small to show a cap; larger hidden states do."""
    torch.manual_seed(0)
    kind, more = CONFIGS["llama"]
    model = AutoModelForCausalLM.from_config(_small(kind, **more))
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **{k: v for k, v in kwargs.items() if k != "labels"})
        out.logits = 30 * torch.tanh(out.logits / 30)
        out.loss = out.logits.sum()
        return out

    model.forward = forward
    with pytest.warns(UserWarning, match="after the head"):
        model_loss(model, _batch())


def test_another_loss_function_falls_back_loudly() -> None:
    model, batch = _model("llama"), _batch()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    with pytest.warns(UserWarning, match="not the usual causal cross-entropy"):
        got = model_loss(model, batch)
    torch.testing.assert_close(got, model(**batch).loss)


def test_a_compiled_model_falls_back_loudly() -> None:
    model, batch = _model("llama"), _batch()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="compile"):
        got = model_loss(compiled, batch)
    torch.testing.assert_close(got, model(**batch).loss)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_peft_models_are_looked_into() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.0
    )
    model = peft.get_peft_model(_model("untied"), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compare(model, _batch(), 2e-6)


def test_batches_without_labels_and_encoder_decoders_are_refused() -> None:
    model, batch = _model("llama"), _batch()
    with pytest.raises(DataError, match="no labels"):
        model_loss(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(DataError, match="No token of the batch is supervised"):
        model_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(DataError, match="outside the vocabulary"):
        model_loss(model, {**batch, "labels": batch["input_ids"] + VOCAB})
    tiny = T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(TrainingError, match="decoder-only"):
        model_loss(T5ForConditionalGeneration(tiny), batch)
