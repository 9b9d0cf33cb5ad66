"""What is timed, how, and where the figures go. See README.md in this folder."""
