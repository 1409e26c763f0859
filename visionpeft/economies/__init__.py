"""What a frozen backbone makes unnecessary: less work and less memory, with the same results."""
