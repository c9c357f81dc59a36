"""Conventions written once: every other file imports them from here."""

IGNORE_INDEX = -100
"""Label of a token that takes no part in the loss. Labels are unshifted; the model shifts them."""

IMAGE_TOKEN = "<image>"
"""Marks, in record and prompt text, the place of one image."""
IMAGE_TEXT = f"{IMAGE_TOKEN[0]}\ufdd0{IMAGE_TOKEN[1:]}"
"""``IMAGE_TOKEN`` where a question means these characters and no image.

U+FDD0 is set aside by Unicode for use inside a program, so no text of a record holds it.
"""

VIDEO_TEXT = "<video>"
"""Marks, in the text of a record that names videos, the place of one."""
VIDEO_TOKEN = f"{VIDEO_TEXT[0]}\ufdd1{VIDEO_TEXT[1:]}"
"""``VIDEO_TEXT`` where a question means a video; as such the characters mean themselves."""
