"""Pictures, masks, boxes and tiles: what both pipelines do to pixels."""
