"""Packed batches against padded ones: the same loss, the same gradients, no leakage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from lorasmith.errors import ConfigError, DataError, TrainingError
from lorasmith.training.collate import (
    PackingCollator,
    PaddingCollator,
    TokenBudgetSampler,
    choose_collator,
    packing_support,
    shared_prefix_length,
)
from lorasmith.training.loss import model_loss

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they gain from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    if name == "llama":
        config: Any = LlamaConfig(**SIZES)
    elif name == "mistral":
        config = MistralConfig(**SIZES, sliding_window=16)
    elif name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    elif name == "bloom":
        config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    else:
        config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # else attention is so flat that leakage hardly shows
                parameter.mul_(6.0)
    return model


def _rows(prefix: int = 5, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows with a common prefix and completions of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=generator).tolist()

    head, rows = tokens(prefix), []
    for i, (prompt, answer) in enumerate([(3, 4), (1, 1), (6, 2), (2, 7), (1, 3)]):
        # The first own token differs from row to row, so that the prefix has this length.
        ids = [*head, i, *tokens(prompt), *tokens(answer)]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return rows


def _loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss  # the model's own loss, not ours
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def _supervised(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("max_tokens", [18, 1000])
def test_packed_batch_equals_padded_batch(
    name: str, attention: str, prefix: int, max_tokens: int
) -> None:
    model, rows = _model(name, attention), _rows(prefix)
    dtype = torch.bool if attention == "sdpa" else torch.float32
    packed = PackingCollator(0, max_tokens=max_tokens, mask_dtype=dtype)(rows)
    padded = PaddingCollator(0)(rows)
    sequences = 1 if max_tokens == 1000 else packed["input_ids"].shape[0]
    assert packed["input_ids"].shape[0] == sequences
    if max_tokens == 1000:
        assert packed["input_ids"].numel() == prefix + sum(
            len(r["input_ids"]) - prefix for r in rows
        )
    else:
        assert sequences > 1
        assert packed["input_ids"].shape[1] <= max_tokens
    assert _supervised(packed) == _supervised(padded)  # what Trainer counts

    expected, expected_grads = _loss_and_gradients(model, padded)
    got, grads = _loss_and_gradients(model, packed)
    assert abs(got - expected) < 1e-5 * expected
    for key, grad in expected_grads.items():
        scale = max(1.0, grad.abs().max().item())
        assert (grads[key] - grad).abs().max() < 1e-5 * scale, key

    # And through our own loss.
    model.zero_grad()
    loss = model_loss(model, packed)
    loss.backward()
    assert abs(loss.item() - expected) < 1e-5 * expected
    for key, parameter in model.named_parameters():
        scale = max(1.0, expected_grads[key].abs().max().item())
        assert (parameter.grad - expected_grads[key]).abs().max() < 1e-5 * scale, key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_do_not_see_each_other(name: str) -> None:
    model, rows = _model(name), _rows()
    packed = PackingCollator(0)(rows)
    inputs = {k: v for k, v in packed.items() if k != "labels"}
    start = 5 + sum(len(r["input_ids"]) - 5 for r in rows[:2])
    stop = start + len(rows[2]["input_ids"]) - 5
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, start:stop] = (changed["input_ids"][0, start:stop] + 1) % VOCAB
    with torch.no_grad():
        body = model.get_decoder()
        before = body(**inputs).last_hidden_state[0]
        after = body(**changed).last_hidden_state[0]
    moved = (before - after).abs().amax(dim=-1)
    assert moved[start:stop].min() > 1e-3
    assert moved[:start].max() == 0
    assert moved[stop:].max() == 0


def test_every_row_sees_its_whole_prefix() -> None:
    """Gradients prove it for the sum; here each row alone, to the last token of the prefix."""
    model, rows = _model("llama"), _rows()
    packed = PackingCollator(0)(rows)
    with torch.no_grad():
        together = model(**{k: v for k, v in packed.items() if k != "labels"}).logits[0]
        start = 5
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            alone = model(input_ids=ids).logits[0]
            own = len(row["input_ids"]) - 5
            torch.testing.assert_close(
                together[start : start + own], alone[5:], rtol=1e-5, atol=1e-5
            )
            start += own


def test_layout_by_hand() -> None:
    rows = [
        {"input_ids": [7, 8, 1, 2], "labels": [-100, -100, -100, 2]},
        {"input_ids": [7, 8, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
    ]
    packed = PackingCollator(0)(rows)
    assert packed["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 5]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert packed["labels"].tolist() == [[-100, -100, -100, 2, -100, 4, 5]]
    assert packed["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]
    additive = PackingCollator(0, mask_dtype=torch.float32)(rows)["attention_mask"]
    assert ((additive == 0) == packed["attention_mask"]).all()
    assert additive[~packed["attention_mask"]].unique().tolist() == [torch.finfo(torch.float32).min]


def test_padding_by_hand() -> None:
    rows = [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]},
    ]
    assert {k: v.tolist() for k, v in PaddingCollator(9, multiple_of=4)(rows).items()} == {
        "input_ids": [[1, 2, 9, 9], [3, 4, 5, 9]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0]],
        "labels": [[-100, 2, -100, -100], [-100, -100, 5, -100]],
    }


@pytest.mark.parametrize(
    ("ids", "supervised_from", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 5, 6]], [3, 3], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 3], 2),  # equal rows keep an own token to predict from
        ([[1, 2, 3, 4], [1, 2, 5, 6]], [2, 3], 1),
        ([[1, 2, 3, 4], [1, 2, 5, 6]], [1, 1], 0),
        ([[1, 2, 3, 4], [1, 2, 5, 6]], [0, 0], 0),  # plain text: nothing may be shared
        ([[1, 2, 3, 4], [2, 2, 5, 6]], [3, 3], 0),
        ([[1, 2, 3, 4]], [3], 0),
        ([[1, 2], [1, 2, 3]], [9, 9], 1),  # no supervision: a row keeps one token
    ],
)
def test_shared_prefix_stays_before_the_supervised_tokens(
    ids: list[list[int]], supervised_from: list[int], expected: int
) -> None:
    rows = [
        {"input_ids": row, "labels": [-100 if t < start else v for t, v in enumerate(row)]}
        for row, start in zip(ids, supervised_from, strict=True)
    ]
    assert shared_prefix_length(rows) == expected


def test_plain_text_rows_pack_without_a_prefix() -> None:
    model = _model("llama")
    rows = [{"input_ids": ids, "labels": ids} for ids in ([4, 5, 6, 7], [4, 5, 8], [4, 5, 6, 7, 9])]
    padded = PaddingCollator(0)(rows)
    padded["labels"][padded["attention_mask"] == 0] = -100
    packed = PackingCollator(0)(rows)
    assert packed["input_ids"].shape == (1, 12)
    assert _supervised(packed) == _supervised(padded)
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-5, atol=1e-6)


def test_a_row_longer_than_the_limit_sets_the_length() -> None:
    rows = _rows()
    packed = PackingCollator(0, max_tokens=7)(rows)
    assert packed["input_ids"].shape[1] == max(len(r["input_ids"]) for r in rows)
    assert _supervised(packed) == _supervised(PaddingCollator(0)(rows))


def test_sequences_are_of_nearly_equal_length() -> None:
    rows = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate([6, 5, 4, 3])]
    packed = PackingCollator(99, max_tokens=10)(rows)
    assert packed["input_ids"].shape == (2, 9)
    assert (packed["input_ids"] != 99).all()


row = st.integers(0, 3).flatmap(
    lambda answer: st.lists(st.integers(0, 2), min_size=answer + 1, max_size=answer + 6).map(
        lambda ids: {
            "input_ids": ids,
            "labels": [-100] * (len(ids) - answer) + ids[len(ids) - answer :],
        }
    )
)


@given(st.lists(row, min_size=1, max_size=6), st.integers(1, 30), st.booleans())
def test_every_prediction_is_kept_with_its_context(
    rows: list[dict[str, list[int]]], max_tokens: int, share: bool
) -> None:
    """Read the batch back through mask and positions alone: each row's (context → label)."""
    packed = PackingCollator(0, max_tokens=max_tokens, share_prefix=share)(rows)
    got = []
    for b in range(packed["input_ids"].shape[0]):
        for t in range(packed["input_ids"].shape[1] - 1):
            label = int(packed["labels"][b, t + 1])
            if label != -100:
                seen = packed["attention_mask"][b, 0, t].nonzero().flatten()
                assert packed["position_ids"][b, seen].tolist() == list(range(len(seen)))
                got.append((packed["input_ids"][b, seen].tolist(), label))
    expected = [
        (r["input_ids"][:t], label)
        for r in rows
        for t, label in enumerate(r["labels"])
        if t > 0 and label != -100
    ]
    assert sorted(got) == sorted(expected)
    assert packed["attention_mask"].any(dim=-1).all()  # no empty row of a softmax


# --- capability --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_supported_models(name: str, attention: str) -> None:
    model = _model(name, attention)
    model.train()
    model.get_input_embeddings().eval()
    support = packing_support(model)
    assert support, support.reason
    assert support.mask_dtype == (torch.bool if attention == "sdpa" else torch.float32)
    assert model.training  # every module's own flag is as before
    assert not model.get_input_embeddings().training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_supported_in_16_bits(dtype: torch.dtype) -> None:
    support = packing_support(_model("llama", "eager").to(dtype))
    assert support, support.reason
    assert support.mask_dtype == dtype


def test_unsupported_models_say_why() -> None:
    bloom = packing_support(_model("bloom", "eager"))
    assert not bloom  # ALiBi is made from the mask, not from position_ids
    mamba = packing_support(_model("mamba", "eager"))
    assert not mamba  # a recurrent state runs through all rows
    assert bloom.reason
    assert mamba.reason
    flex = _model("llama")
    flex.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in packing_support(flex).reason
    assert "configuration" in packing_support(torch.nn.Linear(2, 2)).reason


def test_a_model_that_ignores_the_mask_is_found_out() -> None:
    model = _model("llama")
    inner = model.forward
    model.forward = lambda input_ids, position_ids=None, attention_mask=None: inner(
        input_ids=input_ids, position_ids=position_ids
    )
    # Transformers itself finds packed rows in position_ids when there is no mask, so plain
    # packing would be right by accident; the shared prefix is not.
    assert "rows apart" in packing_support(model).reason


def test_a_sliding_window_limits_the_length_of_rows() -> None:
    model = _model("mistral")
    assert "16 tokens" in packing_support(model).reason
    assert not packing_support(model, max_length=17)
    assert packing_support(model, max_length=16)


def test_choice_of_the_collator() -> None:
    llama, mamba = _model("llama"), _model("mamba", "eager")
    collator, support = choose_collator(llama, 3, max_tokens=77, share_prefix=False)
    assert collator == PackingCollator(3, max_tokens=77, share_prefix=False)
    assert support
    collator, support = choose_collator(mamba, 3)
    assert collator == PaddingCollator(3)
    assert not support
    collator, support = choose_collator(llama, 3, packing=False)
    assert collator == PaddingCollator(3)
    assert "switched off" in support.reason
    with pytest.raises(TrainingError, match="cannot be trained on packed rows"):
        choose_collator(mamba, 3, packing=True)


# --- batches under a budget --------------------------------------------------------------


def test_token_budget_sampler() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (500,), generator=generator).tolist()
    lengths[7] = 300
    sampler = TokenBudgetSampler(lengths, max_tokens=200, max_rows=16, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(i for b in batches for i in b) == list(range(500))
    for batch in batches:
        size = len(batch) * max(lengths[i] for i in batch)
        assert size <= 200 or batch == [7]
        assert len(batch) <= 16
    assert list(sampler) == batches  # the same epoch twice
    sampler.set_epoch(1)
    assert list(sampler) != batches
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.1 * sum(lengths)  # grouping by length leaves little padding
    loader: Any = torch.utils.data.DataLoader(
        [{"n": n} for n in lengths],  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=lambda rows: [r["n"] for r in rows],
    )
    assert sum(len(batch) for batch in loader) == 500


def test_malformed_batches_are_refused() -> None:
    for collate in (PaddingCollator(0), PackingCollator(0)):
        with pytest.raises(DataError, match="no rows"):
            collate([])
        with pytest.raises(DataError, match="not tokenised"):
            collate([{"prompt": "a"}])
        with pytest.raises(DataError, match="malformed"):
            collate([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ConfigError):
        PackingCollator(0, max_tokens=0)
    with pytest.raises(ConfigError):
        TokenBudgetSampler([1], max_tokens=0)
