"""Tests of the methods, with PEFT as the oracle."""
