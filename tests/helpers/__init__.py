"""What several tests share: nets, files and oracles."""
