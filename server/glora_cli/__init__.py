"""The `glora` command: the one place that may import both the server and the client."""
