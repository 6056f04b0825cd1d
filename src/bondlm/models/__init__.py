"""The policy and its two companions: loading, roles, the moving anchor, log-probabilities, sharding.

Nothing here samples, and nothing knows of rewards or objectives.
"""
