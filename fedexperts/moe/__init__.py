"""Mixture-of-Experts models by structure: finding, cutting, adapting and counting them. Nothing federated."""
