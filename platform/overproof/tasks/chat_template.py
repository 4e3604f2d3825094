"""A model's own chat template: conversations as text, and where the assistant's words stand in it; then as tokens.

Which words are the assistant's is exact. A template that marks them (``{% generation %}``, as transformers has it) is
taken at its word. Of any other the text up to an answer, as it is when that answer is asked for, must begin the text
with the answer: what lies between the two is the answer.

Some templates write earlier turns otherwise once a conversation goes on: those of models that think leave out what was
thought. Where the text up to an answer does not begin the text of the whole, each answer has a text of its own: what a
server asks with, and the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from overproof.config import TokenizerFile
from overproof.data.altered_texts import SAME, how_it_comes_back
from overproof.data.chat_template_files import CHAT_TEMPLATE, CONFIG_FILES, read_object, require_default, template_files
from overproof.data.text_tokenizer import TextTokenizer
from overproof.data.tokenizer_json import continuing, special_names_as_text
from overproof.engines.chat_template import TOLD_TOKENS, TemplateRenderer
from overproof.errors import InputError
from overproof.tasks.conversations import ASSISTANT, Conversation, Message

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATED = "strftime_now"  # what templates call to write the day's date
SHOWN = 60  # characters of a text in a message
WALL_S = 600.0  # to write a text, on a machine that is busy; its seconds of CPU are bounded apart
Span = tuple[int, int]  # characters


@dataclass(frozen=True)
class AnsweredText:
    """A conversation as text, and of each of the answers that are learnt the characters, in order."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what it may call the special tokens."""

    text: str
    special: Mapping[str, str]  # bos_token and eos_token: the names of tokens
    tokens: tuple[str, ...]  # the names of all special tokens

    @property
    def marks_answers(self) -> bool:
        """Whether it says which words are the assistant's."""
        return MARKS.search(self.text) is not None

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, ask: bool, where: str
    ) -> tuple[str, list[Span]]:
        """The text of messages, as transformers' ``apply_chat_template`` gives it, and what it marks as answers.

        ``ask`` puts behind them what asks for the assistant's next one.

        Raises:
            InputError: the template does not take them.
        """
        variables = {"messages": list(messages), "tools": None if tools is None else list(tools)}
        found = self._renderer.render(self.text, {**self.special, **variables, "add_generation_prompt": ask})
        if "error" in found:
            raise InputError(
                f"{where}: the chat template of data.tokenizer does not take it: {found['error']}; expected messages "
                "that it does"
            )
        return found["text"], [(start, stop) for start, stop in found["spans"]]

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        return TemplateRenderer(WALL_S)

    def texts(self, found: Conversation) -> list[AnsweredText]:
        """A conversation up to its last answer that is learnt; or, where the template rewrites what came before, as
        many texts as there are such answers, each up to its own.

        Raises:
            InputError: the template does not take it, or its answers cannot be told exactly.
        """
        numbers = [number for number, is_learnt in enumerate(found.learnt) if is_learnt]
        texts = [self._up_to(found, number) for number in numbers]
        whole, _ = texts[-1]
        if all(whole.startswith(text[: span[1]]) for text, span in texts):
            return [AnsweredText(whole, tuple(span for _, span in texts))]
        return [AnsweredText(text, (span,)) for text, span in texts]

    def _up_to(self, found: Conversation, number: int) -> tuple[str, Span]:
        """The text up to one of the assistant's messages, and the characters that are its answer."""
        messages = found.messages[: number + 1]
        text, marked = self.render(messages, found.tools, False, found.where)
        if not self.marks_answers:
            return text, self._behind_prompt(found, number, text)
        spans = [(start, stop) for start, stop in marked if text[start:stop].strip()]
        answers = sum(message["role"] == ASSISTANT for message in messages)
        if len(spans) != answers:
            raise InputError(
                f"{found.where}: the chat template of data.tokenizer marks {len(spans)} answers by {{% generation %}} "
                f"in the first {len(messages)} messages; expected one for each of the assistant's {answers}"
            )
        return text, spans[-1]

    def _behind_prompt(self, found: Conversation, number: int, text: str) -> Span:
        prompt, _ = self.render(found.messages[:number], found.tools, True, found.where)
        if not text.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
            raise InputError(
                f"{found.where}: the chat template of data.tokenizer writes what stands before message {number + 1}, "
                f"the assistant's, otherwise with the answer: {prompt[at : at + SHOWN]!r} becomes "
                f"{text[at : at + SHOWN]!r}, so that the answer cannot be told; expected a template that marks it by "
                "{% generation %}"
            )
        return len(prompt), len(prompt) + len(self._without_tail(text[len(prompt) :]))

    def _without_tail(self, answer: str) -> str:
        """White space behind the token that ends an answer belongs to what follows it: no model writes it."""
        end = max((answer.rfind(name) + len(name) for name in self.tokens if name in answer), default=len(answer))
        return answer if answer[end:].strip() else answer[:end]


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's T tokens, up to its last answer that is learnt. It may be cut behind each of its answers."""

    tokens_T: NDArray[np.int32]
    answers_T: NDArray[np.bool_]  # whether a token is of an answer
    ends: tuple[int, ...]  # tokens up to the end of each answer that is learnt
    sizes_bytes: tuple[int, ...]  # of the answers up to each end, special tokens left out

    def cut(self, most: int) -> EncodedConversation | None:
        """Its longest beginning that ends with an answer and has at most so many tokens; None where there is none."""
        count = sum(end <= most for end in self.ends)
        if not count:
            return None
        end = self.ends[count - 1]
        return EncodedConversation(
            self.tokens_T[:end], self.answers_T[:end], self.ends[:count], self.sizes_bytes[:count]
        )


class ConversationEncoder:
    """Conversations as tokens, by a template and its tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: TextTokenizer) -> None:
        self.template = template
        self._first, self._later = (Tokenizer.from_str(text) for text in (tokenizer.json, continuing(tokenizer.json)))
        self._plain = Tokenizer.from_str(special_names_as_text(tokenizer.json))
        self._plain.encode_special_tokens = True
        added = self._first.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        starts = tokenizer.start_id != tokenizer.end_id
        self._start = (tokenizer.start_id,) if starts else ()  # as engines put it before a prompt that lacks it
        self._spelled = re.compile("|".join(map(re.escape, self._special.values()))) if self._special else None

    def spells_special(self, found: Conversation) -> bool:
        """Whether a message holds the name of a special token, which would be read as that token."""
        return self._spelled is not None and any(
            self._spelled.search(text) for text in _strings([found.messages, found.tools])
        )

    def comes_back(self, found: Conversation) -> int:
        """How its messages come back by their tokens, see ``how_it_comes_back``: the worst of them."""
        texts = [text for message in found.messages for text in _strings(message["content"])]
        encoded = [self._plain.encode(text, add_special_tokens=False).ids for text in texts]
        back = self._plain.decode_batch(encoded, skip_special_tokens=False)
        return max(map(how_it_comes_back, texts, back), default=SAME)

    def encode(self, found: Conversation) -> tuple[str, list[EncodedConversation]]:
        """The text up to the last answer, and the tokens of each of the texts that ``ChatTemplate.texts`` gives.

        Raises:
            InputError: the template does not take the conversation, or its answers cannot be told.
        """
        texts = self.template.texts(found)
        return texts[-1].text, [self._encoded(each) for each in texts]

    def _encoded(self, found: AnsweredText) -> EncodedConversation:
        parts, at = list[str](), 0
        for start, stop in found.spans:
            parts += [found.text[at:start], found.text[start:stop]]
            at = stop
        ids = self.split(found.text, parts)
        ends, sizes, total, size = [], [], 0, 0
        for number, (part, own) in enumerate(zip(parts, ids, strict=True)):
            total += len(own)
            if number % 2:  # an answer
                names = sum(len(self._special[id_].encode()) for id_ in own if id_ in self._special)
                size += len(part.encode()) - names
                ends.append(total)
                sizes.append(size)
        tokens_T = np.array([id_ for own in ids for id_ in own], np.int32)
        answers_T = np.repeat([number % 2 == 1 for number in range(len(ids))], [len(own) for own in ids])
        answers_T[0] = False  # nothing stands before it that could predict it
        return EncodedConversation(tokens_T, answers_T, tuple(ends), tuple(sizes))

    def split(self, text: str, parts: Sequence[str]) -> list[list[int]]:
        """The tokens of the parts that a text begins with.

        They are those of the text wherever its tokens end with the parts. Where one would cross a border, the parts are
        read one by one: a prompt ends there, and what a model writes after it begins.
        """
        whole = self._first.encode(text, add_special_tokens=False).ids
        found: list[list[int]] = []
        at = 0
        for number, part in enumerate(parts):
            readers = (self._later, self._first) if number else (self._first,)
            reads = [reader.encode(part, add_special_tokens=False).ids for reader in readers]
            own = next((ids for ids in reads if whole[at : at + len(ids)] == ids), reads[0])
            found.append(own)
            at += len(own)
        if self._start and tuple(found[0][: len(self._start)]) != self._start:
            found[0] = [*self._start, *found[0]]
        return found

    def last_special(self, encoded: EncodedConversation) -> int | None:
        """The special token that the last answer ends with, if it is one."""
        last = int(encoded.tokens_T[-1])
        return last if last in self._special else None


def read_chat_template(settings: TokenizerFile, tokenizer: TextTokenizer) -> ChatTemplate:
    """The template of the directory that a tokenizer is in.

    Raises:
        InputError: it has none, or several and none by default.
    """
    files = template_files(settings.path)
    special = dict[str, str]()
    names = Tokenizer.from_str(tokenizer.json)
    for name, id_ in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.end_id)):
        if id_ is not None:
            special[name] = str(names.id_to_token(id_))
    for file in CONFIG_FILES:
        for name, value in read_object(files.get(file, "{}"), file).items():
            content = value.get("content") if isinstance(value, dict) else value
            if name in TOLD_TOKENS and isinstance(content, str):
                special[name] = content
    text = require_default(files, f"data.tokenizer.path: {settings.path}")
    if text is None:
        raise InputError(
            f"data.tokenizer.path: {settings.path}: no chat template there; expected {CHAT_TEMPLATE}, or chat_template "
            "in tokenizer_config.json, as the directory of a chat model has it"
        )
    tokens = tuple(token.content for token in names.get_added_tokens_decoder().values() if token.special)
    return ChatTemplate(text, special, tokens)


def _strings(value: Any) -> list[str]:
    """Every string in a value of JSON, keys among them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.items() for text in _strings(item)]
    return [text for each in value for text in _strings(each)] if isinstance(value, list | tuple) else []
