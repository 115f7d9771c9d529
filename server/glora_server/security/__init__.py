"""Certificates, tokens and limits: who may talk to the server."""
