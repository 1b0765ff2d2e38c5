"""Mixture of experts: tokens to their experts and back, grouped products, and the experts' feed-forward layer."""
