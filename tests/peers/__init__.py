"""The numbers that diffusers' own scheduler tests store, computed by the samplers here."""
