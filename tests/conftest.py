"""What every test may use: the tiny models and the golden texts."""

pytest_plugins = ["golden_text", "models"]
