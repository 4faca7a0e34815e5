"""The network and its losses. Knows torch, nothing of files, ranks or recipes."""
