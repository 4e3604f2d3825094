"""Which packages an operator has served: by the keys that may sign them, and the policies that are enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from overproof.errors import InputError
from overproof.package.contents import SIGNATURE, Listing
from overproof.package.signature import PublicKey, verify_signature


@dataclass(frozen=True)
class TrustPolicy:
    """What a package is held against; without keys anything is taken that holds together."""

    keys: Mapping[str, PublicKey] = field(default_factory=dict)  # by id
    policies: tuple[str, ...] | None = None  # sha256; None allows every policy that a trusted key signed


ANYONE = TrustPolicy()


def require_trusted(listing: Listing, trust: TrustPolicy, where: str) -> str | None:
    """The id of the trusted key that signed every file of a listing; None where nobody is asked for.

    The hashes of the files themselves are for the caller to compare with the listing.

    Raises:
        InputError: it is unsigned, signed by another key, signs other files, or has a policy that is not allowed.
    """
    if not trust.keys:
        return None
    if listing.signature is None:
        raise InputError(
            f"{where}: {listing.content.id} is not signed, and serve.trust.keys asks for a signature; have it signed "
            "by one of these keys: `overproof sign PACKAGE --key FILE`"
        )
    key_id, signed = verify_signature(listing.signature, trust.keys, f"{where}/{SIGNATURE}")
    found = {name: entry.sha256 for name, entry in listing.files.items() if name != SIGNATURE}
    if signed != found:
        other = sorted(name for name in signed.keys() | found.keys() if signed.get(name) != found.get(name))
        raise InputError(
            f"{where}/{SIGNATURE}: signs other files than lie there: {', '.join(other)} differ; they were changed "
            "after they were signed, or the signature is of another package: package and sign again"
        )
    policy = listing.policy_sha256
    if trust.policies is not None and policy not in trust.policies:
        raise InputError(
            f"{where}: passed by the policy {policy}, which serve.trust.policies does not list; add it if what "
            "package.json says under policy is enough, or raise the recipe's gate and package again"
        )
    return key_id
