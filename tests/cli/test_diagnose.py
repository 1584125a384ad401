"""``lorasmith diagnose``: what it prints, writes and refuses, against planted changes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith as ls
from tests.models import randomise
from tests.training.tiny import make_model, make_tokenizer, save_tiny

HEADS, KV, SIZE = 4, 2, 8  # of the tiny Llama
PLANTED = 4.0  # degrees


def turned(block: torch.Tensor, degrees: float) -> torch.Tensor:
    """The block turned by an angle, as a vector, without a change of its norm."""
    wide = block.double()
    noise = torch.randn(wide.shape, generator=torch.Generator().manual_seed(1)).double()
    noise -= (noise * wide).sum() / (wide * wide).sum() * wide
    noise *= wide.norm() / noise.norm()
    angle = math.radians(degrees)
    return (math.cos(angle) * wide + math.sin(angle) * noise).to(block)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which head 2 of one q_proj has turned by 4 degrees, and nothing else."""
    folder = tmp_path_factory.mktemp("tuned")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.q_proj.weight
        weight[2 * SIZE : 3 * SIZE] = turned(weight[2 * SIZE : 3 * SIZE], PLANTED)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, *, seed: int = 1, scale: float = 0.2) -> Path:
    model = make_model(make_tokenizer())
    handle = ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj", "down_proj")))
    randomise(handle.parameters(), scale=scale, seed=seed)
    return Path(ls.save(model, folder))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "two", seed=2, scale=0.4)


# -- what is measured --------------------------------------------------------------------------


def test_a_planted_rotation_is_found_in_two_checkpoints(call: Any, base: Path, tuned: Path) -> None:
    found = call("diagnose", base, tuned, "--json").json
    changed = {(u["name"], u["head"]): u for u in found["units"] if u["theta_deg"] > 0}
    ((place, unit),) = changed.items()
    assert place == ("model.layers.1.self_attn.q_proj", 2)
    assert unit["theta_deg"] == pytest.approx(PLANTED, rel=1e-5)
    assert unit["norm_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert found["summary"]["max_theta_deg"] == pytest.approx(PLANTED, rel=1e-5)
    assert found["head_dim"] == SIZE
    assert found["failures"] == found["files"] == []
    # By projection it is less, as only a quarter of the weights has turned.
    whole = call("diagnose", base, tuned, "--per", "projection", "--json").json
    assert 0 < whole["summary"]["max_theta_deg"] < PLANTED


def test_an_adapter_is_compared_with_dense_weights(call: Any, base: Path, adapter: Path) -> None:
    found = call("diagnose", base, adapter, "--json").json
    model = make_model(make_tokenizer())
    ls.load(model, adapter)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    ls.fuse(model)
    after = {n: p.detach().double() for n, p in model.named_parameters()}
    assert len(found["units"]) == 2 * (HEADS + 1)
    for unit in found["units"]:
        w, v = (d[f"{unit['name']}.weight"] for d in (before, after))
        if unit["head"] is not None:
            rows = slice(unit["head"] * SIZE, (unit["head"] + 1) * SIZE)
            w, v = w[rows], v[rows]
        cosine = float((w * v).sum() / (w.norm() * v.norm()))
        assert unit["theta_deg"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_what_peft_has_trained_and_the_page(call: Any, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    from lorasmith.training.models import load_model

    plain, _ = load_model(base, device="cpu")
    weight = plain.model.layers[0].self_attn.v_proj.weight.detach().double()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"])
    model = peft.get_peft_model(plain, config)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
    model.save_pretrained(tmp_path / "peft")
    page = tmp_path / "report.html"
    called = call("diagnose", base, tmp_path / "peft", "-o", page, "--text", "builtin", "--json")
    assert called.code == 0, called.err
    up, down = (getattr(layer, n)["default"].weight.detach() for n in ("lora_B", "lora_A"))
    delta = 2.0 * up.double() @ down.double()
    for head in range(KV):
        w = weight[head * SIZE : (head + 1) * SIZE]
        v = w + delta[head * SIZE : (head + 1) * SIZE]
        cosine = float((w * v).sum() / (w.norm() * v.norm()))
        (unit,) = (u for u in called.json["units"] if u["layer"] == 0 and u["head"] == head)
        assert unit["theta_deg"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-4)
    assert called.json["retention"]["kl"] > 0
    assert "<svg" in page.read_text()


def test_what_people_read(call: Any, base: Path, adapter: Path) -> None:
    called = call("diagnose", base, adapter, "--spectrum", "--intruders", "--diversity")
    assert called.code == 0, called.err
    for said in ("θ̄ = ", "noise floor", "θ_crit", "20.7°", "EgoRA's modes", "q_proj", "down_proj"):
        assert said in called.out, said
    for said in ("Spectrum of ΔW", "effective", "intruders", "Mean angle between heads"):
        assert said in called.out, said
    assert called.err == ""


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_tables_fit(
    call: Any, base: Path, adapter: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = call("diagnose", base, adapter, "--spectrum").out
    assert max(len(line) for line in out.splitlines()) <= int(columns)
    assert "…" not in out


def test_layers_and_targets_are_a_filter(call: Any, base: Path, adapter: Path) -> None:
    found = call(
        *("diagnose", base, adapter, "--layers", "1", "--targets", "down_proj", "--json")
    ).json
    assert [u["name"] for u in found["units"]] == ["model.layers.1.mlp.down_proj"]


def test_what_did_not_change_is_said(call: Any, base: Path, tmp_path: Path) -> None:
    same = save_tiny(tmp_path / "same")
    called = call("diagnose", base, same)
    assert called.code == 0
    assert "14 layers unchanged" in called.out


# -- retention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "tuned"])
def test_retention(
    call: Any, base: Path, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    after = request.getfixturevalue(kind)
    text = tmp_path / "held-out.txt"
    text.write_text("Count to 7. please assistant " * 20)
    found = call("diagnose", base, after, "--text", text, "--json", "--device", "cpu").json
    kept = found["retention"]
    from lorasmith.training.models import load_model

    model, tokenizer = load_model(base, device="cpu")
    options: dict[str, Any] = {"adapter": after}
    if kind == "tuned":
        options = {"tuned": load_model(after, device="cpu")[0]}
    wanted = ls.retention(model, text, tokenizer=tokenizer, **options)
    assert kept["text"] == str(text)
    assert kept["tokens"] == wanted.tokens
    assert kept["kl"] == pytest.approx(wanted.kl, rel=1e-6)
    assert kept["perplexity_after"] == pytest.approx(wanted.perplexity_after, rel=1e-6)
    assert kept["kl"] > 0
    shown = call("diagnose", base, after, "--text", text, "--device", "cpu", "-q").out
    assert "perplexity" in shown
    assert "nats a token" in shown


def test_the_built_in_text_and_two_adapters(
    call: Any, base: Path, adapter: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.training import retention

    monkeypatch.setattr(retention, "GENERAL_CHARACTERS", 2000)
    called = call("diagnose", base, adapter, other, "--text", "builtin", "--json")
    assert called.code == 0, called.err
    kept = [r["retention"] for r in called.json["reports"].values()]
    assert [k["text"] for k in kept] == ["builtin"] * 2
    assert kept[0]["perplexity_before"] == kept[1]["perplexity_before"]
    assert kept[0]["kl"] != kept[1]["kl"]


def test_an_adapter_as_the_base(call: Any, base: Path, tmp_path: Path) -> None:
    """Of two adapters, what the second one does beyond the first."""
    from lorasmith.training.models import load_model

    def adapter(name: str, seed: int) -> Path:
        model, _ = load_model(base, device="cpu")
        handle = ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj",)))
        randomise(handle.parameters(), seed=seed)
        return Path(ls.save(model, tmp_path / name))

    one, two = adapter("a", 1), adapter("b", 2)
    text = tmp_path / "t.txt"
    text.write_text("Count to 7. please assistant " * 5)
    found = call("diagnose", one, two, "--text", text, "--json", "--device", "cpu").json
    model, tokenizer = load_model(base, device="cpu")
    wanted = ls.retention(model, text, adapter=two, against=one, tokenizer=tokenizer)
    assert found["retention"]["kl"] == pytest.approx(wanted.kl, rel=1e-6)
    # And an adapter alone, against the base that it names.
    alone = call("diagnose", one, "--text", text, "--json", "--device", "cpu").json
    wanted = ls.retention(model, text, adapter=one, tokenizer=tokenizer)
    assert alone["retention"]["kl"] == pytest.approx(wanted.kl, rel=1e-6)


def test_a_text_that_is_not_there_is_found_out_first(
    call: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.diagnostics import rotation

    monkeypatch.setattr(rotation, "open_sides", lambda *_, **__: pytest.fail("began to work"))
    called = call("diagnose", base, adapter, "--text", "./nowhere.txt", "--json")
    assert called.code == 2
    assert called.json["error"]["type"] == "DataError"


# -- files -------------------------------------------------------------------------------------


def test_files(call: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["new/report.html", "report.json", "report.csv", "report.npz"]
    outputs = [tmp_path / n for n in names]
    called = call(
        *("diagnose", base, adapter, "--json", "--plot", tmp_path / "figure.png"),
        *(part for path in outputs for part in ("-o", path)),
    )
    assert called.code == 0, called.err
    found = called.json
    assert found["files"] == [str(p) for p in (*outputs, tmp_path / "figure.png")]
    assert "<svg" in outputs[0].read_text()
    stored = json.loads(outputs[1].read_text())
    assert stored["units"] == found["units"]
    assert ls.RotationReport.load(outputs[1]).theta_bar_deg == pytest.approx(
        found["summary"]["theta_bar_deg"]
    )
    with outputs[2].open() as stream:
        assert len(list(csv.DictReader(stream))) == len(found["units"])
    assert len(np.load(outputs[3])["theta_deg"]) == len(found["units"])
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


# -- several -----------------------------------------------------------------------------------


def test_several_are_compared(
    call: Any, base: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("diagnose", base, adapter, other)
    files = [tmp_path / n for n in ("c.json", "c.csv", "c.html", "c.pdf")]
    called = call(
        *(*arguments, "--json", "-o", files[0], "-o", files[1], "-o", files[2]),
        *("--plot", files[3]),
    )
    assert called.code == 0, called.err
    found = called.json
    assert found["names"] == ["one", "two"]
    assert list(found["reports"]) == ["one", "two"]
    one = call("diagnose", base, adapter, "--json").json
    assert found["reports"]["one"]["units"] == one["units"]
    assert found["runs"][0]["theta_bar_deg"] < found["runs"][1]["theta_bar_deg"]
    assert json.loads(files[0].read_text())["units"] == found["units"]
    with files[1].open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(found["units"])
    assert float(rows[0]["theta_deg:two"]) == found["units"][0]["theta_deg"][1]
    assert "two" in files[2].read_text()
    assert files[3].read_bytes()[:4] == b"%PDF"
    out = call(*arguments).out
    assert "Comparison" in out
    assert "θ̄ over all" in out


def test_equal_names_are_told_apart(call: Any, base: Path, tmp_path: Path) -> None:
    one, two = (make_adapter(tmp_path / n / "last", seed=s) for n, s in (("a", 1), ("b", 2)))
    assert call("diagnose", base, one, two, "--json").json["names"] == [str(one), str(two)]
    assert call("diagnose", base, one, one).code == 2


# -- the gate ----------------------------------------------------------------------------------


def test_fail_above_gives_3(call: Any, base: Path, adapter: Path) -> None:
    mean = call("diagnose", base, adapter, "--json").json["summary"]["theta_bar_deg"]
    arguments = ("diagnose", base, adapter, "--fail-above")
    assert call(*arguments, f"{mean * 1.001}").code == 0
    called = call(*arguments, f"{mean * 0.999}")
    assert called.code == 3
    assert "failed: the mean angle is" in called.err
    assert "Angles by projection" in called.out
    as_json = call(*arguments, "0", "--json")
    assert as_json.code == 3
    assert len(as_json.json["failures"]) == 1


def test_fail_max_above_names_the_head(call: Any, base: Path, tuned: Path) -> None:
    assert call("diagnose", base, tuned, "--fail-max-above", "4.01", "--fail-above", "4").code == 0
    called = call("diagnose", base, tuned, "--fail-max-above", "3.99", "-q")
    assert called.code == 3
    assert "model.layers.1.self_attn.q_proj head 2" in called.err


def test_each_of_several_must_pass(call: Any, base: Path, adapter: Path, other: Path) -> None:
    runs = call("diagnose", base, adapter, other, "--json").json["runs"]
    low, high = (r["theta_bar_deg"] for r in runs)
    called = call("diagnose", base, adapter, other, "--fail-above", f"{(low + high) / 2}")
    assert called.code == 3
    assert "failed: two: " in called.err
    assert "failed: one: " not in called.err


def test_weights_that_are_no_numbers_do_not_pass(call: Any, base: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = math.nan
    model.save_pretrained(tmp_path)
    called = call("diagnose", base, tmp_path, "--fail-above", "5")
    assert called.code == 3
    assert "not finite" in called.err
    warned = call("diagnose", base, tmp_path)
    assert warned.code == 0
    assert "warning: 1 layer was not compared" in warned.err


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "report.docx"], ".html, .json, .csv, .npz"),
        (["--plot", "figure.html"], ".png, .pdf, .svg"),
        (["--fail-above", "-1"], "0 to 180"),
        (["--fail-max-above", "nan"], "0 to 180"),
        (["--per", "layer"], "head"),
        (["--targets", "q_porj"], "q_porj"),
        (["--layers", "9"], "9"),
    ],
)
def test_a_mistake_in_the_options(
    call: Any, base: Path, adapter: Path, arguments: list[str], said: str
) -> None:
    called = call("diagnose", base, adapter, *arguments)
    assert called.code == 2
    assert said in called.err
    assert called.out == ""


def test_npz_holds_one_report(call: Any, base: Path, adapter: Path, other: Path) -> None:
    called = call("diagnose", base, adapter, other, "-o", "x.npz", "--json")
    assert called.code == 2
    assert "one report" in called.json["error"]["message"]


def test_what_is_not_there(call: Any, base: Path, tmp_path: Path) -> None:
    for arguments in (("./nowhere", base), (base, "./nowhere"), (base, tmp_path), (base,)):
        called = call("diagnose", *arguments, "--json")
        assert called.code == 2, arguments
        assert called.json["error"]["message"]
        assert "Traceback" not in called.err


def test_another_architecture(call: Any, base: Path, tmp_path: Path) -> None:
    make_model(make_tokenizer(), hidden_size=48, head_dim=12).save_pretrained(tmp_path)
    called = call("diagnose", base, tmp_path, "--json")
    assert called.code == 2
    assert called.json["error"]["type"] == "ModelError"
