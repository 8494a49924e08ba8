"""OpenAI's Responses API for text: `/v1/responses`.

    route    the routes: a body becomes a conversation and one sequence in the engine
    body     what a body may say, and which parts are refused by name
    reply    whole responses and their events
    types    both as the dictionaries that are written

Responses are not stored. The conversation's prompt, sampling and limits are those of
`/v1/chat/completions`.
"""
