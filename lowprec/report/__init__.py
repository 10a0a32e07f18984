"""What a run says at its end: summary.json and the table. Knows figures, nothing of models."""
