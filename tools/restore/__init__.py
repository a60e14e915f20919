"""`python -m tools.restore`: restore pictures."""
