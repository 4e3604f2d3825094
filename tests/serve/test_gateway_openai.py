"""What OpenAI's own Python client does, done on real Ray Serve replicas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from browser import open_page
from overproof.config import Served
from overproof.engines.endpoint import Endpoint
from overproof.engines.llamacpp_scorer import LlamaCppScorer
from overproof.files import file_sha256
from overproof.package.package import open_package
from overproof.serve.metrics import METRIC_PREFIXES, merge_metrics
from shared_server import SharedServer, wait_until

MESSAGES: Any = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "import os"}]
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


@pytest.fixture
def client(shared_server: SharedServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{shared_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: OpenAI, text_package: Path) -> None:
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed
    assert listed.id == "stdlib-lm"
    with pytest.raises(openai.NotFoundError, match="expected 'stdlib-lm'"):
        client.models.retrieve("gpt")


def test_a_completion_names_its_package(client: OpenAI, text_package: Path) -> None:
    done = client.completions.create(model="stdlib-lm", prompt="import os\n", max_tokens=8, temperature=0)
    assert done.choices[0].finish_reason == "length"
    assert done.usage
    assert done.usage.completion_tokens == 8
    assert done.model_extra
    assert done.model_extra["package"] == open_package(text_package).content.id


def test_prompts_and_choices_come_in_order_and_seeds_repeat_them(client: OpenAI) -> None:
    def texts(n: int, prompts: list[str]) -> list[str]:
        done = client.completions.create(model="stdlib-lm", prompt=prompts, n=n, max_tokens=12, seed=7, temperature=1.0)
        assert [choice.index for choice in done.choices] == list(range(len(prompts) * n))
        return [choice.text for choice in done.choices]

    both = texts(2, ["import os\n", "class A"])
    assert len(set(both)) == 4
    assert both[::2] == texts(1, ["import os\n", "class A"])  # the first choice is the only one's


def test_streams_of_several_choices_join_to_the_whole(client: OpenAI) -> None:
    arguments: Any = {
        "model": "stdlib-lm",
        "prompt": "import os\n",
        "n": 3,
        "max_tokens": 24,
        "seed": 1,
        "stop": ["\n\n"],
    }
    whole = client.completions.create(**arguments)
    *events, last = client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    joined = {choice.index: "" for choice in whole.choices}
    reasons = {}
    for event in events:
        (choice,) = event.choices
        joined[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        assert event.usage is None
    assert joined == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert (last.choices, last.usage) == ([], whole.usage)


def test_log_probabilities_of_completions(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "prompt": "import os\n", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    choice = client.completions.create(**arguments).choices[0]
    found = choice.logprobs
    assert found
    assert found.tokens
    assert found.token_logprobs
    assert found.top_logprobs
    assert found.text_offset
    assert "".join(found.tokens) == choice.text
    for token, value, top, offset in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True
    ):
        assert choice.text[offset:].startswith(token)
        assert len(top) == 2
        assert top[token] == value == max(top.values())  # greedy
    events = [event.choices[0] for event in client.completions.create(**arguments, stream=True)]
    assert "".join(event.text for event in events) == choice.text
    reported = [value for event in events if event.logprobs for value in event.logprobs.token_logprobs or ()]
    assert reported == found.token_logprobs


def test_a_prompt_is_told_with_its_log_probabilities(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "prompt": ["import os\n", [0, 70, 71]], "echo": True, "temperature": 0}
    first, second = client.completions.create(**arguments, logprobs=2, max_tokens=1).choices
    assert first.text.startswith("import os\n")
    assert first.logprobs
    assert second.logprobs
    assert first.logprobs.token_logprobs
    assert first.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in first.logprobs.token_logprobs[1:])
    assert len(second.logprobs.tokens or ()) == 4
    events = [event.choices[0] for event in client.completions.create(**arguments, max_tokens=4, stream=True)]
    for index, told in enumerate(("import os\n", "fg")):
        assert next(event.text for event in events if event.index == index) == told


def test_biases_decide_and_penalties_forbid_to_repeat(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "prompt": [0, 70], "max_tokens": 8, "temperature": 0}
    assert client.completions.create(**arguments, logit_bias={"70": 100}).choices[0].text == "f" * 8
    plain, other = (
        client.completions.create(**arguments, logprobs=0, frequency_penalty=penalty).choices[0].logprobs
        for penalty in (0.0, 2.0)
    )
    assert plain
    assert plain.tokens
    assert other
    assert other.tokens
    assert len(set(other.tokens)) > len(set(plain.tokens))


def test_a_chat_is_the_completion_of_the_models_own_template(client: OpenAI) -> None:
    chat = client.chat.completions.create(model="stdlib-lm", messages=MESSAGES, max_completion_tokens=16, temperature=0)
    prompt = "# system\nWrite Python.\n# user\nimport os\n# assistant\n"
    done = client.completions.create(model="stdlib-lm", prompt=prompt, max_tokens=16, temperature=0)
    assert (chat.choices[0].message.role, chat.choices[0].message.content) == ("assistant", done.choices[0].text)
    assert chat.usage == done.usage


def test_a_chat_streams(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "messages": MESSAGES, "max_tokens": 16, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**arguments)
    *events, last = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    for choice in whole.choices:
        deltas = [event.choices[0].delta for event in events if event.choices[0].index == choice.index]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert last.usage == whole.usage


def test_log_probabilities_of_chats(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "messages": MESSAGES, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    found = client.chat.completions.create(**arguments, temperature=0).choices[0]
    assert found.logprobs
    assert found.logprobs.content
    text = b"".join(bytes(token.bytes or ()) for token in found.logprobs.content)
    assert text.decode() == found.message.content
    assert all(len(token.top_logprobs) == 3 for token in found.logprobs.content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in found.logprobs.content)


@pytest.mark.parametrize("seed", range(3))
def test_json_is_what_its_schema_says(client: OpenAI, seed: int) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
    arguments: Any = {"model": "stdlib-lm", "messages": MESSAGES, "max_tokens": 256, "seed": seed}
    output = client.chat.completions.create(**arguments, response_format=schema).choices[0]
    assert output.finish_reason == "stop"
    answer = json.loads(output.message.content or "")
    assert sorted(answer) == ["ok", "size"]
    assert answer["ok"] in (True, False)
    assert answer["size"] in (1, 2)
    streamed = client.chat.completions.create(**arguments, response_format=schema, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in streamed) == output.message.content


def test_a_grammar_is_kept_to(client: OpenAI) -> None:
    for grammar in ('root ::= "yes" | "no"', '%llguidance {}\nstart: "yes" | "no"'):
        done = client.completions.create(
            model="stdlib-lm", prompt="import os\n", max_tokens=8, extra_body={"grammar": grammar}
        )
        assert done.choices[0].text in ("yes", "no")


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens: found 999") as refused:
        client.completions.create(model="stdlib-lm", prompt="x", max_tokens=999)
    assert (refused.value.param, refused.value.type) == ("max_tokens", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="tokens long"):
        client.completions.create(model="stdlib-lm", prompt="x" * 9999, stream=True)
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served here"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="stdlib-lm", input="x")


def test_the_interactive_docs_work_in_a_browser(client: OpenAI, tmp_path: Path) -> None:
    """Nothing comes from elsewhere, and "Try it out" gets a real answer."""
    base = str(client.base_url).removesuffix("/v1/")
    with open_page(f"{base}/docs", tmp_path) as (page, heard):
        for route in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/healthz"):
            page.locator(f'[data-path="{route}"]').wait_for()
        page.locator('[data-path="/healthz"]').click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        page.get_by_text('"status": "ok"').first.wait_for()
    assert all(url.startswith((base, "data:", "blob:")) for url in heard.requests)
    assert heard.complaints == []


def test_metrics_of_all_nodes_are_one_text(client: OpenAI, text_package: Path) -> None:
    """Ray's agents hand them on every few seconds."""
    package = open_package(text_package).content.id

    def read() -> str:
        url = f"{client.base_url}".replace("/v1/", "/metrics")
        return httpx.get(url, trust_env=False, timeout=60).raise_for_status().text  # on a busy machine

    def values(text: str, name: str, label: str) -> dict[str | None, float]:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {s.labels.get(label): s.value for s in samples if s.name == name and s.labels["package"] == package}

    def completion_tokens() -> float:
        return values(read(), "ray_overproof_tokens_total", "kind").get("completion", 0.0)

    before = completion_tokens()
    client.completions.create(model="stdlib-lm", prompt="import os\n", max_tokens=8, logit_bias={"0": -100})
    wait_until(lambda: completion_tokens() >= before + 8)
    wait_until(lambda: values(read(), "ray_overproof_replicas", "") == {None: 1})
    wait_until(lambda: values(read(), "ray_overproof_requests", "state") == {"running": 0, "waiting": 0})
    text = read()
    assert all(line.split()[2].startswith(METRIC_PREFIXES) for line in text.splitlines() if line.startswith("# TYPE"))
    assert "\nray_serve_" in text
    documented = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    own = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ray_overproof_")]
    assert own
    assert all(f"`{name}" in documented for name in own), own


def test_families_of_several_texts_are_joined() -> None:
    one, two = (f'# HELP ray_serve_x X.\n# TYPE ray_serve_x gauge\nray_serve_x{{node="{n}"}} 1.0\n' for n in "ab")
    other = "# TYPE ray_node_y gauge\nray_node_y 1.0\n"
    assert merge_metrics([one + other, two]) == one + two.splitlines()[-1] + "\n"


def test_it_can_be_a_teacher(shared_server: SharedServer, text_package: Path) -> None:
    """What its replicas say of given texts is what the file says of them in this process."""
    model, ids = open_package(text_package).model, [[1, 5, 9, 40, 7, 300], [2, 8, 8, 31]]
    endpoint = Endpoint(Served(url=f"{shared_server.url}/v1", model="stdlib-lm", rows_per_request=1))
    scorer = LlamaCppScorer(model, 5, 1)
    expected = list(scorer.score(map(np.array, ids)))
    assert endpoint.model_entry()["overproof"]["sha256"] == file_sha256(model)
    for told, here in zip(endpoint.read_rows(ids, 4), expected, strict=True):
        np.testing.assert_allclose(-told.logprobs_P, here.nats_P, atol=1e-3)
        assert [max(top, key=lambda name: top[name]) for top in told.top_P] == here.choices_P.tolist()
    scorer.close()
    endpoint.close()
