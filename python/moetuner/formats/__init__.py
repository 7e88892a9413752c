"""Foreign formats, one file each. Nothing here imports an engine."""
