"""MiLoRA adapters: decompose, attach, certify, save, load, merge."""
