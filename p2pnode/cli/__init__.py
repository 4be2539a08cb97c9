"""The command line. Every heavy import happens inside a command, so that `--help` is quick."""
