"""Multi-Stage Blended Diffusion: repaint a masked region of a picture."""
