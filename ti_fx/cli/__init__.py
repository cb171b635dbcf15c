"""The command line: ``ti-fx --help``."""
