"""What the page shows of a run: the answers to everything it asks, the same in the report and on the server. No torch."""
