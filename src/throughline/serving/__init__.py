"""A run in a browser: a server that reads it at any time, and traces prompts one after another.

Reading needs no torch. `throughline.api.serve` starts it; docs/serving.md says what it answers and whom.
"""
