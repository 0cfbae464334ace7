"""What ``rules="exact+merge"`` adds: units that are multiples of others, products of layers.

Everything here changes weights of the network at its full width such that units lose their
readers; the exact rules then cut what nobody reads.
"""

from sapwood.minimize.merging._rounds import Merged, merged

__all__ = ["Merged", "merged"]
