"""What a method costs: trained values, saved bytes, multiply-adds, time."""
