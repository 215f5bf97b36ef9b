"""Training by parts."""
