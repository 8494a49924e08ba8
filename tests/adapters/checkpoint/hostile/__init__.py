"""The attacks that the checkpoint and archive readers defeat, each kept as a small generator."""
