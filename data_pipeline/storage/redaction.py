"""Keys, passwords and signatures are taken out of whatever is shown, logged or uploaded."""

from __future__ import annotations

import os
import re
from typing import Any

SECRET_NAME = re.compile(r"(api_?key|secret|passw|credential|access_?key|auth|_token$|^token$)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|(AKIA|ASIA)[A-Z0-9]{16}|wandb_v\d_\w{20,}|[0-9a-f]{40}|eyJ[\w.-]{40,})\b"
)
HIDDEN = "***"


def address(url: str) -> str:
    """A url without its query, which may be a signature; a local path as it is."""
    return url.partition("?")[0] if "://" in url else url


def shown(url: str) -> str:
    """A url as messages and ledgers may have it: without its query and its password; a local path as it is."""
    return redact_urls(address(url)) if "://" in url else url


def check_whole(url: str) -> None:
    """Raises ValueError for a url of which the record of a run has left out a password or a query."""
    if re.search(rf"\w+://({re.escape(HIDDEN)}@|\S*\?{re.escape(HIDDEN)})", url):
        raise ValueError(
            f"{url}: its password or signature is not kept with a run; give the whole address again, as --data.train "
            "or --data.val does, or --data"
        )


def redact_urls(text: str) -> str:
    """A text with a *** for every password and every query in the urls that it names."""
    text = re.sub(r"(\w+://)[^/@\s]+@", rf"\g<1>{HIDDEN}@", text)
    return re.sub(r"(\w+://[^\s?]+\?)\S+", rf"\g<1>{HIDDEN}", text)


def redact(value: Any, name: str = "") -> Any:
    """`value`, a tree of dicts and lists, without anything that looks like a key: by its name, its form, or because a
    secret environment variable holds it; urls without passwords and queries."""
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_NAME.search(name):
        return HIDDEN
    for key, secret in os.environ.items():
        if SECRET_NAME.search(key) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
    return SECRET_VALUE.sub(HIDDEN, redact_urls(value))
