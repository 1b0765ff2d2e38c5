"""Routers of mixtures of experts: which experts each token goes to, with what weight, and the losses that steer it."""

from memkernels.nn.routers.expert_choice import ExpertChoiceRouter
from memkernels.nn.routers.router import Router, Routing
from memkernels.nn.routers.switch import SwitchRouter
from memkernels.nn.routers.top_k import TopKRouter

__all__ = ["ExpertChoiceRouter", "Router", "Routing", "SwitchRouter", "TopKRouter"]
