"""The edit pipeline and what it is made of."""
