"""The operator: its description, checks, kernels and derivatives."""
