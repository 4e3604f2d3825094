"""Endpoints that tell log-probabilities of prompts, over real HTTP: overproof's own server, and one in vLLM's shape."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from overproof.engines.llamacpp import LlamaCpp
from overproof.files import file_sha256
from overproof.models.hf_directory import load_model
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import ModelInfo, Provenance
from overproof.serve.routes import build_app
from single_model import listening

KEY = "a-key-of-the-test"


@contextmanager
def own_server(file: Path) -> Iterator[str]:
    """The address of overproof's server of a GGUF file, called `teacher` there."""
    proof = Provenance(
        task="language_modeling", details={}, package="made/package-0", candidate="teacher", format="f16",
        sha256=file_sha256(file), size_bytes=file.stat().st_size, verdict=[], parents={},
    )  # fmt: skip
    engine = LlamaCpp(file)
    served = ServedModel(ModelInfo(id="teacher", created=0, overproof=proof), ThreadedEngine(engine, 4), 32, str(file))
    with listening(build_app(SingleModel(served), Access(None))) as address:
        yield f"{address}/v1"
    engine.close()


@dataclass
class VllmShaped:
    """What a server has that answers as vLLM 0.32 does, and what it was asked."""

    url: str
    model: Any
    tokenizer: Tokenizer
    root: str
    busy: int = 0  # requests that are turned away first
    down_after: int | None = None  # answers, after which all are turned away
    prompts: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["logprobs"] > 20:
            told = f"Requested prompt logprobs of {body['logprobs']}, which is greater than max allowed: 20"
            return 400, {"error": {"message": told, "type": "BadRequestError", "param": "logprobs", "code": 400}}
        assert body["echo"]
        assert body["return_tokens_as_token_ids"]
        assert body["max_tokens"] == 0
        prompts = [p if isinstance(p, list) else self.tokenizer.encode(p).ids for p in body["prompt"]]
        with self.lock:
            self.prompts += len(prompts)
            choices = [self._choice(number, ids, body["logprobs"]) for number, ids in enumerate(prompts)]
        used = {"prompt_tokens": sum(map(len, prompts)), "total_tokens": sum(map(len, prompts)), "completion_tokens": 0}
        return 200, {
            "id": "cmpl-0", "object": "text_completion", "created": int(time.time()), "model": body["model"],
            "choices": choices, "service_tier": None, "system_fingerprint": None, "kv_transfer_params": None,
            "usage": used,
        }  # fmt: skip

    def _choice(self, number: int, ids: list[int], top: int) -> dict[str, Any]:
        with torch.inference_mode():
            logprobs_PV = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values, tops = [None], [None]
        for logprobs_V, id_ in zip(logprobs_PV, ids[1:], strict=False):
            best = [id_, *logprobs_V.topk(top).indices.tolist()]  # the prompt's own comes first
            tops.append({f"token_id:{each}": float(logprobs_V[each]) for each in dict.fromkeys(best)})
            values.append(tops[-1][f"token_id:{id_}"])
        told = {
            "text_offset": [0] * len(ids), "token_logprobs": values, "tokens": [f"token_id:{id_}" for id_ in ids],
            "top_logprobs": tops,
        }  # fmt: skip
        return {
            "index": number, "text": self.tokenizer.decode(ids), "logprobs": told, "finish_reason": "length",
            "stop_reason": None, "token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None,
        }  # fmt: skip


@contextmanager
def vllm_shaped(directory: Path) -> Iterator[VllmShaped]:
    """A server of a Hugging Face directory, called `teacher` there, which asks for ``KEY``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def turned_away(self) -> bool:
            if self.headers["authorization"] != f"Bearer {KEY}":
                self.answer(401, {"error": "Unauthorized"})
            elif made.busy > 0 or (made.down_after is not None and made.prompts >= made.down_after):
                made.busy -= 1
                self.answer(503, {"error": {"message": "busy"}})
            else:
                return False
            return True

        def do_GET(self) -> None:
            if not self.turned_away():
                entry = {
                    "id": "teacher", "object": "model", "created": int(time.time()), "owned_by": "vllm",
                    "root": made.root, "parent": None, "max_model_len": 512, "permission": [],
                }  # fmt: skip
                self.answer(200, {"object": "list", "data": [entry]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.turned_away():
                self.answer(*made.complete(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    made = VllmShaped(f"http://127.0.0.1:{server.server_port}/v1", load_model(directory), tokenizer, str(directory))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
