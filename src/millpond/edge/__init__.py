"""The inference site: answers from a verified model, newer models in, corrections out. CPU only, never torch.

`serve_edge` is the whole program. Promises: what it serves was verified; a correction answered with 202 reaches
the hub once; it goes on without a network.
"""

from millpond.edge.program import serve_edge

__all__ = ["serve_edge"]
