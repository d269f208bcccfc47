"""Every model file of mlx-lm, held to what the suite holds a few to."""
