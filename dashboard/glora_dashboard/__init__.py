"""The web surface of the server: REST and metrics; it reads queries and sends commands."""
