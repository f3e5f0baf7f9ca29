"""Frames to files: MP4 that grows and MP4 that is done, other video formats, stills, metadata."""
