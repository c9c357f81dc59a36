"""Finetune LLaVA-style vision-language models with MiLoRA adapters, and evaluate them."""
