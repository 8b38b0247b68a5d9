"""Subcommands of `slm-assist` that have a file of their own."""
