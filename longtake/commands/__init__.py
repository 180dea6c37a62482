"""The command line, one file a command: the only place with options and print."""
