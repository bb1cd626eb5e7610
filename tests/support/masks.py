"""What a mask says of one pair."""


def sees(mask, row, key, problem):
    """By the words of flash_fwd's docstring, not by the mask's own limits."""
    place = row + problem.seqlen_k - problem.seqlen_q
    left, right = problem.args.mask
    inside = not mask.windowed or place - left <= key <= place + right
    return 0 <= key < problem.seqlen_k and inside and (not mask.causal or key <= place)
