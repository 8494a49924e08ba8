"""OpenAI's generation protocol: `/v1/completions` and `/v1/chat/completions`.

    completions, chat   the two routes: a body becomes prompts, outputs become their JSON
    schemas             what a body may say
    model               which adapter is meant
    sampling            a body's words as the engine's options
    prompts, messages   strings, token ids, rows and conversations as prompts
    batch               every sequence of one request, side by side in the engine
    reply               what both routes have in common: whole replies, streams, usage
    logprobs            both shapes of log-probabilities

The two routes import the others; `reply` knows neither of them.
"""
