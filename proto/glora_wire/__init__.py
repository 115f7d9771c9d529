"""What both sides of the wire agree on beyond the protos: payloads, digests, names, reasons, the manifest."""
