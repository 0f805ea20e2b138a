"""What is measured on the stored pictures of a clip, one module a score."""
