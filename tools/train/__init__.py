"""`python -m tools.train`: train PASD, or a base."""
