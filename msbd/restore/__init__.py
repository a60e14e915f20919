"""Pixel-Aware Stable Diffusion: restore a degraded picture."""
