"""What a study costs, and which device does what of it, before anything is spent."""
