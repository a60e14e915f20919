"""The two pipelines, edit and restore, and what they are made of."""
