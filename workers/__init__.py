"""What happens on a rank. The only package that imports torch."""
