"""Whether a job server lets anybody in, found out without showing it anything; what to show it then.

A cluster that is open to whoever reaches its port runs anybody's code and shows everybody's jobs. A token that is sent
to the wrong host, or read on the way, opens the cluster that it belongs to. So the first request carries no token, and
the token goes only to this machine, to a host with a certificate, or where the user says so.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import requests
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from blt.errors import ClusterError, ConfigError
from jobs.cluster.address import Address

logger = logging.getLogger(__name__)

_PROBE = "/api/jobs/"
_SECONDS_TO_ANSWER = 10.0
_UNAUTHORIZED = (401, 403)
_NOTHING = {"authorization": ""}
"""Ray's client adds the token to every request of its own accord, unless such a header is there."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a job server asks for."""

    is_open: bool
    """Whether it lets anybody in."""
    headers: Mapping[str, str] = field(repr=False)
    """To send with every request; may hold the token."""


def find_access(address: Address, *, insecure: bool, token_over_http: bool) -> Access:
    """How to talk to the job server. One request is made, with no token in it.

    ConfigError, with what to do, for an open server off this machine unless `insecure`; for a token that would cross a
    network in the clear unless `token_over_http`; and where a token is asked for and there is none. ClusterError where
    no job server answers.
    """
    if not asks_for_token(address):
        if not (address.is_loopback or insecure):
            raise ConfigError(
                f"{address.url} lets anybody in who reaches it, to run any code and to read every job: start the "
                "cluster with RAY_AUTH_MODE=token (SECURITY.md), or give --insecure if its network is yours alone"
            )
        return Access(is_open=True, headers=_NOTHING)
    if not (address.is_loopback or address.is_encrypted or token_over_http):
        raise ConfigError(
            f"{address.url} asks for a token, which would cross the network in the clear, to a host that has shown no "
            "certificate: use a tunnel (ssh -L 8265:127.0.0.1:8265 HOST, or kubectl port-forward) and no --address, "
            "or https://, or give --token-over-http if you know that network"
        )
    token = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
    if not token:
        raise ConfigError(
            f"{address.url} asks for a token and there is none here: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that "
            "of the cluster (`ray get-auth-token` on its head node shows it)"
        )
    return Access(is_open=False, headers=token)


def asks_for_token(address: Address) -> bool:
    """Whether a request without a token is turned away. ClusterError where no job server answers."""
    try:
        # Neither a redirect nor a password of ~/.netrc: the host is not known to be what it should be.
        answer = requests.get(
            address.url + _PROBE, timeout=_SECONDS_TO_ANSWER, allow_redirects=False, auth=_unchanged, stream=True
        )
    except requests.RequestException as error:
        raise ClusterError(f"{address.url}: no job server answers there ({type(error).__name__})") from error
    with answer:
        status, kind = answer.status_code, answer.headers.get("content-type", "")
    if status in _UNAUTHORIZED:
        return True
    if status != requests.codes.ok or "json" not in kind:
        what = f"to {answer.headers.get('location', '?')}" if answer.is_redirect else f"with {kind or 'nothing'}"
        raise ClusterError(f"{address.url}: what answers there is no job server of Ray (status {status} {what})")
    return False


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
