"""Malformed and hostile requests as their bytes, drawn by number, and what must come of each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Expected = Literal["200", "4xx", "200 or 4xx", "4xx or closed", "left"]
Gone = Literal["", "half", "event"]  # a client that goes, in the middle of its request or after the first event
VALID_SHARE = 0.05
MOST_BODY_BYTES = 4 << 20
COMPLETIONS, CHAT, CLASSIFY, RATINGS = "/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/ratings"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "import os\n", "max_tokens": 4},
    CHAT: {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 4},
    CLASSIFY: {"images": [[0.5, 0.5], [0.5, 0.5]]},
    RATINGS: {"id": "cmpl-1", "rating": 0.5, "comment": "good"},
}
NUMBERS, TRUTHS = ["x", True, [1], {"a": 1}, "1", -1e9, 1e9, 10**400, float("nan"), float("inf")], ["x", 1, 0, [], {}]
TEXTS, OBJECTS = [5, 1.5, True, ["x"], {"a": 1}, "\ud800"], [5, "x", True, [1], {"\ud800": 1}, {"a" * 9999: 1}]
LISTS = [5, True, "", [], [[]], {}, [None], [{}], [[[1]]], [1.5], ["\ud800"], [[True]]]
FRACTIONS = [number for number in NUMBERS if type(number) is not int]  # any whole number is a seed
COUNTS = [*NUMBERS, 1.0, 0, 10**19, 10**30]  # `giant n` and `giant max_tokens` are here
GENERATED: dict[str, list[Any]] = {
    "model": TEXTS, "user": TEXTS, "temperature": NUMBERS, "top_p": NUMBERS, "seed": [1.0, *FRACTIONS],
    "n": [*COUNTS, 17], "presence_penalty": NUMBERS, "frequency_penalty": NUMBERS, "response_format": OBJECTS,
    "stop": [5, True, {}, [""], [5], ["a"] * 17, "\ud800"], "grammar": [*TEXTS, "a" * 16385], "stream": TRUTHS,
    "logit_bias": [5, "x", [1], {"x": 1}, {"-1": 1}, {"1": 101}, {"1": True}, {"9" * 20: 1}, {"9" * 5000: 1},
                   {"1": float("nan")}, {str(i): 0 for i in range(301)}],
    "stream_options": OBJECTS, "max_tokens": [*COUNTS, 257], "best_of\ud800": [1], "tools": [{}, 5, "x", [[]], [{}]],
}  # fmt: skip
WRONG: dict[str, dict[str, list[Any]]] = {
    COMPLETIONS: GENERATED | {"prompt": LISTS, "logprobs": [*COUNTS[:-3], 21, -1]},
    CHAT: GENERATED
    | {
        "messages": [*LISTS, [{"role": "x", "content": "a"}], [{"role": "user"}], GOOD[CHAT]["messages"] * 1025],
        "max_completion_tokens": [*COUNTS, 257], "logprobs": TRUTHS, "top_logprobs": [*COUNTS, 21, 5],
    },
    CLASSIFY: {"images": [*LISTS, [[2]], [[float("nan")]], [[[0], [0, 1]]], [["x"]]], "model": TEXTS, "user": TEXTS},
    RATINGS: {"id": [*TEXTS, "", "x" * 65], "rating": NUMBERS, "comment": [*TEXTS, "x" * 4097], "extra": [1]},
}  # fmt: skip
GBNF = [
    "", " ", "root", "root ::=", "root ::= nothere", 'a ::= "b"', 'root ::= root "a"', "root ::= " + "(" * 16000,
    "root ::= " + "(" * 8000 + '"a"' + ")" * 8000, 'root ::= "\\UFFFFFFFF"', "root ::= [z-a]", "root ::= <[99999999]>",
    'root ::= ((("a"{1,2000}){1,2000}){1,2000}){1,2000}', 'root ::= "a"{1,1000000000}', "root ::= " + '"i"? ' * 2000,
    "root ::= " + '("i"* "i"*)* ' * 50, "%llguidance", "%llguidance {", "%llguidance {}\nstart: @other",
    "%llguidance {}\nstart: <[99999999]>", "%llguidance {}\nstart: <|nosuch|>", "%llguidance {}\nstart: /((a*)*)*b/",
    "%llguidance {}\nstart: /((a{1,1000}){1,1000}){1,1000}/", '%llguidance {}\nstart: start "a"',
    "%llguidance {}\nstart: %json " + '{"items":' * 900,
]  # fmt: skip
PATTERNS = ["^(a+)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "^((a{1,1000}){1,1000}){1,1000}$", "^(a|b)*a(a|b){500}$",
            "(?=a)b", r"(a)\1", "(", "(" * 5000 + ")" * 5000,
            "^(" + "|".join(f"a{i}.*b{i}" for i in range(900)) + ")$"]  # fmt: skip
SCHEMAS: list[Any] = [
    *({"type": "string", "pattern": pattern} for pattern in PATTERNS),
    {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"$ref": "#"}, {"$ref": "http://127.0.0.1/x"},
    {"$ref": "file:///etc/passwd"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"type": "x"},
    {"allOf": [{"type": "string", "pattern": f".*{c}.*{c}.*"} for c in "abcdefghijklmnop"]}, {"const": "\ud800"},
    {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**9}, {"enum": list(range(9999))},
    {"type": "integer", "multipleOf": 10**40}, {"type": "integer", "minimum": 5, "maximum": 1}, {"x-guidance": 5},
    {"x-guidance": {"whitespace_pattern": "((a*)*)*"}}, {"not": {}}, {"const": float("nan")}, {"\ud800": 1},
]  # fmt: skip
HEADERS = ["user-agent", "authorization", "x-session-id", "x-request-id", "serve_multiplexed_model_id", "host",
           "accept", "cookie", "origin", "expect", "x-forwarded-for", "traceparent"]  # fmt: skip
LENGTHS = [b"x", b"-1", b"+5", b"5, 6", b"0x10", b"1e3", b"", b"\xff", b"9" * 30, b"18446744073709551620", b"5\0"]
CODINGS = [b"chunked, identity", b"xchunked", b"identity, chunked, chunked", b"\x0bchunked", b"gzip", b"\xff"]
CHUNKS = [b"-1\r\nx", b"g\r\n", b"FFFFFFFFFFFFFFFFF\r\nx", b"5;" + b"x" * 99999 + b"\r\n", b"1\nx\n0\n\n",
          b"\r\n\r\n"]  # fmt: skip
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
PATHS = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%00", "%ff%fe", "%",
         "%zz", "....//x", "..\\..\\x", "/etc/passwd", "~root", "%252e%252e%252f", "a" * 60000,
         "x%0d%0aset-cookie:%20a", "file:%2f%2f/x",
         "${jndi:ldap:a}", "'%20or%201=1--", "<script>", "%ed%a0%80", "../../v1/models/nosuch"]  # fmt: skip
UNKNOWN = ["/nosuch", "/v1", "/v2/models", "/.env", "/.git/config", "/static-offline-docs/../../../../etc/passwd",
           "/static-offline-docs/%2e%2e/%2e%2e/app.py", "//", "/v1//models", "/metrics/../x", "/v1/completions/x",
           "/admin", "/V1/MODELS", "*", "/%", "/v1/models;a=b"]  # fmt: skip
METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND"]
TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "application/xml",
         "*/*", "application/jsonx", "json", "/", ";", "\xff", "image/png", "application/octet-stream",
         "text/json"]  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A request as its bytes, and what must come of it."""

    kind: str
    raw: bytes
    expected: Expected = "4xx"
    gone: Gone = ""


def request(path: str, body: bytes | None = None, *headers: bytes, method: str = "POST", length: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"host: 127.0.0.1", b"connection: close", *headers]
    if body is not None and not any(header.lower().startswith(b"content-type:") for header in headers):
        lines.append(b"content-type: application/json")
    if body is not None and length:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()  # with NaN, Infinity and lone surrogates, as Python's clients send them


def chunked(body: bytes, size: int = 1 << 16) -> bytes:
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def fuzzed(dice: random.Random) -> Ask:
    path = dice.choice(list(GOOD))
    good = encoded(GOOD[path])
    depth, flipped = dice.choice([10, 500, 900, 100_000]), bytearray(good)
    while _is_json(bytes(flipped)):
        flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
    bodies = {
        "truncated": good[: dice.randrange(len(good))],
        "flipped": bytes(flipped),
        "noise": dice.randbytes(dice.randrange(1, 4096)),
        "deep lists": b'{"prompt":' + b"[" * depth + b"]" * depth + b"}",
        "deep objects": b'{"prompt":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
        "not closed": b"[" * depth,
        "huge number": b'{"prompt":"a","n":' + b"9" * dice.choice([20, 400, 5000, 100_000]) + b"}",
        "huge exponent": b'{"prompt":"a","temperature":1e' + b"9" * dice.choice([3, 20, 5000]) + b"}",
        "no number": b'{"prompt":"a","top_p":%b}' % dice.choice([b"NaN", b"Infinity", b"-Infinity", b"-", b"01"]),
        "duplicate keys": good[:-1] + b', "%b": {}}' % next(iter(GOOD[path])).encode(),
        "other types": dice.choice([b"null", b"true", b"5", b'"x"', b"[]", b"{}", b"[{}]", b"1e999", b""]),
        "two documents": good + good,
        "surrogates": b'{"prompt":"\\ud800","\\udfff":1}',
        "encodings": dice.choice([b"\xef\xbb\xbf[1]", b'{"prompt":"\xff"}', '{"a":1}'.encode("utf-16"), b"\0" * 9]),
    }  # fmt: skip
    return Ask("fuzzed JSON", request(path, dice.choice(list(bodies.values()))))


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def wrong(dice: random.Random) -> Ask:
    path = dice.choice(list(WRONG))
    field = dice.choice(list(WRONG[path]))
    streamed = {"stream": True} if path in (COMPLETIONS, CHAT) and dice.random() < 0.2 else {}
    body = GOOD[path] | streamed | {field: dice.choice(WRONG[path][field])}
    return Ask("wrong values", request(path, encoded(body)))


def tokens(dice: random.Random) -> Ask:
    bad = dice.choice([-1, 10**6, 2**31, 2**32, 2**63, 2**64, 10**100])
    body: dict[str, Any] = dice.choice([{"prompt": [0, bad]}, {"prompt": [[0], [bad]]}, {"prompt": [0] * 100_000},
                        {"prompt": "a", "logit_bias": {str(abs(bad) + 10**6): 1}},
                        {"prompt": ["a"] * 17}, {"prompt": [[0]] * 9, "n": 2}])  # fmt: skip
    return Ask("token ids", request(COMPLETIONS, encoded(body | {"stream": dice.random() < 0.5})))


def grammars(dice: random.Random) -> Ask:
    """Some can be kept to, all must be dealt with in time."""
    path, schema = dice.choice([COMPLETIONS, CHAT]), {"name": "x", "schema": dice.choice(SCHEMAS)}
    format = {"response_format": {"type": "json_schema", "json_schema": schema}}
    asked: dict[str, Any] = dice.choice([{"grammar": dice.choice(GBNF)}, format])
    return Ask("grammars and schemas", request(path, encoded(GOOD[path] | asked)), "200 or 4xx")


def large(dice: random.Random) -> Ask:
    character = dice.choice(["a", " ", "7", "\n", "!", "ab 1", "<|endoftext|>", "'s"])
    fits = encoded({"prompt": character * (dice.choice([1, 3]) * 1_000_000 // len(json.dumps(character)))})
    above = encoded({"prompt": "a" * (MOST_BODY_BYTES + dice.randrange(1 << 20))})
    length = b"content-length: %d" % dice.choice([MOST_BODY_BYTES + 1, 10**12])
    return dice.choice([
        Ask("large prompts", request(COMPLETIONS, fits)),
        Ask("bodies above 4 MiB", request(COMPLETIONS, above), "4xx or closed"),
        Ask("bodies above 4 MiB", request(COMPLETIONS, chunked(above), b"transfer-encoding: chunked", length=False),
            "4xx or closed"),
        Ask("bodies above 4 MiB", request(COMPLETIONS, b"{", length, length=False)),
    ])  # fmt: skip


def headers(dice: random.Random) -> Ask:
    name = dice.choice(HEADERS).encode()
    value = dice.choice([b"\xff\xfe", b"\xed\xa0\x80", b"Bearer \xff", b"x" * 60_000, b"100-continue", b"' or 1=1"])
    lifted = dice.choice([b"x-request-timeout-seconds: 9e9", b"X-Request-Timeout-Seconds: x",
                          b"x-request-disconnect-disabled: 1"])  # fmt: skip
    body = encoded(GOOD[COMPLETIONS])
    return dice.choice([
        Ask("headers", request(COMPLETIONS, body, name + b": " + value), "200 or 4xx"),
        Ask("headers", request(COMPLETIONS, b"{", name + b": " + value[:100])),
        Ask("headers", request("/v1/models", None, *[b"a%d: b" % i for i in range(5000)], method="GET"), "200 or 4xx"),
        Ask("headers", request(COMPLETIONS, body, lifted)),
    ])  # fmt: skip


def framing(dice: random.Random) -> Ask:
    """Where servers disagree on where a request ends, one may be smuggled behind another."""
    bad = b'{"prompt":'
    both = [b"content-length: %d" % dice.choice([3, 10, 99]), b"transfer-encoding: chunked"]
    lines = dice.choice([b"a\0b: c", b" folded: x", b"no colon", b"a : b", b": x", b"a: b\rc: d", b"host: c"])
    return Ask("broken HTTP", dice.choice([
        request(COMPLETIONS, bad, b"content-length: " + dice.choice(LENGTHS), length=False),
        request(COMPLETIONS, bad, b"content-length: 10", b"content-length: 3", length=False),
        request(COMPLETIONS, chunked(bad) + SMUGGLED, *both, length=False),
        request(COMPLETIONS, b"0\r\n\r\n" + SMUGGLED, *both[::-1], length=False),
        request(COMPLETIONS, chunked(bad), b"transfer-encoding: " + dice.choice(CODINGS), length=False),
        request(COMPLETIONS, dice.choice(CHUNKS), b"transfer-encoding: chunked", length=False),
        request(COMPLETIONS, bad, lines),
        dice.choice([b"", b"\0", b"\x16\x03\x01\x02\0", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"get / http/1.1\r\n\r\n", b"x" * 99999,
                     b"POST  /v1/completions HTTP/1.1\r\n\r\n", dice.randbytes(999)]),
    ]), "4xx or closed")  # fmt: skip


def places(dice: random.Random) -> Ask:
    method, path = dice.choice(METHODS), dice.choice(list(GOOD))
    return dice.choice([
        Ask("path traversal", request("/v1/models/" + dice.choice(PATHS), method="GET")),
        Ask("unknown paths and methods", request(dice.choice(UNKNOWN), method="GET")),
        Ask("unknown paths and methods", request(path, encoded(GOOD[path]), method=method)),
        Ask("unknown paths and methods", request("/v1/models", b"{}", method=dice.choice(["POST", "PUT", "DELETE"]))),
    ])  # fmt: skip


def types(dice: random.Random) -> Ask:
    path, type = dice.choice(list(GOOD)), dice.choice(TYPES)
    form = b'--a\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na\r\n--a--\r\n'
    body = dice.choice([encoded(GOOD[path]), b"prompt=a&max_tokens=4", form])
    return Ask("content types", request(path, body, f"content-type: {type}".encode("latin-1")))


def leaving(dice: random.Random) -> Ask:
    good = request(COMPLETIONS, encoded(GOOD[COMPLETIONS] | {"max_tokens": 256}))
    whole = Ask("clients that leave", good, "left", "half")
    part = Ask("clients that leave", good[: dice.choice([1, 20, len(good) - 40, len(good) - 1])], "left", "half")
    stream = {"max_tokens": 256, "temperature": 1.0, "stream": True, "n": dice.choice([1, 1, 4])}
    aborted = Ask("aborted streams", request(COMPLETIONS, encoded(GOOD[COMPLETIONS] | stream)), "200", "event")
    return dice.choice([whole, part, aborted, aborted])


def valid(dice: random.Random) -> Ask:
    asked = {"stream": dice.random() < 0.5, "temperature": dice.random(), "seed": dice.randrange(999)}
    return dice.choice([
        Ask("valid requests", request(COMPLETIONS, encoded(GOOD[COMPLETIONS] | asked)), "200"),
        Ask("valid requests", request("/v1/models", method="GET"), "200"),
    ])  # fmt: skip


Draw = Callable[[random.Random], Ask]
HOSTILE: list[Draw] = [fuzzed, wrong, tokens, grammars, headers, framing, places, types, leaving, large]
WEIGHTS = [20, 30, 8, 8, 8, 8, 8, 6, 6, 2]


def drawn(seed: int, number: int) -> Ask:
    """The request of this number; it can be drawn again alone."""
    dice = random.Random(f"{seed} {number}")
    return (valid if dice.random() < VALID_SHARE else dice.choices(HOSTILE, WEIGHTS)[0])(dice)
