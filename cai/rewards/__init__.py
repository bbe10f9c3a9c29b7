"""Reward models: networks whose outputs for a whole dialogue become one reward."""
