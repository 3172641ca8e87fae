"""How much memory, communication and time a run will take, before it is started.

From the configuration and the models' config.json alone: nothing here imports torch. What the
numbers rest on, and what was measured of them, is in docs/planner.md.
"""
