"""HTTP in, frames out. Imports no torch."""
