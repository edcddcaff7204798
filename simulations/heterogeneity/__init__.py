"""What happens where sites can hold adapters of unlike rank only."""
