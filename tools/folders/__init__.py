"""Many pictures by one command: which they are, how they are shared out, and what became of each."""
