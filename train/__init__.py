"""LoHa training and the miniature world."""
