"""Text generation: prompts, adapter lookup, quotas, ranking, grammars, observers. Independent of HTTP."""
