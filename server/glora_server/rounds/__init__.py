"""What may happen in a run, a round and an assignment, and who takes part: pure functions of their arguments."""
