"""`python -m tools.evaluate`: methods against their baselines."""
