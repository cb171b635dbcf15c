"""An exported file is run, generated with, and wrapped in a pipeline."""
