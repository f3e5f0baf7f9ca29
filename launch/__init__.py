"""Start, watch, stop. Imports no torch."""
