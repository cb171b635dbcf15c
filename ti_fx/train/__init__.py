"""Training: phases as forks of one graph, driven by Hugging Face's Trainer."""
