"""Many runs beside one another."""
