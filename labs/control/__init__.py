"""Control laws on simulated links and losses: traces, plant, laws, score, page."""
