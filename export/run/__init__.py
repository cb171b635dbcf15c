"""Using an exported file: sessions, generation, pipelines."""
