"""The parts of StickerVQA's build; the entry is ``data_prep/stickervqa.py``."""
