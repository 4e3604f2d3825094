"""One small package of each kind, and one server that the files `test_gateway_*` share: a start takes ten seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from overproof.serve import server
from packing import make_package
from shared_server import SETTINGS, SharedServer

CHAT_TEMPLATE = "{% for m in messages %}# {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}{{ '# assistant\\n' }}"


@pytest.fixture(scope="session")
def text_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    template = f"compress.chat_template={json.dumps(CHAT_TEMPLATE)}"
    return make_package("text", tmp_path_factory.mktemp("store"), template)


@pytest.fixture(scope="session")
def second_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the text package: other weights, and so another id."""
    return make_package("text", tmp_path_factory.mktemp("second"), "seed=1")


@pytest.fixture(scope="session")
def digits_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("digits", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="package")
def _deployments_file(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("shared") / "deployments.json"
    server.stop_serving()


@pytest.fixture
def shared_server(_deployments_file: Path, text_package: Path) -> SharedServer:
    """The shared server; started where it does not run, and with other settings returned to its own."""
    uri = str(_deployments_file)
    if not (server.is_serving() and server.call_controller("settings").deployments == uri):
        server.stop_serving()
        server.start_gateway({str(text_package): SETTINGS}, SETTINGS.model_copy(update={"deployments": uri}))
    if server.call_controller("deployments").models["stdlib-lm"].stable.settings != SETTINGS:
        server.start_serving(text_package, SETTINGS)
    return SharedServer(server.running_url(), _deployments_file)


@pytest.fixture
def no_server(ray_cluster: str) -> Iterator[None]:
    """For a test that starts a server of its own."""
    server.stop_serving()
    yield
    server.stop_serving()
