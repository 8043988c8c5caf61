"""Who is talked to, and what is shown to whom: addresses, open clusters, tokens."""

import dataclasses

import pytest

from blt.errors import ClusterError, ConfigError
from jobs.cluster.access import find_access
from jobs.cluster.address import Address, find_address, parse_address
from jobs.cluster.job_server import JobServer
from tests.job_server import Behaviour, RecordingServer, recording_server

TOKEN = "planted-token-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "url", "is_loopback"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265", True),
        ("localhost:8265/", "http://localhost:8265", True),
        ("http://[::1]:8265", "http://[::1]:8265", True),
        ("https://ray.example/head/", "https://ray.example/head", False),
        ("10.0.0.5:8265", "http://10.0.0.5:8265", False),
        ("http://127.0.0.1.example.org:8265", "http://127.0.0.1.example.org:8265", False),
        ("http://localhost.example.org", "http://localhost.example.org", False),
    ],
)
def test_addresses(text: str, url: str, is_loopback: bool) -> None:
    address = parse_address("address", text)
    assert (address.url, address.is_loopback) == (url, is_loopback)
    assert address.is_encrypted == text.startswith("https")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ray://10.0.0.5:10001", "must be the http"),
        ("http://user:planted@host:8265", "without user, password or query"),
        ("http://host:8265?token=planted", "without user, password or query"),
        ("http://host:port", "Port could not be cast"),
        ("http://:8265", "names no host"),
    ],
)
def test_what_is_no_address(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as failure:
        parse_address("address", text)
    assert "planted" not in str(failure.value)


def test_the_address_given_goes_before_the_environment() -> None:
    environment = {"RAY_API_SERVER_ADDRESS": "http://10.0.0.5:8265"}
    assert find_address("10.0.0.6:8265", environment).url == "http://10.0.0.6:8265"
    assert find_address(None, environment).url == "http://10.0.0.5:8265"
    assert find_address(None, {}).url == "http://127.0.0.1:8265"


def seen_from_afar(server: RecordingServer, *, is_encrypted: bool = False) -> Address:
    """The server as if it were on another machine."""
    return dataclasses.replace(parse_address("address", server.address), is_loopback=False, is_encrypted=is_encrypted)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has a token, and Ray's client would send it of its own accord."""
    from ray._raylet import AuthenticationTokenLoader, Config

    with monkeypatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN", TOKEN)
        patched.setenv("RAY_AUTH_MODE", "token")
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def test_an_open_server_off_this_machine_is_refused_and_never_sees_the_token() -> None:
    with recording_server("open") as server:
        with pytest.raises(ConfigError, match=r"lets anybody in .* RAY_AUTH_MODE=token .* --insecure"):
            find_access(seen_from_afar(server), insecure=False, token_over_http=True)
        assert server.authorizations == [""]
        access = find_access(seen_from_afar(server), insecure=True, token_over_http=True)
        assert access.is_open
        assert JobServer(seen_from_afar(server), access).jobs() == []
        assert len(server.authorizations) > 3
        assert set(server.authorizations) == {""}


def test_a_token_does_not_cross_a_network_in_the_clear_unasked() -> None:
    with recording_server("token", TOKEN) as server:
        with pytest.raises(ConfigError, match=r"in the clear.*ssh -L .*--token-over-http"):
            find_access(seen_from_afar(server), insecure=True, token_over_http=False)
        assert server.authorizations == [""]
        access = find_access(seen_from_afar(server), insecure=False, token_over_http=True)
        assert JobServer(seen_from_afar(server), access).jobs() == []
        assert server.authorizations[1] == ""
        assert set(server.authorizations[2:]) == {f"Bearer {TOKEN}"}
        assert TOKEN not in repr(access)


def test_a_token_goes_to_this_machine_and_to_a_host_with_a_certificate() -> None:
    with recording_server("token", TOKEN) as server:
        near = parse_address("address", server.address)
        for address in (near, seen_from_afar(server, is_encrypted=True)):
            assert not find_access(address, insecure=False, token_over_http=False).is_open


def test_ray_cannot_be_led_to_another_server_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording_server("token", TOKEN) as server, recording_server("open") as other:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other.address)
        monkeypatch.setenv("RAY_ADDRESS", other.address)
        address = parse_address("address", server.address)
        assert JobServer(address, find_access(address, insecure=False, token_over_http=False)).jobs() == []
        assert other.requests == []


@pytest.mark.parametrize(("behaviour", "reason"), [("redirect", "login.example"), ("website", "text/html")])
def test_what_is_no_job_server(behaviour: Behaviour, reason: str) -> None:
    with recording_server(behaviour) as server:
        with pytest.raises(ClusterError, match=f"no job server of Ray .*{reason}"):
            find_access(parse_address("address", server.address), insecure=True, token_over_http=True)
        assert server.authorizations == [""]


def test_nobody_answers() -> None:
    with pytest.raises(ClusterError, match=r"127.0.0.1:1: no job server answers there"):
        find_access(parse_address("address", "127.0.0.1:1"), insecure=False, token_over_http=False)
