"""Drives the product from outside and writes what it measured to bench/results/."""
