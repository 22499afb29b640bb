"""Which servers are spoken to without the proxies of the environment: those on this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(url: str) -> bool:
    """Whether the server of `url` is on this machine, where no proxy leads. For httpx's `trust_env`."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # for httpx to refuse
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
