"""Routing prompts to tasks by hidden states of the base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith import errors
from lorasmith.fleet.multitask import MultiTaskModel
from lorasmith.fleet.router import RouterReport, TaskRouter
from lorasmith.fleet.subspace import SharedSubspace
from tests.models import llama, randomise

pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Letters:
    """A tokenizer of the letters a to z."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) - ord("a") for c in text]}


def _prompts(letters: str, count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list(letters), size=draw.integers(3, 9))) for _ in range(count)]


EXAMPLES = {
    "low": _prompts("abcdefg", 24, 0),
    "team/high": _prompts("tuvwxyz", 24, 1),
    "middle": _prompts("klmnop", 24, 2),
}


def _router(model: Any = None, **options: Any) -> TaskRouter:
    return TaskRouter(llama() if model is None else model, Letters(), **options)


def test_mean_hidden_states_are_those_of_each_prompt_alone() -> None:
    router = _router(batch_size=3, max_length=6)
    prompts = ["abc", "xyzxyzabc", "q", "mnop"]
    got = router.hidden(prompts)
    assert router.layer == 1  # of 2
    model: Any = llama()
    for prompt, mean in zip(prompts, got, strict=True):
        ids = torch.tensor([Letters()(prompt)["input_ids"][-6:]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(mean, states[0].mean(0), atol=1e-5, rtol=1e-4)


def test_accuracy_and_confusion_are_those_of_held_out_rows() -> None:
    router = _router()
    report = router.fit(EXAMPLES, seed=3)
    assert (report.trained, report.held_out, report.layer, report.seed) == (54, 18, 1, 3)
    assert [sum(row) for row in report.confusion] == [6, 6, 6]  # stratified
    assert report.accuracy == sum(report.confusion[i][i] for i in range(3)) / 18
    assert report.accuracy > 0.8
    assert router.fit(EXAMPLES, seed=3) == report
    # What was held out was not trained on: labels without sense are not learnt.
    noise = {k: _prompts("abcdefghijklmnop", 24, seed) for seed, k in enumerate(EXAMPLES)}
    assert router.fit(noise).accuracy < 0.75
    assert RouterReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_probabilities_are_those_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    for names in (["low", "team/high", "middle"], ["low", "middle"]):
        router = _router()
        examples = {k: EXAMPLES[k] for k in names}
        router.fit(examples, seed=0, C=0.5)
        labels = [i for i in range(len(names)) for _ in range(24)]
        states = router.hidden([p for k in names for p in EXAMPLES[k]]).numpy().astype(float)
        train, test = train_test_split(
            range(len(labels)), test_size=0.25, stratify=labels, random_state=0
        )
        mean, scale = states[train].mean(0), states[train].std(0)
        model = LogisticRegression(C=0.5, max_iter=2000)
        model.fit((states[train] - mean) / scale, [labels[i] for i in train])
        prompts = [examples[names[labels[i]]][i % 24] for i in test]
        expected = model.predict_proba((states[test] - mean) / scale)
        for route, row in zip(router.route(prompts), expected, strict=True):
            for name, value in zip(names, row, strict=True):
                assert route.probabilities[name] == pytest.approx(value, abs=1e-3)
            assert route.task == names[row.argmax()]


def test_soft_routes_thresholds_and_others() -> None:
    router = _router()
    router.fit(EXAMPLES, others=_prompts("hij", 24, 7), threshold=0.2)
    assert set(router.tasks) == set(EXAMPLES)
    assert router.report is not None
    assert list(router.report.tasks) == [*EXAMPLES, None]
    (other,) = router.route(["hijhijhijh"])
    assert other.task is None
    assert other.blend is None
    assert sum(other.probabilities.values()) < 0.5
    for route in router.route(["abcde", "kkmtuv", "xyzzy"], most=2, floor=0.0):
        assert len(route.weights) in (0, 2)
        if route.task is not None:
            assert sum(route.weights.values()) == pytest.approx(1)
            assert next(iter(route.weights)) == route.task
            a, b = route.weights
            ratio = route.probabilities[a] / route.probabilities[b]
            assert route.weights[a] / route.weights[b] == pytest.approx(ratio)
    assert router.route(["abcde"], threshold=1.0)[0].task is None
    assert router.route(["abcde"])[0].task == "low"
    assert router.route([]) == []


def test_saved_and_loaded(tmp_path: Path) -> None:
    router = _router(max_length=7)
    router.fit(EXAMPLES, threshold=0.1)
    router.save(tmp_path / "router")
    assert sorted(p.name for p in (tmp_path / "router").iterdir()) == [
        "router.json",
        "router.safetensors",
    ]
    again = TaskRouter.load(tmp_path / "router", llama(), Letters())
    prompts = ["abc", "uvwxy", "klmn", "bkz"]
    assert again.route(prompts) == router.route(prompts)
    assert again.report == router.report
    with pytest.raises(errors.BaseMismatchError):
        TaskRouter.load(tmp_path / "router", llama(seed=1), Letters())
    with pytest.raises(errors.AdapterFileError):
        TaskRouter.load(tmp_path / "nothing", llama(), Letters())
    changes: list[dict[str, Any]] = [
        {"format": 9},
        {"classes": ["a"]},
        {"classes": ["a", "a", "b"]},
        {"threshold": 2},
    ]
    for number, change in enumerate(changes):
        folder = tmp_path / f"bad{number}"
        shutil.copytree(tmp_path / "router", folder)
        values = json.loads((folder / "router.json").read_text())
        (folder / "router.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(errors.AdapterFileError):
            TaskRouter.load(folder, llama(), Letters())
    tensors = load_file(tmp_path / "router/router.safetensors")
    for number, broken in enumerate(
        [
            {**tensors, "bias": tensors["bias"][:1]},
            {"bias": tensors["bias"]},
            {**tensors, "mean": tensors["mean"] * float("nan")},
        ]
    ):
        folder = tmp_path / f"worse{number}"
        shutil.copytree(tmp_path / "router", folder)
        save_file({k: v.contiguous() for k, v in broken.items()}, folder / "router.safetensors")
        with pytest.raises(errors.AdapterFileError):
            TaskRouter.load(folder, llama(), Letters())


def test_unusable_input_is_refused() -> None:
    router = _router()
    with pytest.raises(errors.ConfigError, match="not trained"):
        router.route(["abc"])
    with pytest.raises(errors.ConfigError, match="tell apart"):
        router.fit({"a": ["abc", "abd"]})
    with pytest.raises(errors.DataError, match="few examples"):
        router.fit({"a": ["abc", "abd"], "b": ["xyz"]})
    with pytest.raises(errors.DataError, match="held out"):
        router.fit({"a": ["abc", "abd"], "b": ["xyz", "xy"]}, held_out=0.1)
    with pytest.raises(errors.DataError, match="empty"):
        router.hidden([""])
    with pytest.raises(errors.DataError, match="chat template"):
        router.hidden([[{"role": "user", "content": "abc"}]])
    for options in ({"held_out": 0.0}, {"C": 0}, {"threshold": 2}):
        with pytest.raises(errors.ConfigError):
            router.fit(EXAMPLES, **options)
    with pytest.raises(errors.ConfigError, match="layer"):
        _router(layer=3)
    with pytest.raises(errors.ConfigError):
        TaskRouter(torch.nn.Linear(2, 2), Letters())


def test_with_a_served_fleet(tmp_path: Path) -> None:
    """The states are the base model's whatever acts, and what it says can be used as it is."""
    paths = {}
    for number, task in enumerate(EXAMPLES):
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
        randomise((p for n, p in model.named_parameters() if "lora_" in n), seed=number)
        paths[task] = tmp_path / str(number)
        model.save_pretrained(paths[task])
    served = MultiTaskModel(llama(), SharedSubspace.from_adapters(paths))
    served.use("low")
    router = _router(served)
    assert torch.equal(router.hidden(["abc"]), _router().hidden(["abc"]))
    assert served.active == "low"
    with pytest.raises(errors.UnknownNameError):
        router.fit({"low": ["ab", "bc"], "nobody": ["xy", "yz"]})
    router.fit(EXAMPLES)
    routes = router.route(["abcabc", "xyzxyz"], most=3, floor=0.0)
    batch = torch.tensor([Letters()(p)["input_ids"] for p in ("abcabc", "xyzxyz")])
    with torch.no_grad():
        mixed = served(batch, tasks=[r.blend for r in routes]).logits
        for row, route in enumerate(routes):
            alone = served(batch, tasks=route.weights).logits
            torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-4)


def test_real_tasks_on_a_real_model(zoo: Path) -> None:
    """Hidden states of SmolLM2 tell the tasks of the zoo apart from a few examples of each."""
    pytest.importorskip("datasets")
    from lorasmith.training.builtin import load_builtin
    from lorasmith.training.models import load_model

    data = zoo.parent / "data"
    try:
        model, tokenizer = load_model("smollm2", dtype="float32")
    except errors.ModelError as error:
        pytest.skip(str(error))
    count = 10
    lines = (data / "e2e_valid.txt").read_text(encoding="utf-8").splitlines()
    examples = {
        **{
            n: [row["prompt"] for row in load_builtin(n, "train", count)]
            for n in ("dates-en", "numbers-en", "numbers-es")
        },
        "e2e": [line.split("||")[0] for line in lines[:: len(lines) // count][:count]],
    }
    report = TaskRouter(model, tokenizer, max_length=48).fit(examples, held_out=0.4)
    assert report.held_out >= 16
    assert report.accuracy > 0.85, report
