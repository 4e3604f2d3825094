"""Chat: conversations of several turns, of which the assistant's words are learnt, judged by bits per byte of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from overproof.config.base import Section
from overproof.config.data import DataSection, HeldOutNearDuplicates, NearDuplicates, TokenizerFile
from overproof.models.base import DataShape, Prediction
from overproof.tasks.base import CardWords, Loss
from overproof.tasks.language_modeling import CausalTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.data.source_files import FileListing
    from overproof.export.base import Format
    from overproof.stage_context import StageContext

    Batch = dict[str, Tensor]


class JsonlConversations(Section):
    """JSON Lines; a line is a conversation: OpenAI's `messages`, ShareGPT's `conversations`, or Alpaca's columns."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="A .jsonl file or a folder of them, or a URI.")


class ParquetConversations(Section):
    """Parquet; one row is one conversation, in columns named as in JSON Lines."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A .parquet file or a folder of them, or a URI.")


class ChatData(DataSection):
    """Conversations, written by the model's own chat template, split by what they ask, and packed to one length.

    No conversation is seen from another in its row, and the assistant's words alone count.
    """

    kind: Literal["chat"] = "chat"
    source: Annotated[JsonlConversations | ParquetConversations, Field(discriminator="kind")]
    tokenizer: TokenizerFile = Field(description="Of the chat model's directory, whose chat template is used.")
    sequence_length: int = Field(
        512, ge=8, le=1_048_576, description="Predicted tokens in a row; longer conversations are cut behind an answer."
    )
    near_duplicates: HeldOutNearDuplicates = NearDuplicates()

    @property
    def positions(self) -> int:
        """Predictions in a row."""
        return self.sequence_length

    @property
    def apart(self) -> bool:
        return True


class Chat(CausalTask):
    """See ``Task``: a language model of packed rows, of whose tokens the answers' alone count."""

    section = ChatData
    unit, test_unit = "token", "conversation"
    losses: frozenset[Loss] = frozenset({"outputs", "hidden_states"})
    route = "/v1/chat/completions"
    counted = "answer"
    expects_answers = True

    def source_files(self, data: ChatData) -> FileListing:
        from overproof.tasks.conversations import conversation_files

        return conversation_files(data.source, data.on_error)

    def source_digest(self, data: ChatData) -> str:
        from overproof.tasks.chat_data import chat_digest

        return chat_digest(data)

    def shape(self, data: ChatData) -> DataShape:
        from overproof.data.text_tokenizer import read_tokenizer

        return DataShape(data.kind, read_tokenizer(data.tokenizer).outputs, data.positions, apart=data.apart)

    def check_export(self, data: ChatData, format: Format) -> Sequence[str]:
        from overproof.data.text_tokenizer import read_tokenizer
        from overproof.engines.chat_template import require_renderable
        from overproof.tasks.chat_template import read_chat_template

        tokenizer = read_tokenizer(data.tokenizer)
        left_out = format.check_tokenizer(tokenizer.json, "data.tokenizer")
        where = f"data.tokenizer.path: {data.tokenizer.path}"
        require_renderable(read_chat_template(data.tokenizer, tokenizer).text, where, "change it there")
        return left_out

    def prepare(self, context: StageContext) -> Manifest:
        from overproof.tasks.chat_data import prepare_chat

        return prepare_chat(context)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """A causal model on the columns of ``chat_rows.chat_columns``.

        Neither a mask nor a cache may be given: either makes transformers take the row for one text. In training the
        weights are such that a mean over the answers' tokens of a part of a batch is its sum over them by what is
        there in the mean: the mean over the parts is that of the batch, whatever they are.
        """
        tokens_BS, answer_BP, scale_B1 = batch["tokens"], batch["answer"], batch["scale"][:, None]
        logits_BPV = model(input_ids=tokens_BS[:, :-1], position_ids=batch["position"], use_cache=False).logits
        count = answer_BP.sum()
        weight_B1 = (scale_B1 > 0) * (scale_B1 * count / len(answer_BP)) + (scale_B1 == 0)
        return Prediction(logits_BPV, tokens_BS[:, 1:], answer_BP * weight_B1)

    def segments(self, batch: Batch, states_BPD: Tensor) -> Tensor:
        del states_BPD
        return batch["answer"] > 0

    def example(self, details: Mapping[str, Any]) -> dict[str, Any]:
        asked = details.get("example", "What can you do?")
        return {"messages": [{"role": "user", "content": asked}], "max_tokens": 48, "seed": 0}

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        return f"{body['messages'][-1]['content']} {reply['choices'][0]['message']['content']}"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        return CardWords(
            summary="A chat model",
            intended_use=(
                "It answers messages as the conversations that it was trained on do, and repeats what lies in them, "
                "with their licences and their errors. It was measured on the answers of conversations of up to "
                f"{manifest.positions + 1} tokens; longer ones are accepted and were not measured. What it says may be "
                "wrong. It was not tested for harmful output."
            ),
            latency=f"32 prompt tokens at most, {settings.decode_tokens} generated at most",
        )


TASK = Chat()
