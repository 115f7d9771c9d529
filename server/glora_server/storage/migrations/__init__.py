"""Alembic's environment and the migrations; run by glora_server.storage.migrate."""
