"""Policy, anchor and reference: loading, roles, the moving anchor, log-probabilities, sharding.

Nothing here samples or depends on rewards or objectives.
"""
