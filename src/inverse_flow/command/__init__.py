"""The command ``inverse-flow``."""
