"""The command ``inverse-flow``."""

# Conventional exit status of a program ended by Ctrl-C.
INTERRUPTED_STATUS = 130
