"""Adapters: trained, taken out of fine-tuned models, resized, merged, and counted."""
