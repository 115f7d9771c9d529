"""The gRPC edge: parses what devices say, calls the use cases, and turns reasons into statuses."""
