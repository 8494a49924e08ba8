"""What a data directory holds: database, adapters, jobs, files, API keys."""
