"""The OpenAPI page: what every route answers with, refuses with and looks like.

    page        FastAPI's page, completed from the table
    routes      the table: one entry a route
    refusals    errors as responses, in the shape that a path has
    generation, management, training, tuning
                what replies hold, field by field

Routes say what they take; what they answer stands here, beside them and not in their way. Nothing here
runs when a request is served. A test holds replies of a running server to it.
"""
