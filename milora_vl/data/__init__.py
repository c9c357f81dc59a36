"""Records, prompts, labels, images and batches."""
