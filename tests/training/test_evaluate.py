"""Loss, perplexity, exact match and generation, against plain computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lorasmith as ls
from lorasmith.errors import ConfigError, DataError
from lorasmith.training.data import encode_prompt, tokenise
from lorasmith.training.evaluate import (
    evaluate,
    exp_or_inf,
    general_text,
    generate,
    perplexity,
    stop_tokens,
)
from tests.training.tiny import ROWS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.pad_token = made.eos_token
    return made


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return make_model(tokenizer)


def _losses(model: Any, ids: list[int], labels: list[int]) -> list[float]:
    """Cross-entropy of every supervised token of one row, from the full logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    each = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return [float(v) for v, label in zip(each, labels[1:], strict=True) if label != -100]


def _written(model: Any, ids: list[int], stop: int, most: int) -> list[int]:
    """Greedy continuation, one full forward pass a token."""
    ids = list(ids)
    new: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == stop:
            break
        new.append(token)
        ids.append(token)
    return new


def test_the_loss_is_the_mean_over_tokens(model: Any, tokenizer: Any) -> None:
    rows = tokenise(_dataset(ROWS), tokenizer)
    expected = [v for row in rows for v in _losses(model, row["input_ids"], row["labels"])]
    report = evaluate(model, tokenizer, ROWS, batch_size=5, exact_match=False)
    assert report.tokens == len(expected)
    assert report.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert (report.exact_match, report.generated, report.rows) == (None, 0, len(ROWS))


def _dataset(rows: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_completions_are_what_the_model_writes_alone(
    model: Any, tokenizer: Any, batch_size: int
) -> None:
    report = evaluate(model, tokenizer, ROWS[:8], batch_size=batch_size, max_new_tokens=6)
    assert report.generated == 8
    for row, example in zip(ROWS, report.examples, strict=False):
        ids = encode_prompt(row["prompt"], tokenizer)
        alone = _written(model, ids, tokenizer.eos_token_id, 6)
        assert example.got == tokenizer.decode(alone, skip_special_tokens=True).strip()
        assert example.expected == row["completion"]
        assert example.prompt == tokenizer.decode(ids)


def test_a_row_that_is_written_exactly_counts(model: Any, tokenizer: Any) -> None:
    """The expected text is what the model writes, so that it must match, and one does not."""
    prompts = [row["prompt"] for row in ROWS[:4]]
    answers = [generate(model, tokenizer, p, max_new_tokens=5) for p in prompts]
    rows = [{"prompt": p, "completion": a or "."} for p, a in zip(prompts, answers, strict=True)]
    rows.append({"prompt": prompts[0], "completion": "something else"})
    report = evaluate(model, tokenizer, rows, max_new_tokens=5)
    expected = [row["completion"] == a for row, a in zip(rows, [*answers, ""], strict=True)]
    assert [e.match for e in report.examples] == expected
    assert report.exact_match == pytest.approx(sum(expected) / 5)
    assert report.matched == sum(expected) >= 1


def test_plain_text_has_no_completion(model: Any, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, [{"text": "You are a helpful assistant. " * 3}])
    assert (report.generated, report.exact_match) == (0, None)
    assert report.tokens > 5


def test_the_last_answer_of_a_conversation_is_written(model: Any, tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "please"},
        {"role": "assistant", "content": "2 3"},
    ]
    report = evaluate(model, tokenizer, [{"messages": turns}], max_new_tokens=2)
    (example,) = report.examples
    assert example.expected == "2 3"
    assert example.prompt.endswith("please<|im_end|>\n<|im_start|>assistant\n")


def test_every_training_flag_comes_back(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    evaluate(model, tokenizer, ROWS[:2], max_new_tokens=1)
    assert [m.training for m in model.modules()] == before


def test_progress_reaches_the_end(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        model,
        tokenizer,
        ROWS[:5],
        batch_size=2,
        max_new_tokens=1,
        progress=lambda *args: seen.append(args),
    )
    assert seen[2] == ("loss", 5, 5)
    assert seen[-1] == ("generate", 5, 5)


def test_to_dict_is_json_and_limits_examples(model: Any, tokenizer: Any) -> None:
    import json

    report = evaluate(model, tokenizer, ROWS[:3], max_new_tokens=1)
    values = report.to_dict(examples=1)
    assert len(values["examples"]) == 1
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize("rows", [[], [{"nothing": "known"}]])
def test_rows_that_cannot_be_evaluated(model: Any, tokenizer: Any, rows: Any) -> None:
    with pytest.raises(DataError):
        evaluate(model, tokenizer, rows)


def test_the_head_sees_contiguous_states(model: Any, tokenizer: Any) -> None:
    """Else torch.matmul copies the frozen head's weight once a row (gigabytes)."""
    ls.attach(model, ls.LoRAConfig(r=2))
    seen: list[bool] = []
    original = model.lm_head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous())
        out: torch.Tensor = original(x)
        return out

    model.lm_head.forward = forward
    evaluate(model, tokenizer, ROWS[:3], max_new_tokens=2)
    assert seen
    assert all(seen)


# -- generation --------------------------------------------------------------------------------


def test_streamed_pieces_are_the_answer(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    text = generate(model, tokenizer, "Count to 3.", max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces).strip() == text
    assert text == generate(model, tokenizer, "Count to 3.", max_new_tokens=12)


def test_sampling_is_seeded_and_leaves_the_program_alone(model: Any, tokenizer: Any) -> None:
    def sample(seed: int) -> str:
        return generate(
            model, tokenizer, "Count", max_new_tokens=12, temperature=2.0, top_p=0.95, seed=seed
        )

    before = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert len({sample(s) for s in range(4)}) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_template_the_text_goes_on(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("You are")["input_ids"]
    expected = tokenizer.decode(_written(model, ids, tokenizer.eos_token_id, 5))
    assert generate(model, tokenizer, "You are", max_new_tokens=5, template=False) == expected


def test_stop_tokens_are_the_models_and_the_tokenizers(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = [7, 9]
    assert stop_tokens(model, tokenizer) == sorted({7, 9, tokenizer.eos_token_id})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"system": "x", "template": False}, "system"),
    ],
)
def test_settings_that_cannot_be_used(model: Any, tokenizer: Any, changes: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(model, tokenizer, "Count", **changes)
    assert caught.value.key == key


# -- general knowledge -------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (10, 7), (500, 250)])
def test_perplexity_scores_every_token_once(
    model: Any, tokenizer: Any, window: int, stride: int
) -> None:
    text = "You are a helpful assistant. Count to please. " * 3
    ids = tokenizer(text)["input_ids"]
    total, count, scored = 0.0, 0, 1
    start = 0
    while scored < len(ids):
        end = min(start + window, len(ids))
        labels = [-100] * (scored - start) + ids[scored:end]
        part = _losses(model, ids[start:end], labels)
        total, count = total + sum(part), count + len(part)
        scored, start = end, start + stride
    assert count == len(ids) - 1
    found = perplexity(model, tokenizer, text, window=window, stride=stride)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_refuses_what_it_cannot_read(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError):
        perplexity(model, tokenizer, "a text", window=8, stride=8)
    with pytest.raises(DataError):
        perplexity(model, tokenizer, "")


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert exp_or_inf(1e4) == math.inf
    assert math.isnan(exp_or_inf(math.nan))


def test_the_general_text_is_prose() -> None:
    text = general_text(5000)
    assert text == general_text(5000)
    assert 3000 < len(text) <= 5000
    assert ">>>" not in text
    assert text.endswith(".")
    with pytest.raises(ConfigError):
        general_text(10)
