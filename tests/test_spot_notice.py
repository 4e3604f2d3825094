"""The notice of a spot node, from a server that speaks as AWS's does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from overproof.cluster.spot_notice import DEFAULT_NOTICE_S, InstanceMetadata, seconds_left, watch


class Service(ThreadingHTTPServer):
    """IMDSv2: nothing without a token, and tokens that end."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.issued, self.asked = "", 0, 0
        self.notice: str | None = None
        self.broken = 0  # answers to come that are errors

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
            self._reply(400, "")
            return
        self.server.issued += 1
        self.server.token = f"token-{self.server.issued}"
        self._reply(200, self.server.token)

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.broken:
            self.server.broken -= 1
            self._reply(500, "")
        elif self.headers.get("X-aws-ec2-metadata-token") != self.server.token:
            self._reply(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice is not None:
            self._reply(200, self.server.notice)
        else:
            self._reply(404, "")

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_node_is_drained_once_the_notice_is_there(service: Service) -> None:
    drained: list[tuple[float, str]] = []
    waiting = threading.Thread(
        target=watch, args=(InstanceMetadata(service.address), lambda *told: drained.append(told), 0.01)
    )
    service.broken = 2  # is asked again
    waiting.start()
    while service.asked < 5:
        assert waiting.is_alive()
    service.token = "ended"  # what the watcher holds is worth nothing any more
    while service.issued < 2:
        assert waiting.is_alive()
    assert not drained
    at = datetime.now(UTC) + timedelta(seconds=110)
    service.notice = f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}'
    waiting.join(timeout=30)
    ((left_s, notice),) = drained
    assert notice == service.notice
    assert 100 < left_s < 111


def test_a_service_that_is_not_there_is_asked_again(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """As on an instance whose metadata are late, or on another cloud."""
    gone = Service()
    address = gone.address
    gone.server_close()
    stop = RuntimeError()

    class Twice(InstanceMetadata):
        asked = 0

        def get(self, path: str) -> str | None:
            self.asked += 1
            if self.asked == 3:
                raise stop
            return super().get(path)

    with pytest.raises(RuntimeError):
        watch(Twice(address), lambda *_: None, 0.01)
    assert capsys.readouterr().err.count(address) == 2
    assert InstanceMetadata(service.address).get("nothing") is None


@pytest.mark.parametrize("notice", ["", "[]", "{}", '{"time": 5}', '{"time": "soon"}'])
def test_a_notice_that_cannot_be_read_leaves_two_minutes(notice: str) -> None:
    assert seconds_left(notice) == DEFAULT_NOTICE_S


def test_a_time_that_is_past_leaves_a_second() -> None:
    assert seconds_left('{"action": "stop", "time": "2017-09-18T08:22:00Z"}') == 1.0
