"""The bytes of an exported file, and what it says of itself."""
