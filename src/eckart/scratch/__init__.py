"""Low rank from the first step (preset), and low rank by persuasion (penalties); both run in Trainer."""
