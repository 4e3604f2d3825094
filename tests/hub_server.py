"""A server on this machine that speaks what ``huggingface_hub`` asks the Hub when it lists and reads models."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

API = re.compile(
    r"/api/models/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info|auth-check)(?:/(?P<rev>[^/?]+))?)?"
)
FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


@dataclass
class Model:
    """A repository: the files of each commit, and which commit each branch and tag is of."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    allowed: tuple[str, ...] = ()  # tokens

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Hub:
    """What a running server has, where it listens, and what it was asked for."""

    url: str
    models: dict[str, Model] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)  # names of files whose content was sent

    def push(self, name: str, files: Mapping[str, bytes], branch: str = "main", **settings: Any) -> str:
        """Make a commit the newest of a branch; gives its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        model = self.models.setdefault(name, Model({}, {}, **settings))
        model.commits[commit] = dict(files)
        model.refs[branch] = commit
        return commit


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(self.path.partition("?")[0], body=True)

        def do_HEAD(self) -> None:
            self._answer(self.path.partition("?")[0], body=False)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(self.path.partition("?")[0], body=True, posted=content)

        def _answer(self, path: str, body: bool, posted: bytes = b"") -> None:
            found = API.fullmatch(path) or FILE.fullmatch(path)
            model = hub.models.get(found["name"]) if found else None
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            if found is None or model is None or (model.private and token not in model.allowed):
                self._refuse(401, "RepoNotFound", "Invalid username or password.", body)
                return
            asked = found.groupdict()
            files_of_gated = asked.get("file") or asked.get("what") == "auth-check"
            if model.gated and token not in model.allowed and files_of_gated:
                self._refuse(403 if token else 401, "GatedRepo", "Access is restricted.", body)
                return
            commit = model.commit(unquote(asked.get("rev") or "main"))
            if commit is None:
                self._refuse(404, "RevisionNotFound", "Invalid rev id", body)
                return
            files = model.commits[commit]
            if "file" in asked:
                self._file(commit, asked["file"], files, body)
            elif asked["what"] == "tree":
                self._json([_entry(name, content) for name, content in files.items()])
            elif asked["what"] == "paths-info":
                wanted = json.loads(posted)["paths"]
                self._json([_entry(name, files[name]) for name in wanted if name in files])
            elif asked["what"] == "auth-check":
                self._json({})
            else:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                gated = "manual" if model.gated else False
                self._json({"id": asked["name"], "sha": commit, "gated": gated, "private": False, "siblings": siblings})

        def _file(self, commit: str, name: str, files: Mapping[str, bytes], body: bool) -> None:
            if name not in files:
                self._refuse(404, "EntryNotFound", "Entry not found", body)
                return
            whole = files[name]
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), int(asked[2] or len(whole) - 1)) if asked else (0, len(whole) - 1)
            content = whole[first : last + 1]
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha1(whole).hexdigest()}"',
                "Accept-Ranges": "bytes",
                "Content-Length": str(len(content)),
            }
            if asked:
                headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{len(whole)}"
            self._send(206 if asked else 200, headers, content if body else b"")
            if body:
                hub.served.append(name)

        def _json(self, value: object) -> None:
            content = json.dumps(value).encode()
            self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(content))}, content)

        def _refuse(self, status: int, code: str, why: str, body: bool) -> None:
            content = json.dumps({"error": why}).encode() if body else b""
            self._send(
                status, {"X-Error-Code": code, "X-Error-Message": why, "Content-Length": str(len(content))}, content
            )

        def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
