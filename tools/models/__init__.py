"""`python -m tools.models`: known models, and files of weights."""
