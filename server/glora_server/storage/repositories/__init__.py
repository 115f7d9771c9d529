"""Repositories: records in, records out; rows never leave."""
