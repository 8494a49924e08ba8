"""Settings and limits: the only place that reads the environment."""
