"""What holds for any shape, layout and type, for every op of the schema."""
