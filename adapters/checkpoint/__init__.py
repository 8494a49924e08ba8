"""A checkpoint folder, an archive of one, and the limits on both."""
