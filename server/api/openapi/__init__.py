"""The OpenAPI page. FastAPI makes it from the routes; this room has what they have in common.

    constraints   what bodies must be beyond the types of their fields
    responses     streams and plain text, for a route's decorator
    refusals      errors, for a route's decorator, in the shape that the path has
    links         from a reply to the requests that it can be used in
    page          completes FastAPI's page

Nothing here runs when a request is served. A test holds the replies of a running server to the page.
"""
