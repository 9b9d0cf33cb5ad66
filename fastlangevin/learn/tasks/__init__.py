"""What a learned model is used for."""
