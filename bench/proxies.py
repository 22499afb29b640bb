"""Servers on this machine are reached without the proxies that the environment names."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(url: str) -> bool:
    """Whether the server of `url` is on this machine. httpx must not look for a proxy then (`trust_env`)."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # httpx refuses it
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
