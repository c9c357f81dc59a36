"""Conventions written once: every other file imports them from here."""

IGNORE_INDEX = -100
"""Label of a token that takes no part in the loss. Labels are unshifted; the model shifts them."""

IMAGE_TOKEN = "<image>"
"""Marks, in record and prompt text, the place of one image."""
