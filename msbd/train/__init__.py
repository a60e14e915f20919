"""PASD's training, and the degradations that its data is made with."""
