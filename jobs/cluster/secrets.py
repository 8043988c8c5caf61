"""Credentials that must not leave this machine with a job: names that hold them, files that hold them, their values."""

import re
from collections.abc import Iterable, Mapping

SECRET_FILES = (
    ".env",
    ".env.*",
    ".envrc",
    ".netrc",
    ".pypirc",
    ".git-credentials",
    ".aws",
    ".azure",
    ".config/gcloud",
    ".docker",
    ".kube",
    ".ssh",
    ".ray",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.kdbx",
    "id_rsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "credentials",
    "credentials.*",
    "auth_token",
    "kubeconfig",
    "service-account*.json",
)
"""Patterns, as of .gitignore, of files and directories that usually hold credentials."""

_SECRET_NAME = re.compile(r"secret|token|passw|credential|private|(^|_)(api_?)?key(_|$)|(^|_)auth(_|$)", re.IGNORECASE)
_HARMLESS = frozenset({"RAY_AUTH_MODE", "SSH_AUTH_SOCK", "RAY_AUTH_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE"})
"""They say where or whether, and nothing that is secret."""
_SHORTEST = 8
"""Bytes of a value that is looked for; a shorter one is found in many a text by chance."""


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name usually holds a credential."""
    return name not in _HARMLESS and not name.startswith("TOKENIZERS_") and bool(_SECRET_NAME.search(name))


def secret_values(environment: Mapping[str, str]) -> dict[str, bytes]:
    """The values of variables that usually hold a credential, by name."""
    found = {name: value.strip().encode() for name, value in environment.items() if is_secret_name(name)}
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST}


def held_secret(content: bytes, secrets: Iterable[tuple[str, bytes]]) -> str | None:
    """The name of the first of the secrets whose value is in the content."""
    return next((name for name, value in secrets if value in content), None)
