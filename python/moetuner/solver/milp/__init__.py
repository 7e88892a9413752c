"""Integer programmes; ``highs`` alone knows HiGHS."""
