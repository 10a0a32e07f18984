"""What a run says at its end: summary.json, the table, and pages (``html/``). Knows figures, nothing of models."""
