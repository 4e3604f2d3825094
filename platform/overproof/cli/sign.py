"""Keys that packages are signed with, signatures, and what a package is held against before it is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from overproof.cli.deploy import find_package
from overproof.config import Serve, Trust
from overproof.console import out, waiting
from overproof.errors import InputError
from overproof.package.contents import SIGNATURE
from overproof.package.package import open_package, resolve_package
from overproof.package.signature import (
    KEY_VARIABLE,
    PUBLIC_SUFFIX,
    make_key_pair,
    read_signing_key,
    sign_files,
    write_signature,
)
from overproof.package.trust import require_trusted
from overproof.serve.package_trust import trust_policy


def make_signing_key(file: Path) -> int:
    """Make a pair of keys, and say what each is for.

    Raises:
        InputError: a file is there already, or cannot be written.
    """
    public = make_key_pair(file)
    out.print(f"key {public.id}", markup=False)
    out.print(f"{file}  signs packages; keep it off stores and servers: {KEY_VARIABLE}={file}", markup=False)
    out.print(f"{file}{PUBLIC_SUFFIX}  for servers: --set trust.keys={file}{PUBLIC_SUFFIX}", markup=False)
    return 0


def sign(package: str, store: str, key_file: str) -> int:
    """Sign a finished package, once everything that it claims was held against its parts.

    Raises:
        InputError: it does not hold together, is signed already, or the key cannot be used.
    """
    key, where = read_signing_key(key_file), resolve_package(find_package(package, store))
    with waiting(f"checking {package}"):
        listing = open_package(where).listing
    if listing.signature is not None:
        raise InputError(f"{where}/{SIGNATURE}: is there already; delete it to have another key sign the package")
    sha256 = {name: entry.sha256 for name, entry in listing.files.items()}
    write_signature(where, sign_files(listing.content.id, sha256, key))
    out.print(f"{listing.content.id} is signed by key {key.public.id}", markup=False)
    return 0


def verify(package: str, store: str, keys: str | None, policies: Sequence[str]) -> int:
    """Hold a package against its parts, and its signature against public keys and the policies that are allowed.

    Raises:
        InputError: it is refused.
    """
    trust = Trust.parse({"keys": keys, "policies": list(policies) or None}, "trust")
    policy = trust_policy(Serve(trust=trust))
    with waiting(f"checking {package}"):
        found = open_package(resolve_package(find_package(package, store)))
    signer = require_trusted(found.listing, policy, str(found.path))
    unasked = "signed, but by whom was not asked: --keys" if found.listing.signature else "not signed"
    out.print(f"package  {found.content.id}", markup=False)
    out.print(f"signer   {unasked if signer is None else f'key {signer}'}", markup=False)
    out.print(f"policy   {found.listing.policy_sha256}", markup=False)
    for line in found.judged.lines:
        out.print(f"verdict  {line}", markup=False)
    return 0
