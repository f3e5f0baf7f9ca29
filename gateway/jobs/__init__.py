"""Durable jobs: rows, outputs, and the task that carries a job through the mesh."""
