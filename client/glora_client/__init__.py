"""The device's side of glora: joins, trains on its own data, sends adapters; the data stays where it is."""
