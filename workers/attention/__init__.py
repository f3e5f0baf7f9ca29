"""Attention kernels behind one signature: attend(q, k, v) -> out, lse."""
