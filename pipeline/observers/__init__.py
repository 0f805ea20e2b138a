"""What the shared frame pass measures: one observer, one file."""
