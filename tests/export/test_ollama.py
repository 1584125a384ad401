"""Modelfiles: the chat template in Ollama's language says what the tokenizer's says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import ModelError
from lorasmith.export.ollama import chat_format, modelfile
from lorasmith.io.models import ResolvedModel

jinja2 = pytest.importorskip("jinja2")

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Templates of the forms that common models have.
TEMPLATES = {
    "chatml": _CHATML,
    "default prompt": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "helpful.<|im_end|>\n' }}{% endif %}" + _CHATML,
    "llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    "no system": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] "
    "+ ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
}
#: Templates that hang on more than roles.
OTHERS = {
    "counts": "{{ messages | length }}" + _CHATML,
    "last only": "{{ messages[-1]['content'] }}",
    "changes": _CHATML.replace("m['content']", "m['content'] | upper"),
    "raises": "{{ raise_exception('never') }}",
}


def renderer(template: str, bos: str = "<s>") -> Any:
    """A Jinja template as Transformers renders it."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    compiled = jinja2.Template(template, keep_trailing_newline=True)

    def render(messages: Any, answer: bool) -> str:
        text: str = compiled.render(
            messages=messages,
            add_generation_prompt=answer,
            bos_token=bos,
            eos_token="</s>",
            raise_exception=refuse,
        )
        return text

    return render


def go(template: str, **values: str) -> str:
    """Go's templates, as far as Modelfiles here use them: if, else, end, variables, strings."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    out: list[str] = []
    active = [True]
    for index, part in enumerate(parts):
        if index % 2 == 0:
            out.append(part if all(active) else "")
        elif part.startswith("if ."):
            active.append(bool(values.get(part[4:], "")))
        elif part == "else":
            active[-1] = not active[-1]
        elif part == "end":
            active.pop()
        elif part.startswith('"'):
            out.append(part[1:-1] if all(active) else "")
        else:
            assert part.startswith("."), part
            out.append(values.get(part[1:], "") if all(active) else "")
    assert active == [True]
    return "".join(out)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_says_what_the_tokenizer_says(name: str) -> None:
    render = renderer(TEMPLATES[name])
    found = chat_format(render, "<s>")
    assert found is not None
    told = [{"role": "user", "content": "Why?"}]
    template = found.template()
    # Ollama's tokenizer puts the begin-of-text token there itself.
    wanted = render(told, True).removeprefix("<s>")
    assert go(template, Prompt="Why?").startswith(wanted)
    answered = render([*told, {"role": "assistant", "content": "So."}], False).removeprefix("<s>")
    assert go(template, Prompt="Why?", Response="So.") == answered
    if name != "no system":
        system = [{"role": "system", "content": "Be brief."}, *told]
        wanted = render(system, True).removeprefix("<s>")
        assert go(template, System="Be brief.", Prompt="Why?").startswith(wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_other_templates_are_left_to_ollama(name: str) -> None:
    assert chat_format(renderer(OTHERS[name]), "<s>") is None


def test_a_token_that_begins_each_turn_is_no_beginning_of_text() -> None:
    """SmolLM2 calls <|im_start|> its begin-of-text token."""
    found = chat_format(renderer(TEMPLATES["default prompt"], "<|im_start|>"), "<|im_start|>")
    assert found is not None
    assert found.start == ""
    assert found.template().startswith("{{ if .System }}<|im_start|>system")


def test_braces_in_a_template_are_text() -> None:
    template = _CHATML.replace("'<|im_end|>", "'{' + '{ end }' + '}<|im_end|>")
    render = renderer(template)
    found = chat_format(render)
    assert found is not None
    made = go(found.template(), Prompt="Why?", Response="So.")
    told = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert made == render(told, False)


def test_the_modelfile(tmp_path: Path) -> None:
    found = chat_format(renderer(_CHATML))
    file = tmp_path / "out" / "base.gguf"
    file.parent.mkdir()
    file.touch()
    base = ResolvedModel("x", str(file.parent), str(file), "local", gguf_file="base.gguf")
    text = modelfile(base, "adapter.gguf", found, "<|im_end|>", beside=tmp_path / "out")
    lines = text.splitlines()
    assert "FROM ./base.gguf" in lines
    assert "ADAPTER ./adapter.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert text.count('"""') == 2
    # A name, or an end token, cannot add lines of its own.
    for hostile in ('x"\nADAPTER ./evil', 'a"'):
        assert "PARAMETER" not in modelfile(base, "adapter.gguf", found, hostile)
    bad = ResolvedModel("x", str(tmp_path / "a\nADAPTER ./evil"), "x", "local")
    with pytest.raises(ModelError):
        modelfile(bad, "adapter.gguf", found)
    other = modelfile(base, "adapter.gguf", None, None, beside=tmp_path / "elsewhere")
    assert f"FROM {file}" in other.splitlines()
    assert "TEMPLATE" not in other
