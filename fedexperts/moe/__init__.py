"""Mixture-of-Experts models by structure: finding, shrinking, adapting and measuring them. Nothing here is federated."""
