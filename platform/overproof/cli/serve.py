"""The end of the loop: serve a package, ask it something real, show how to ask again."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import httpx

from overproof.cli import artifacts
from overproof.cli.deploy import find_package
from overproof.cli.recipe_arguments import RecipeArguments
from overproof.cli.termination import wait_for_signal
from overproof.cluster import ray_cluster
from overproof.config import Recipe, Serve, parse_overrides
from overproof.console import out, waiting
from overproof.errors import InputError
from overproof.registry import TASKS
from overproof.serve.net import free_port

if TYPE_CHECKING:
    from overproof.tasks.base import Task

ASK_TIMEOUT_S = 60


def demo(recipe: Recipe, arguments: RecipeArguments, keep: bool) -> int:
    """Run the whole loop, serve what comes out, and print a real answer and the line to repeat it.

    Raises:
        GateRefused: no candidate passed; nothing is served.
        InputError: bad input, or the port is taken, before anything runs.
    """
    free_port(recipe.serve.host, recipe.serve.port)
    done = artifacts.run_to_summary(recipe, arguments)
    _serve(done["package"].uri, recipe.serve, keep)
    return 0


def serve_until_stopped(package: str, store: str, overrides: tuple[str, ...]) -> int:
    """Serve a package by directory or id until Ctrl-C.

    Raises:
        InputError: there is no such package, it was changed, or it has no passing verdict.
    """
    settings = Serve.parse(parse_overrides(overrides, "serve"))
    _serve(find_package(package, store), settings, keep=True)
    return 0


def _serve(package: str, settings: Serve, keep: bool) -> None:
    from overproof.serve import server

    planned = None
    if not ray_cluster.is_remote():  # on a cluster that runs a server may, which takes the package in
        with waiting("checking the package"):
            planned = server.plan_server({package: settings}, settings)
    with waiting("connecting to Ray"):
        ray_cluster.connect()
    with waiting("starting replicas"):
        base = server.start_planned(planned) if planned else server.start_serving(package, settings)
    try:
        try:
            if _needs_an_unknown_key():
                print_example(base, package, settings)
            else:
                send_example(base, settings)
        except InputError as error:  # its limits may be too small for an example, and right all the same
            if not keep:
                raise
            out.print(f"overproof: warning: {error}", markup=False)
        if keep:
            out.print(f"serving {package} at {base} until Ctrl-C")
            wait_for_signal()
    finally:
        with waiting("stopping"):
            server.stop_serving()


def send_example(base: str, settings: Serve) -> None:
    """Send one real request and print the answer and the `curl` line that repeats it.

    Raises:
        InputError: the server refuses it, or cannot be asked.
    """
    from overproof.serve.net import tls_trust

    with httpx.Client(
        base_url=base,
        timeout=ASK_TIMEOUT_S,
        headers=_auth(),
        verify=tls_trust(settings),
        trust_env=False,  # of proxies, which do not reach this machine
    ) as client:
        model = _ask(client, "GET", "/v1/models")["data"][0]
        provenance = model["overproof"]
        task = TASKS[provenance["task"]]
        body = _example(model["id"], task, provenance["details"], settings)
        reply = _ask(client, "POST", task.route, body)
    told = task.describe_reply(body, reply)
    out.print(f"asked with an example, it answers:\n{told}\nin another terminal:", markup=False)
    from overproof.serve.environment import key_in_shell

    _print_curl(base, task, body, settings, key_in_shell() if _auth() else None)


def print_example(base: str, package: str, settings: Serve) -> None:
    """The `curl` line of a server whose keys are not known here."""
    from overproof.package.contents import PackageFolder, read_listing
    from overproof.package.package import resolve_package

    content = read_listing(PackageFolder(resolve_package(package))).content
    task = TASKS[content.task]
    out.print("requests need a key of OVERPROOF_KEYS, as in KEY here:")
    _print_curl(base, task, _example(content.name, task, content.details, settings), settings, "$KEY")


def _example(model: str, task: Task, details: Mapping[str, Any], settings: Serve) -> dict[str, Any]:
    body = {"model": model, **task.example(details)}
    return body | {"max_tokens": min(body["max_tokens"], settings.max_tokens)} if "max_tokens" in body else body


def _print_curl(base: str, task: Task, body: dict[str, Any], settings: Serve, key: str | None) -> None:
    if "prompt" in body or "messages" in body:
        body = body | {"stream": True}
    auth = f'-H "Authorization: Bearer {key}" ' if key else ""
    if settings.tls_certificate:
        auth = f"--cacert {shlex.quote(settings.tls_certificate)} {auth}"
    if urllib.request.getproxies():
        auth = f"--noproxy '*' {auth}"
    out.print(
        f"curl -N {base}{task.route} {auth}-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
        markup=False,
    )


def _ask(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    try:
        reply = client.request(method, path, json=body)
    except httpx.TransportError as error:
        raise InputError(f"{client.base_url.join(path)}: {error or type(error).__name__}") from None
    if reply.is_success:
        return reply.json()
    raise InputError(f"{path}: the server refuses the example ({reply.status_code}): {reply.text[:300]}")


def _needs_an_unknown_key() -> bool:
    from overproof.serve.environment import api_key
    from overproof.serve.middleware import load_access

    return api_key() is None and load_access().needs_key


def _auth() -> dict[str, str]:
    from overproof.serve.environment import api_key

    key = api_key()
    return {"Authorization": f"Bearer {key}"} if key else {}
