"""Samplers: pure functions over tensors; they know no network."""
