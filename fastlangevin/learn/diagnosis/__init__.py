"""What chains do."""
