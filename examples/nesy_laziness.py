"""What laziness saves: the sum by elimination against the joint of all digits."""

from __future__ import annotations

import torch

from sapwood.cli import additions


def main() -> None:
    """Times both ways for one, two and four digits; the joint of four is refused."""
    torch.set_num_threads(1)
    for digits in (1, 2, 4):
        request = additions.Request(digits=digits)
        additions.show_ablation(request, additions.ablate(request))


if __name__ == "__main__":
    main()
