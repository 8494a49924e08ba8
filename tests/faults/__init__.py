"""Faults on real processes: the disk, the database, the engine, and kills at the worst moment."""
