"""The server's side of the process border: starts the engine process, feeds it requests, restarts it."""
