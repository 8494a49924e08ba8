"""OpenAI's generation protocol: `/v1/completions`, `/v1/chat/completions` and `/v1/responses`.

    completions, chat   the two routes: a body becomes prompts, outputs become their JSON
    schemas             what a body may say
    model               which adapter is meant
    sampling            a body's fields as the engine's options
    prompts, messages   strings, token ids, rows and conversations as prompts
    batch               every sequence of one request, side by side in the engine
    job                 a checked request, its sequences and its usage
    responses           the third route, with body and replies of its own
    embeddings          a refusal that says what would serve them
    reply               whole replies and streams of both routes
    logprobs            both shapes of log-probabilities

The two routes import the others; `reply` knows neither of them.
"""
