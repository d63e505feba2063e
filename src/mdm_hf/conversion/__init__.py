"""Checkpoints of other formats in and out: `mdm convert`. Nothing at runtime imports this."""
