"""Equations: delay, feasibility, utility, shares, the dual and the bounds; pure functions on tensors."""
