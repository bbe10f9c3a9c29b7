"""What is claimed about speed, as programs that print it."""
