"""Subcommands of `slm-assist`, one a file: `add(command)` declares it, `run(options, overrides)` does it."""
