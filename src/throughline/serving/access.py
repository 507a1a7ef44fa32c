"""Who may ask: names the server answers to, pages that may change something, and the token.

A page that some other site opens in the user's browser can send requests here, also under a name of its own that it lets point to
this machine (DNS rebinding). So a request must name the server as the user does (Host), and one that changes something must
come from a page of the server's own (Origin). The token keeps out people on the network, and programs of other users here.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

COOKIE = "throughline"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = ("GET", "HEAD")


@dataclass(frozen=True)
class Access:
    """The rules of one server. `names` are host names it answers to; `any_address` adds every IP address."""

    names: frozenset[str] = LOOPBACK_NAMES
    any_address: bool = False
    token: str | None = field(default=None, repr=False)  # so that it is in no log

    @property
    def cookie(self) -> str:
        """What a browser that showed the token keeps in its place. It outlives a restart, and does not tell the token."""
        return hmac.new((self.token or "").encode(), b"throughline cookie", hashlib.sha256).hexdigest()

    def knows_host(self, hosts: list[str]) -> bool:
        """True if the request has one Host, and it is a name of this server; any port, since tunnels have their own."""
        if len(hosts) != 1 or (name := _host_name(hosts[0])) is None:
            return False
        return name in self.names or (self.any_address and _is_address(name))

    def trusts_origin(self, method: str, host: str, origin: str | None, site: str | None) -> bool:
        """True of what only reads, of programs, and of the server's own pages."""
        if method in SAFE_METHODS:
            return True
        if origin is not None:
            parts = urlsplit(origin)
            return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
        return site in (None, "same-origin", "none")

    def knows_token(self, authorization: str | None, cookies: str | None) -> bool:
        """True if the request has the token or the cookie, or none is asked for. Compared in constant time."""
        if self.token is None:
            return True
        kind, _, given = (authorization or "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(given.strip()):
            return True
        try:
            kept = SimpleCookie(cookies or "").get(COOKIE)
        except CookieError:
            return False
        return kept is not None and _same(kept.value, self.cookie)

    def is_token(self, given: str) -> bool:
        """True of the token, in constant time."""
        return self.token is not None and _same(given, self.token)


def access_of(host: str, addresses: Iterable[str], token: str | None) -> Access:
    """The rules of a server that was told to listen at `host`, which is at `addresses`."""
    addresses = list(addresses)
    everywhere = any(ipaddress.ip_address(address).is_unspecified for address in addresses)
    own = {host.lower(), *addresses, *LOOPBACK_NAMES}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        own |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return Access(frozenset(own), everywhere, token)


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), right.encode())


def _host_name(host: str) -> str | None:
    """`localhost` of `localhost:8765`; None for what is no host."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # ValueError if that is no number
    except ValueError:
        return None
    is_plain = parts.netloc == host and parts.username is None and not (parts.path or parts.query or parts.fragment)
    return parts.hostname.rstrip(".").lower() if is_plain and parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
