"""Command lines: the only place that prints, parses arguments or exits."""
