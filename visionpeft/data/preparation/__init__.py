"""Published archives, unpacked into the folders that the data modules read."""
