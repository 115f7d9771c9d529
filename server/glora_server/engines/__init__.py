"""Engines run the numerics outside of the event loop. `local` never imports torch; its worker process does."""
