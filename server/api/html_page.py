"""HTML replies: a page, and the headers under which a browser shows it.

No page here needs another host, and no page has a script in it. The policy says so to the browser, so
that a text which slipped into a page could not become a script either.
"""

from __future__ import annotations

from fastapi.responses import HTMLResponse

_DENIED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def policy(**sources: str) -> str:
    """A Content-Security-Policy that denies everything but the given sources.

    Args:
        sources: what a directive allows, its name with underscores: `script_src="'self'"`.
    """
    allowed = (f"{name.replace('_', '-')} {value}" for name, value in sources.items())
    return "; ".join((_DENIED, *allowed))


def page_headers(content_security_policy: str) -> dict[str, str]:
    """The headers of everything that a page consists of."""
    return {
        "content-security-policy": content_security_policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def html_page(html: str, content_security_policy: str) -> HTMLResponse:
    """A reply with a page; its texts are escaped already."""
    return HTMLResponse(html, headers=page_headers(content_security_policy))
