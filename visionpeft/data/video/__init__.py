"""Videos: reading, clips, published and own sets."""
