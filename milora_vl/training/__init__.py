"""Training: the two stages and what they share."""
