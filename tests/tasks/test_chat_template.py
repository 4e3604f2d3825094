"""Where the assistant's words stand in a rendered conversation, and the tokens they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from chats import (
    ASK,
    CHATML,
    END,
    FORGETFUL,
    MARKED,
    MARKED_FORGETFUL,
    QWEN3,
    encoder_of,
    messages,
    write_chat_model,
    write_records,
)
from made_tokenizers import sentencepiece_bpe
from overproof.config import TokenizerFile
from overproof.errors import InputError
from overproof.tasks.chat import TASK, ChatData, JsonlConversations
from overproof.tasks.chat_template import ConversationEncoder, EncodedConversation
from overproof.tasks.conversations import conversation

TURNS = {"messages": messages("names?", "value, file\n", "and then\n", " token ", "print", "None", system="be short")}
CALLED = {"tools": [{"type": "function", "function": {"name": "add"}}], "messages": [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "tool", "content": "5"}, {"role": "assistant", "content": "five"},
]}  # fmt: skip


def answers(encoder: ConversationEncoder, found: EncodedConversation, folder: Path) -> list[str]:
    """The texts of the answers, special tokens among them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    starts = [0, *found.ends[:-1]]
    return [
        tokenizer.decode(found.tokens_T[start:end][found.answers_T[start:end]].tolist(), skip_special_tokens=False)
        for start, end in zip(starts, found.ends, strict=True)
    ]


@pytest.mark.parametrize("record", [TURNS, CALLED], ids=["turns", "tools"])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_answers_are_told_exactly_as_transformers_writes_them(template: str, record: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_chat_model(tmp_path / "model", template)
    encoder, found = encoder_of(folder), conversation("", record)
    text, (encoded,) = encoder.encode(found)
    reference = AutoTokenizer.from_pretrained(folder)
    given: Any = {"conversation": list(found.messages), "tools": list(found.tools) if found.tools else None}
    assert text == reference.apply_chat_template(**given, tokenize=False)
    whole = reference.apply_chat_template(
        **given, tokenize=True, return_dict=True, return_assistant_tokens_mask=template == MARKED
    )
    count = len(encoded.tokens_T)
    assert encoded.tokens_T.tolist() == whole["input_ids"][:count]
    if template == MARKED:
        assert encoded.answers_T.tolist() == [bool(flag) for flag in whole["assistant_masks"][:count]]
        assert not any(whole["assistant_masks"][count:])
    said = [m["content"] or "<call>{\"name\": \"add\", \"arguments\": {\"a\": 2}}</call>"
            for m in found.messages if m["role"] == "assistant"]  # fmt: skip
    assert answers(encoder, encoded, folder) == [f"{words}{END}" for words in said]
    assert encoded.sizes_bytes[-1] == sum(len(words.encode()) for words in said)
    assert encoded.ends[-1] == count


def test_what_a_server_asks_with_is_what_stands_before_the_answer(tmp_path: Path) -> None:
    """The tokens of a prompt that is rendered alone begin the row."""
    folder = write_chat_model(tmp_path / "model")
    encoder, found = encoder_of(folder), conversation("", TURNS)
    _, (encoded,) = encoder.encode(found)
    prompt, _ = encoder.template.render(found.messages[:4], None, True, "")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt, add_special_tokens=False).ids
    assert encoded.tokens_T[: len(ids)].tolist() == ids
    assert encoded.answers_T[len(ids)]
    assert not encoded.answers_T[len(ids) - 1]


def test_a_token_across_a_border_is_split_there(tmp_path: Path) -> None:
    """Where the template ends a prompt inside what would be a token, the row has what a server reads and writes."""
    template = "{% for m in messages %}{{ m.content }}{{ ': ' if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
    folder = write_chat_model(tmp_path / "model", template)
    encoder = encoder_of(folder)
    text, (encoded,) = encoder.encode(conversation("", {"messages": messages("x", "names")}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in ("x: ", "names<|im_end|>")]
    assert encoded.tokens_T.tolist() == [*parts[0], *parts[1]]
    assert tokenizer.encode(text, add_special_tokens=False).ids != encoded.tokens_T.tolist()
    assert encoded.answers_T.tolist() == [False] * len(parts[0]) + [True] * len(parts[1])


ROLES = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_start_that_the_tokenizer_adds_stands_there_once(tmp_path: Path) -> None:
    for number, start in enumerate(("", "{{ bos_token }}")):
        folder = write_chat_model(tmp_path / str(number), start + ROLES)
        (folder / "tokenizer.json").write_text(sentencepiece_bpe())
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        encoder = encoder_of(folder)
        _, (encoded,) = encoder.encode(conversation("", {"messages": messages("name?", "file", "value", "token")}))
        assert encoded.tokens_T[0] == 1
        assert (encoded.tokens_T == 1).sum() == 1
        assert encoder.last_special(encoded) == 2
        assert [text.strip() for text in answers(encoder, encoded, folder)] == ["file</s>", "token</s>"]


@pytest.mark.parametrize("template", [FORGETFUL, MARKED_FORGETFUL, QWEN3], ids=["prefixes", "marks", "qwen3"])
def test_each_answer_of_a_rewritten_conversation_stands_behind_what_asks_for_it(template: str, tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", template)
    encoder, tokenizer = encoder_of(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    thought = [f"<think>\n{word}\n</think>\n\n" for word in ("so", "or", "then")]
    turns = messages("a", f"{thought[0]}b", "c", f"{thought[1]}d", "e", f"{thought[2]}f")
    turns[3]["weight"] = 0  # read, and not learnt
    found = conversation("", {"messages": turns})
    _, parts = encoder.encode(found)
    assert [answers(encoder, part, folder) for part in parts] == [[f"{thought[0]}b{END}"], [f"{thought[2]}f{END}"]]
    assert [part.sizes_bytes for part in parts] == [(len(thought[0]) + 1,), (len(thought[2]) + 1,)]
    for part, number in zip(parts, (1, 5), strict=True):
        prompt, _ = encoder.template.render(found.messages[:number], None, True, "")
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        assert part.tokens_T[: len(ids)].tolist() == ids
        assert part.answers_T.tolist() == [False] * len(ids) + [True] * (len(part.tokens_T) - len(ids))
    assert "<think>" not in prompt
    _, (alone,) = encoder.encode(conversation("", {"messages": turns[:2]}))
    assert answers(encoder, alone, folder) == [f"{thought[0]}b{END}"]


def test_answers_that_a_template_does_not_rewrite_share_a_row(tmp_path: Path) -> None:
    for number, template in enumerate((FORGETFUL, MARKED_FORGETFUL)):
        encoder = encoder_of(write_chat_model(tmp_path / str(number), template))
        _, (encoded,) = encoder.encode(conversation("", {"messages": messages("a", "b", "c", "d")}))
        assert len(encoded.ends) == 2


def test_an_answer_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace(ASK, "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}")
    assert template != CHATML
    encoder = encoder_of(write_chat_model(tmp_path / "model", template))
    with pytest.raises(InputError) as refused:
        encoder.encode(conversation("x.jsonl, line 7", {"messages": messages("a", "b", "c", "d")}))
    assert str(refused.value) == (
        "x.jsonl, line 7: the chat template of data.tokenizer writes what stands before message 2, the assistant's, "
        "otherwise with the answer: 'model\\n' becomes 'assistant\\nb<|im_end|>\\n', so that the answer cannot be "
        "told; expected a template that marks it by {% generation %}"
    )


def test_templates_that_are_missing_or_refuse_are_named(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "none", None)
    with pytest.raises(InputError, match=r"none: no chat template there; expected chat_template\.jinja, or"):
        encoder_of(folder)
    config = {
        "eos_token": END,
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "x", "template": ""}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert encoder_of(folder).template.text == CHATML
    refusing = {
        "{{ raise_exception('no system here') }}": "x, line 1: the chat template of data.tokenizer does not take it: "
        "no system here",
        "{{ messages[0].content.nothing.there }}": "does not take it: ",
        "{% for %}": "does not take it: ",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}": "marks 1 answers by {% generation %} in the "
        "first 5 messages; expected one for each of the assistant's 2",
    }
    for number, (template, words) in enumerate(refusing.items()):
        encoder = encoder_of(write_chat_model(tmp_path / str(number), template))
        with pytest.raises(InputError) as refused:
            encoder.encode(conversation("x, line 1", TURNS))
        assert words in str(refused.value)


def test_a_message_that_is_not_learnt_is_read_alone(tmp_path: Path) -> None:
    record = {"messages": messages("names?", "value", "and then", "token")}
    record["messages"][1]["weight"] = 0
    folder = write_chat_model(tmp_path / "model")
    encoder = encoder_of(folder)
    _, (encoded,) = encoder.encode(conversation("", record))
    assert answers(encoder, encoded, folder) == [f"token{END}"]


def test_special_tokens_that_messages_spell_are_noticed(tmp_path: Path) -> None:
    encoder = encoder_of(write_chat_model(tmp_path / "model"))
    for content, spelled in (("a <|im_end|> b", True), ("<|extra|> a <b> c", False)):
        assert encoder.spells_special(conversation("", {"messages": messages(content, "b")})) is spelled
    assert encoder.spells_special(conversation("", {"tools": [{"name": "<s>"}], "messages": messages("a", "b")}))


def test_conversations_are_cut_behind_an_answer(tmp_path: Path) -> None:
    encoder = encoder_of(write_chat_model(tmp_path / "model"))
    _, (encoded,) = encoder.encode(conversation("", TURNS))
    assert encoded.cut(encoded.ends[2]) is not None
    assert encoded.cut(encoded.ends[0] - 1) is None
    cut = encoded.cut(encoded.ends[2] - 1)
    assert cut is not None
    assert (len(cut.tokens_T), cut.ends) == (encoded.ends[1], encoded.ends[:2])
    assert cut.answers_T[-1]


def test_the_template_is_part_of_what_the_data_follow_from(tmp_path: Path) -> None:
    source = JsonlConversations(path=str(write_records(tmp_path / "x.jsonl", [TURNS])))
    digests = set()
    for number, template in enumerate((CHATML, MARKED, CHATML)):
        folder = write_chat_model(tmp_path / str(number), template)
        digests.add(TASK.source_digest(ChatData(source=source, tokenizer=TokenizerFile(path=str(folder)))))
    assert len(digests) == 2
