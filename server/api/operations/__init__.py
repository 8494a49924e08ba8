"""Routes for operators: health, drain, metrics, what is served."""
