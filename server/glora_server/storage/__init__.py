"""What survives a crash: the relational database and the blobs."""
