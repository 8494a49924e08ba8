"""Hostile input against one real server; the corpus stands in `files`."""
