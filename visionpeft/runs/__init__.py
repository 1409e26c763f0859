"""One run: command line, run directory, checkpoints, history, tables and figures."""
