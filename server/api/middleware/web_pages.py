"""Refuses requests that a web page of another site makes a browser send.

A browser sends a form, or a body of plain text, to any address without asking that server first, loopback
addresses included. Two checks, of which clients other than browsers notice nothing:

    Host            a name of this server, so that a page cannot reach it by a name of its own that it makes
                    point to 127.0.0.1 (DNS rebinding); any method
    Origin,         where they are sent, this server's own, or an allowed origin; every method that may
    Sec-Fetch-Site  change something

Origin and Host are compared by name and port, never by scheme: a proxy may end TLS. starlette's
TrustedHostMiddleware knows no errors in a protocol's form, no loopback addresses and no ports. Knows no
route and no key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_replies import quoted, reply_to
from server.config.settings import Settings, is_loopback
from server.errors import HostRefused, OriginRefused

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
# What a browser says of a request that no other origin caused; "none" is its user's own.
_OWN_SITES = frozenset({"same-origin", "none"})
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/?#@\\\s]+)(?::([0-9]{0,5}))?")
_PORTS = {"http": "80", "https": "443"}


class WebPages:
    """Middleware: checks `Host`, `Origin` and `Sec-Fetch-Site`.

    Args:
        app: the application.
        hosts: names that `Host` may have besides those of loopback, see `Settings.allowed_hosts`; None
            for any.
        origins: origins of other sites that may change something, see `Settings.allowed_origins`.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str] = ()
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, or refuse."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], Headers(scope=scope))
            except (HostRefused, OriginRefused) as error:
                await reply_to(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        # HTTP/1.0 needs no Host, and browsers do not speak it.
        if any(not self._is_name(host) for host in hosts):
            raise _host_refused(hosts)
        if method in _SAFE:
            return
        given = headers.getlist("origin")
        for origin in given:
            if not self._is_allowed(origin) and not _is_own(origin, hosts):
                raise _foreign("origin", origin, hosts)
        if given and all(self._is_allowed(origin) for origin in given):
            return  # of another site, and meant to be
        for site in headers.getlist("sec-fetch-site"):
            if site.strip().lower() not in _OWN_SITES:
                raise _foreign("sec-fetch-site", site, hosts)

    def _is_name(self, host: str) -> bool:
        if self._hosts is None:
            return True
        parts = _HOST.fullmatch(host.strip().lower())
        if parts is None:
            return False
        name = parts[1].rstrip(".")
        return is_loopback(name.strip("[]")) or any(
            pattern in (name, parts[0], "*")
            or (pattern.startswith("*.") and name.endswith(pattern[1:]))
            for pattern in self._hosts
        )

    def _is_allowed(self, origin: str) -> bool:
        return origin.strip().lower() in self._origins


def host_names(settings: Settings) -> Collection[str] | None:
    """The names that `Host` may have, besides those of loopback; None for any."""
    if settings.allowed_hosts:
        return settings.allowed_hosts
    # On other addresses the names under which clients reach it are not known here.
    return () if settings.is_local else None


def _is_own(origin: str, hosts: Sequence[str]) -> bool:
    """Whether a browser that sent this origin got its page from this host."""
    scheme, _, rest = origin.strip().lower().partition("://")
    if scheme not in _PORTS or len(hosts) != 1:
        return False
    page, host = _HOST.fullmatch(rest), _HOST.fullmatch(hosts[0].strip().lower())
    if page is None or host is None:
        return False
    usual = _PORTS[scheme]
    return (page[1], page[2] or usual) == (host[1], host[2] or usual)


def _foreign(header: str, came: str, hosts: Sequence[str]) -> OriginRefused:
    own = quoted(hosts[0]) if hosts else "this server"
    return OriginRefused(
        f"the request comes from a web page of another site ({header}: {quoted(came)}), and such pages "
        f"may change nothing here; expected a page of {own}. If a proxy renames the host, let it pass "
        "Host on, or list the page's origin in GRAFTWORK_ALLOWED_ORIGINS",
        field=header,
        expected=f"a page of {own}, or an origin in GRAFTWORK_ALLOWED_ORIGINS",
        came=quoted(came),
    )


def _host_refused(hosts: Sequence[str]) -> HostRefused:
    came = quoted(", ".join(hosts))
    return HostRefused(
        f"the Host header is {came}, which is no name of this server; expected localhost, 127.0.0.1, "
        "[::1] or a name in GRAFTWORK_ALLOWED_HOSTS: list this one there if it is yours",
        field="host",
        expected="localhost, 127.0.0.1, [::1] or a name in GRAFTWORK_ALLOWED_HOSTS",
        came=came,
    )
