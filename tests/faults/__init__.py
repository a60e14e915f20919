"""What readers do with files that are damaged on purpose."""
