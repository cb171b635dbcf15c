"""The study of convergence: settings, arms, single runs, what is kept of them, and the page that is made of it."""
