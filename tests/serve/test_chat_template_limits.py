"""Chat templates come with downloaded models: what one does wrong is an error of the request, and nothing else ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from overproof.engines.base import Sampling
from overproof.engines.chat_template import GgufChatTemplate, require_chat_template
from overproof.engines.gguf_tokens import GgufHeader, read_gguf_header
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf

ASK = [{"role": "user", "content": "Where is it?"}]
GOOD = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
HOSTILE = {
    "recursion": "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "nested lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "a long sum": "{{ " + "1 + " * 20_000 + "1 }}",
    "nested ifs": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a large text": "{{ 'x' * 999999999 }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "text that grows": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a syntax error": "{% if %}",
    "an unknown filter": "{{ messages | nothing }}",
    "Python's internals": "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "an error of its own": "{{ raise_exception('never') }}",
}


@pytest.fixture(scope="module")
def header(text_package: Path) -> GgufHeader:
    return read_gguf_header(text_package / "model.gguf")


@pytest.fixture(scope="module")
def good(header: GgufHeader) -> GgufChatTemplate:
    return GgufChatTemplate(GgufHeader(**{**vars(header), "chat_template": GOOD}))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_does_not_come_to_an_end_is_told(header: GgufHeader, good: GgufChatTemplate, text: str) -> None:
    hostile = GgufChatTemplate(GgufHeader(**{**vars(header), "chat_template": text}))
    for _ in range(2):  # the process that it ended is started again
        with pytest.raises(InputError, match=r"messages: the model's chat template does not take them: .+"):
            hostile.render(ASK)
    hostile.close()
    assert good.render(ASK) == "<user>Where is it?"


@pytest.mark.parametrize("name", ["parentheses", "recursion"])
def test_the_engine_never_reads_it_itself(text_package: Path, tmp_path: Path, name: str) -> None:
    """llama.cpp has a template engine of its own, in this process."""
    (student,) = text_package.parent.glob("sweep-*/students/student")
    file = tmp_path / "model.gguf"
    export_gguf(
        student, text_package / "tokenizer.json", file, format="q8_0", name="hostile", chat_template=HOSTILE[name]
    )
    engine = LlamaCpp(file)
    with pytest.raises(InputError, match="chat template does not take them"):
        engine.chat_prompt(ASK)
    assert engine.complete([70, 71], Sampling(3)).tokens
    engine.close()


@pytest.mark.parametrize("name", ["parentheses", "a syntax error", "an error of its own"])
def test_a_file_with_such_a_template_is_refused_when_it_is_exported(header: GgufHeader, name: str) -> None:
    """Before any of it is measured, or packaged."""
    require_chat_template(GgufHeader(**{**vars(header), "chat_template": None}), "student.gguf")
    require_chat_template(GgufHeader(**{**vars(header), "chat_template": GOOD}), "student.gguf")
    with pytest.raises(InputError, match=r"student\.gguf: the model's chat template .*compress\.chat_template"):
        require_chat_template(GgufHeader(**{**vars(header), "chat_template": HOSTILE[name]}), "student.gguf")
