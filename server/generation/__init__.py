"""Generating text: prompts, adapter lookup, quotas, ranking, grammars, observers. Knows no HTTP."""
