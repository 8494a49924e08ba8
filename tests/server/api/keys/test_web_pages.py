"""Web pages and keys: a key opens nothing to a foreign page; an allowed origin still needs one."""

from __future__ import annotations

from tests.server.api.keys.conftest import PAGE

JSON = {"inputs": "a"}


def test_a_key_does_not_let_a_page_of_another_site_in(guarded, keys):
    foreign = {"origin": "http://evil.example"}
    for key in (None, "gw-nothing", keys["generate"], keys["admin"]):
        reply = guarded.ask("POST", "/tokenize", key, json=JSON, headers=foreign)
        assert (reply.status_code, "another site" in reply.text) == (403, True)


def test_pages_of_an_allowed_origin_need_a_key_and_may_read_the_reply(guarded, keys):
    page = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    first = {
        **page,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    asked = guarded.ask("OPTIONS", "/tokenize", headers=first)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    reply = guarded.ask("POST", "/tokenize", keys["generate"], json=JSON, headers=page)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in reply.headers["access-control-expose-headers"]
    refused = guarded.ask("POST", "/tokenize", json=JSON, headers=page)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    assert guarded.ask("OPTIONS", "/tokenize").status_code in (401, 405)
