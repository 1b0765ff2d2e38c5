"""The product of a router of experts: in float32, of x times noise."""
