"""The shipped tiny text-to-video model."""
