"""Metrics, traces and the Prometheus text format."""
