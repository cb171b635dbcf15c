"""The graph itself: editing it, what is recorded of it, its text, its stages and the pipelines that rewrite it."""
