"""The server: see ARCHITECTURE.md for its parts."""
