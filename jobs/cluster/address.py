"""The address of a cluster's job server: text in, its checked parts out."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from blt.errors import ConfigError

DEFAULT = "http://127.0.0.1:8265"
ENVIRONMENT = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a job server answers."""

    url: str
    """Scheme, host, port and perhaps a path, without a slash at the end."""
    is_encrypted: bool
    """https: nobody between reads what is sent, and the host has shown a certificate."""
    is_loopback: bool
    """This machine, or what a tunnel of its user leads to."""


def find_address(given: str | None, environment: Mapping[str, str] = os.environ) -> Address:
    """The address that is given, else that of RAY_API_SERVER_ADDRESS, else port 8265 of this machine. ConfigError."""
    if given is not None:
        return parse_address("address", given)
    if named := environment.get(ENVIRONMENT):
        return parse_address(ENVIRONMENT, named)
    return parse_address("address", DEFAULT)


def parse_address(name: str, text: str) -> Address:
    """The address in `text`; HOST:PORT is http. ConfigError, in terms of `name`, for one that is none."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Not repeated: what stands there may be a password.
        raise ConfigError(f"{name} must be http(s)://HOST:PORT without user, password or query")
    if parts.scheme not in ("http", "https"):
        raise ConfigError(
            f'{name} must be the http(s) address of the job server (port 8265 unless set otherwise), got "{text}"'
        )
    host = _host(name, text, parts)
    return Address(
        url=f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}",
        is_encrypted=parts.scheme == "https",
        is_loopback=is_loopback(host),
    )


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by its very name: no name is looked up, since the answer could be anybody's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(name: str, text: str, parts: SplitResult) -> str:
    try:
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f'{name} "{text}": {error}') from error
    if not host:
        raise ConfigError(f'{name} "{text}" names no host')
    return host
