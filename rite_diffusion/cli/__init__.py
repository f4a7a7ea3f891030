"""The `rite` command: one module per group of commands, its options and its output."""
