"""The base model on disk and in memory: fetch and convert the default one, load any."""
