"""Records, prompts, labels, pictures and batches."""
