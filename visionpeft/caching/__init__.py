"""What frozen parts compute, kept by content."""
