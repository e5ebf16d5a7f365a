"""Generation: diffusion models, scores, and campaigns that make score tables."""
