"""What the core's searches are asked; proves nothing."""
