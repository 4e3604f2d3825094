"""Replicas behind HTTP: how many, what is tried on them, and what is kept of their traffic."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from overproof.addresses import is_loopback
from overproof.config.base import Count, Cpus, Section


class Traffic(Section):
    """Requests and replies of language models kept for later, as Parquet files; `prepare` reads folder/replies."""

    folder: str = Field(description="Folder that the gateway writes to, or a URI.")
    sample: float = Field(1.0, gt=0, le=1, description="Share of the replies that are kept.")
    redact: tuple[str, ...] = Field(
        (), description="Patterns (RE2's) that are taken out, as addresses, numbers and secrets always are."
    )
    rows_per_file: Count = Field(1000, description="Rows that make a file.")
    seconds_per_file: float = Field(60.0, gt=0, description="Seconds after which fewer rows make one.")

    @field_validator("redact")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        import pyarrow as pa
        import pyarrow.compute as pc

        for pattern in patterns:
            try:
                pc.match_substring_regex(pa.array([""]), pattern=pattern)
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"{pattern!r}: {error}; expected RE2's syntax, which has neither lookarounds nor back-references"
                ) from None
        return patterns


class Canary(Section):
    """How a new version is tried on live requests, and when it is taken back by itself."""

    share: float = Field(0.1, ge=0, le=1, description="Share of the sessions that a canary answers.")
    compare: float = Field(
        0.2, ge=0, le=1,
        description="Share of a canary's requests that both versions continue by a few greedy tokens, or classify.",
    )  # fmt: skip
    min_requests: Count = Field(50, description="Requests, and comparisons, before either is judged.")
    max_failed: float = Field(0.01, ge=0, le=1, description="Share of requests that may fail in the server.")
    max_slowdown: float = Field(
        1.5, gt=0, description="Median seconds a token, or row, as times the other version's when asked the same."
    )
    min_agreement: float = Field(0.5, ge=0, le=1, description="Share of comparisons in which both say the same.")


class Trust(Section):
    """Whose packages are served. Off loopback there must be keys."""

    keys: str | None = Field(
        None, description="PEM file of the public keys that may sign packages, or folder of such (*.pub, *.pem)."
    )
    policies: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] | None = Field(
        None,
        description="Sha256 of each policy that is enough, as `overproof verify` prints it; null takes any that such a "
        "key signed.",
    )

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if self.policies is not None and self.keys is None:
            raise ValueError("policies without keys: whoever writes a package writes its policy; expected keys, too")
        return self


SERVER_FIELDS = (
    "host", "port", "hosts", "proxies", "origins", "memory_mb", "deployments", "traffic", "log_prompts",
    "tls_certificate", "tls_key", "trust", "gateways", "gateway_node_labels", "drain_notice_s",
)  # fmt: skip
HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


class Serve(Section):
    """Autoscaling replicas behind HTTP."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; any but loopback needs OVERPROOF_API_KEY or OVERPROOF_KEYS, and trust.keys.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    hosts: tuple[str, ...] = Field(
        (), description="Names that requests may call the server by, beside loopback's and `host`; with keys, if none "
        "is given, any.",
    )  # fmt: skip
    proxies: tuple[str, ...] = Field(
        (), description="Addresses or networks of proxies, whose X-Forwarded-For or Forwarded is believed."
    )
    origins: tuple[str, ...] = Field(
        (), description="Web origins whose pages may ask (CORS), as https://app.example.org; '*' is any, with keys."
    )
    gateways: Count = Field(
        1, description="Processes that listen, all at the same port; each keeps a core busy at most."
    )
    gateway_node_labels: dict[str, str] = Field(
        {}, description="Labels of the Ray nodes that gateways listen on, for a load balancer; none is the head node."
    )
    drain_notice_s: float = Field(
        0, ge=0, le=300,
        description="Seconds for which a gateway that stops still listens and says so at /readyz: longer than a load "
        "balancer takes to notice.",
    )  # fmt: skip
    min_replicas: int = Field(1, ge=0, description="Fewest replicas; 0 stops the last one when nobody asks.")
    max_replicas: Count = Field(2, description="Most replicas.")
    upscale_delay_s: float = Field(1.0, ge=0, description="Seconds of higher load before a replica is added.")
    downscale_delay_s: float = Field(60.0, ge=0, description="Seconds of lower load before one is stopped.")
    cpus_per_replica: Cpus = Field(1, description="Logical CPUs reserved by each replica.")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs reserved by each replica.")
    threads: Count = Field(1, description="Engine threads in each replica.")
    slots: Count = Field(4, description="Sequences a replica decodes at once.")
    max_tokens: Count = Field(256, description="Most tokens a completion may ask for.")
    max_prompt_tokens: Count | None = Field(
        None, description="Most tokens of a prompt; null takes what the context holds."
    )
    node_labels: dict[str, str] = Field({}, description="Labels of the Ray nodes that replicas may start on.")
    canary: Canary = Canary()

    memory_mb: float | None = Field(
        None, gt=0, description="Of all loaded models, as measured; beyond it those least used go until asked for."
    )
    deployments: str | None = Field(None, description="File or URI of what is deployed, and its history.")
    log_prompts: bool = Field(False, description="Write prompts and replies into the access log.")
    traffic: Traffic | None = Field(None, description="What is kept of requests and replies; null keeps nothing.")
    tls_certificate: str | None = Field(None, description="PEM file of the certificate chain, for HTTPS.")
    tls_key: str | None = Field(None, description="PEM file of its private key.")
    trust: Trust = Trust()

    @field_validator("hosts", "proxies", "origins")
    @classmethod
    def _sources(cls, given: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for each in given:
            is_address = _is_network(each)
            if info.field_name == "hosts" and not HOST_NAME.fullmatch(each) and not is_address:
                raise ValueError(f"{each!r}: expected a name or an address, without a port")
            if info.field_name == "proxies" and not is_address:
                raise ValueError(f"{each!r}: expected an address or a network, as 10.0.0.0/8")
            if info.field_name == "origins" and each != "*" and not ORIGIN.fullmatch(each):
                raise ValueError(f"{each!r}: expected an origin without a path, as https://app.example.org, or '*'")
        return given

    @model_validator(mode="after")
    def _range(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; expected both or none")
        if self.gateway_node_labels and is_loopback(self.host):
            raise ValueError(f"gateway_node_labels with host {self.host}, which other nodes cannot be reached at")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
