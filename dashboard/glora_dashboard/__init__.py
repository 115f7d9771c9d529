"""The web surface of the server: pages, REST and metrics; it reads queries and sends commands."""
