"""Routes that generate, classify and tokenize."""
