"""Pictures and clips to discrete codes and back."""
