"""Tests of the adapter library; they mirror its modules."""
