"""What training a model will take in memory, before anything is allocated."""

from memkernels.planner.search import Plan, plan

__all__ = ["Plan", "plan"]
