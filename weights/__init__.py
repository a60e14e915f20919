"""Checkpoint files to state dicts with canonical keys; imports no network. Code, plus the mini bundle's
files.
"""
