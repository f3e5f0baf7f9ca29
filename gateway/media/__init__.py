"""Frames to files: fragmented and faststart MP4, stills, metadata."""
