"""Signatures of packages, in the format of OpenSSF model signing 1.0 with a local key, made and verified offline.

A sigstore bundle (https://docs.sigstore.dev/about/bundle/) holds a DSSE envelope
(https://github.com/secure-systems-lab/dsse) of an in-toto statement that names every file with its sha256
(https://github.com/ossf/model-signing-spec); the signature is ECDSA. `model_signing verify key` accepts it. What is
signed are hashes that were taken elsewhere, so a package's bytes are read once, while they are copied.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from overproof.artifacts import RECORD
from overproof.errors import InputError
from overproof.files import atomic_write, filesystem, first_validation_error, join_uri
from overproof.package.contents import SIGNATURE

KEY_VARIABLE = "OVERPROOF_SIGNING_KEY"
PUBLIC_SUFFIX = ".pub"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
DIGESTS: dict[int, type[hashes.SHA256 | hashes.SHA384 | hashes.SHA512]] = {
    256: hashes.SHA256,
    384: hashes.SHA384,
    521: hashes.SHA512,
}  # by bits of the key, as sigstore has it
PUBLIC_BLOCK = re.compile("-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class _Part(BaseModel):
    """A part of the bundle; it is closed, for nothing outside the payload is signed."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class _PublicKey(_Part):
    hint: str


class _VerificationMaterial(_Part):
    public_key: _PublicKey
    tlog_entries: tuple[()] = ()


class _Signature(_Part):
    sig: str
    keyid: Literal[""] = ""


class _Envelope(_Part):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[tuple[_Signature, ...], Field(min_length=1, max_length=1)]


class _Bundle(_Part):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _VerificationMaterial
    dsse_envelope: _Envelope


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are held against."""

    key: ec.EllipticCurvePublicKey

    @property
    def pem(self) -> bytes:
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_bytes(encoding, form)

    @property
    def id(self) -> str:
        """Sha256 of the PEM file, in hex: what a bundle names a key by."""
        return hashlib.sha256(self.pem).hexdigest()


@dataclass(frozen=True)
class SigningKey:
    """A private key, in memory."""

    key: ec.EllipticCurvePrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key())


def make_key_pair(file: Path) -> PublicKey:
    """Write a new private key, which its owner alone may read, and beside it the public one, ``FILE.pub``.

    Raises:
        InputError: either is there already, or cannot be written.
    """
    key, public_file = ec.generate_private_key(ec.SECP256R1()), file.with_name(file.name + PUBLIC_SUFFIX)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(encoding, form, serialization.NoEncryption())
    public = PublicKey(key.public_key())
    if os.path.lexists(public_file):
        raise InputError(f"{public_file}: is there already; give another name, or move it away")
    for path, content, mode in ((file, pem, 0o600), (public_file, public.pem, 0o644)):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(content)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}; give another name") from None
    return public


def read_signing_key(file: str | Path) -> SigningKey:
    """A private key of a PEM file.

    Raises:
        InputError: it cannot be read, others may read it, or it is no unencrypted key of a curve that is taken.
    """
    path = Path(file).expanduser()
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a key that `overproof signing-key FILE` made") from None
    if stat.S_IMODE(mode) & 0o077:
        raise InputError(f"{path}: others than its owner may read or write it; expected mode 0600: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no private key in PEM without a password: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.key_size not in DIGESTS:
        raise InputError(f"{path}: found {type(key).__name__}; expected an elliptic-curve key of P-256, P-384 or P-521")
    return SigningKey(key)


def configured_signing_key(store: str | None = None) -> SigningKey | None:
    """The key that packages are signed with where they are made, which the environment names; None where it names none.

    Raises:
        InputError: it cannot be used, or lies in the store, to which others write.
    """
    file = os.environ.get(KEY_VARIABLE)
    if not file:
        return None
    if store is not None and "://" not in store and Path(file).resolve().is_relative_to(Path(store).resolve()):
        raise InputError(f"{KEY_VARIABLE}: {file} lies in the store {store}; expected a file outside of it")
    return read_signing_key(file)


def signer_identity() -> dict[str, str]:
    """What a package follows from beside its recipe: the key that signs it, if one does."""
    key = configured_signing_key()
    return {} if key is None else {"signer": key.public.id}


def read_public_keys(pem: str, where: str) -> dict[str, PublicKey]:
    """The public keys of a PEM text, one or several, by id.

    Raises:
        InputError: there is none, or something else.
    """
    blocks = PUBLIC_BLOCK.findall(pem)
    if not blocks:
        raise InputError(f"{where}: no public key in PEM; expected FILE.pub of `overproof signing-key FILE`")
    keys = {}
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block.encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise InputError(f"{where}: no public key in PEM: {error}") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.key_size not in DIGESTS:
            raise InputError(f"{where}: found {type(key).__name__}; expected a key of P-256, P-384 or P-521")
        keys[PublicKey(key).id] = PublicKey(key)
    return keys


def sign_files(name: str, sha256: Mapping[str, str], key: SigningKey) -> bytes:
    """The signature of a package of that name, and of files by their hashes."""
    payload = json.dumps(_statement(name, sha256), sort_keys=True, separators=(",", ":")).encode()
    signature = key.key.sign(_encode_for_signing(payload), ec.ECDSA(DIGESTS[key.key.key_size]()))
    envelope = _Envelope(
        payload=base64.b64encode(payload).decode(),
        payload_type=PAYLOAD_TYPE,
        signatures=(_Signature(sig=base64.b64encode(signature).decode()),),
    )
    material = _VerificationMaterial(public_key=_PublicKey(hint=key.public.id))
    return _dump(_Bundle(media_type=MEDIA_TYPE, verification_material=material, dsse_envelope=envelope))


def write_signature(where: str, signature: bytes) -> None:
    """Put a signature into a package's folder or URI."""
    files, path = filesystem(join_uri(where, SIGNATURE))
    atomic_write(files, path, signature)


def verify_signature(signature: bytes, keys: Mapping[str, PublicKey], where: str) -> tuple[str, dict[str, str]]:
    """The id of the key that made a signature, and the signed sha256 of each file by name.

    Raises:
        InputError: it is no signature in this format, of a key that is not among these, or not made by that key.
    """
    expected = "expected what `overproof sign` writes: sign again"
    try:
        bundle = _Bundle.model_validate_json(signature)
        envelope = bundle.dsse_envelope
        payload = base64.b64decode(envelope.payload, validate=True)
        signed = base64.b64decode(envelope.signatures[0].sig, validate=True)
    except ValidationError as error:
        raise InputError(f"{where}: {first_validation_error(error)}; {expected}") from None
    except binascii.Error as error:
        raise InputError(f"{where}: {error}; {expected}") from None
    id = bundle.verification_material.public_key.hint
    if id not in keys:
        trusted = ", ".join(sorted(each[:12] for each in keys))
        raise InputError(f"{where}: signed by key {id[:12]}, which is not trusted; trusted: {trusted}")
    key = keys[id].key
    try:
        key.verify(signed, _encode_for_signing(payload), ec.ECDSA(DIGESTS[key.key_size]()))
    except InvalidSignature:
        raise InputError(f"{where}: not made by key {id[:12]}, which it names; {expected}") from None
    # One package has one form: a text around the signed part that means the same is not what was written.
    if signature != _dump(bundle) or envelope.payload.encode() != base64.b64encode(payload):
        raise InputError(f"{where}: was changed after it was written; {expected}")
    try:
        return id, _signed_files(json.loads(payload))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: signs something else than files: {error}; {expected}") from None


def _statement(name: str, sha256: Mapping[str, str]) -> dict[str, Any]:
    names = sorted(sha256)
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [RECORD, SIGNATURE],
    }
    resources = [{"name": each, "algorithm": "sha256", "digest": sha256[each]} for each in names]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root_digest([sha256[each] for each in names])}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources},
    }


def _signed_files(statement: dict[str, Any]) -> dict[str, str]:
    """The hashes of a statement by name, if it is one of whole files; raises ValueError, KeyError or TypeError."""
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError(f"a statement of {statement['predicateType']}")
    predicate, (subject,) = statement["predicate"], statement["subject"]
    resources, form = predicate["resources"], predicate["serialization"]
    if (form["method"], form["hash_type"]) != ("files", "sha256") or form["allow_symlinks"] is not False:
        raise ValueError(f"hashed as {form}")
    if any(each["algorithm"] != "sha256" for each in resources):
        raise ValueError("another hash than sha256")
    found = {each["name"]: each["digest"] for each in resources}
    if len(found) != len(resources) or subject["digest"] != {"sha256": _root_digest(list(found.values()))}:
        raise ValueError("its parts do not belong together")
    return found


def _root_digest(sha256: list[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, sha256))).hexdigest()


def _encode_for_signing(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b" ".join((b"DSSEv1", b"%d" % len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), b"%d" % len(payload), payload))


def _dump(bundle: _Bundle) -> bytes:
    return bundle.model_dump_json(by_alias=True).encode()
