"""Whose packages a server takes: ``serve.trust``, held against where the server can be reached from."""

from __future__ import annotations

from pathlib import Path

from overproof import console
from overproof.addresses import is_loopback
from overproof.config import Serve
from overproof.errors import InputError
from overproof.package.signature import KEY_VARIABLE, PUBLIC_SUFFIX, read_public_keys
from overproof.package.trust import TrustPolicy
from overproof.serve.deployments import Version

PEM_BEGIN = "-----BEGIN"
SUFFIXES = (PUBLIC_SUFFIX, ".pem")  # of the files of a folder that are read


def read_trusted_keys(settings: Serve) -> Serve:
    """Settings with the public keys themselves in place of their file or folder: every process gets them from here.

    Raises:
        InputError: they cannot be read, or there is none, where other machines reach the server.
    """
    keys = settings.trust.keys
    if keys is None:
        if not is_loopback(settings.host):
            raise InputError(
                f"serve.trust.keys: names no key, and {settings.host} can be reached from other machines, which get "
                "signed packages alone: make a pair (`overproof signing-key FILE`), have packages signed by it "
                f"({KEY_VARIABLE}=FILE where they are made, or `overproof sign PACKAGE --key FILE`), and give "
                f"--set trust.keys=FILE{PUBLIC_SUFFIX}; or take 127.0.0.1"
            )
        return settings
    if keys.startswith(PEM_BEGIN):
        return settings
    path = Path(keys).expanduser()
    try:
        folder = path.is_dir()
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if folder else [path]
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"serve.trust.keys: {path}: {why}; expected public keys in PEM") from None
    if not files:
        raise InputError(f"serve.trust.keys: {path}: no file there ends in {' or '.join(SUFFIXES)}")
    found = [read_public_keys(text, f"serve.trust.keys: {file}") for file, text in zip(files, texts, strict=True)]
    pems = [key.pem.decode() for keys_of_file in found for key in keys_of_file.values()]
    trust = settings.trust.model_copy(update={"keys": "".join(pems)})
    return settings.model_copy(update={"trust": trust})


def trust_policy(settings: Serve) -> TrustPolicy:
    """What packages are held against by a server with these settings.

    Raises:
        InputError: as ``read_trusted_keys``.
    """
    trust = read_trusted_keys(settings).trust
    return TrustPolicy({} if trust.keys is None else read_public_keys(trust.keys, "serve.trust.keys"), trust.policies)


def tell_unsigned(version: Version) -> None:
    """Say of a package that nobody vouches for that it is served all the same."""
    if version.model.overproof.signed_by is None:
        console.notice(
            f"{version.package} has no trusted signature (serve.trust.keys is not set): for this machine alone"
        )
