"""The `unimodal` command: one file per subcommand; parses, calls, prints."""
