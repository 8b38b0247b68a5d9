"""What a small LM gives: soft labels, and the schedule by which it comes and goes."""
