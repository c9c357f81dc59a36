"""A saved adapter becomes something else: a plain or smaller LoRA, or a merged model."""
