"""What every test may use: the tiny models, a trained classifier and the golden texts."""

pytest_plugins = ["golden_text", "models", "classifier"]
