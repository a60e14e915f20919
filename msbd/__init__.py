"""The two pipelines, their training, and what they stand on."""
